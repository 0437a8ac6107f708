"""Eq. 6 for one token, in Triton and fp64: its reasoning step, log-probability, loss and derivative, and the values stored per
row. The rules are those of csrc/rows.h."""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# Annotations here are Triton's, not Python's.

from __future__ import annotations

import triton
import triton.language as tl

MAX_LOG_RATIO = tl.constexpr(20.0)  # as reference.MAX_LOG_RATIO
LN2 = tl.constexpr(0.6931471805599453)
# Planes of `rows`, as native.ROW_FIELDS
LOSS, LOGPROB, LSE, RATIO, KL, ENTROPY, CLIPPED, OUTSIDE, STEP = (tl.constexpr(field) for field in range(9))
NUM_FIELDS = tl.constexpr(9)


@triton.jit
def step_of_row(row, cu_seqlens, step_ends, num_sequences, num_steps):
    """(sequence, reasoning step) of a packed row. Algorithm 1, line 11: the step that a token belongs to. An empty sequence owns
    no row."""
    low = row * 0
    high = low + num_sequences
    while high - low > 1:  # the last sequence that starts at or before the row
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) <= row
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    position = row - tl.load(cu_seqlens + low)
    step = low * 0
    for j in range(0, num_steps - 1):
        step += (position >= tl.load(step_ends + low * num_steps + j)).to(tl.int64)
    return low, step


@triton.jit
def expm1(x):
    """exp(x) - 1 in fp64, accurate to fp32 for small x, too."""
    return tl.where(tl.abs(x) < 1e-4, x * (1.0 + x * (0.5 + x * (1.0 / 6))), tl.exp(x) - 1.0)


@triton.jit
def stored(logprobs, row, computed):
    """A stored log-probability in fp64. The computed one if none is stored, or if the two differ only by the rounding to fp32,
    so that an unchanged token has ratio 1 and KL 0 exactly."""
    if logprobs is not None:
        stored = tl.load(logprobs + row)
        computed = tl.where(stored == computed.to(tl.float32), computed, stored.to(tl.float64))
    return computed


@triton.jit
def token_loss(
    logprob, old_logprob, ref_logprob, full_kl, advantage, clips, kl_coef, CLIP_FORM: tl.constexpr, KL_ESTIMATOR: tl.constexpr
):
    """One token's (loss, derivative by its log-probability, ratio, KL, whether it is clipped), without `weights`; fp64."""
    log_ratio = logprob - old_logprob
    ratio = tl.exp(tl.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio))  # Eq. 6: rho_{i,t} = pi_theta / pi_theta_old
    # min(ratio A, clip(ratio) A) bounds the ratio from above where A > 0 and from below where A < 0. Dual clip also bounds it
    # from above where A < 0.
    clip_low, clip_high, dual_clip = clips
    raised = tl.where(ratio < clip_low, clip_low, ratio)
    if CLIP_FORM == "cispo":  # -stop_gradient(clip(ratio)) A log pi
        bounded = tl.where(raised > clip_high, clip_high, raised)
        cut = bounded != ratio
        loss = tl.where(advantage == 0, 0.0, -bounded * advantage * logprob)
        dloss = -bounded * advantage
    else:
        bounded = tl.where(raised > dual_clip, dual_clip, raised)
        bounded = tl.where(advantage > 0, tl.where(ratio > clip_high, clip_high, ratio), bounded)
        cut = bounded != ratio
        loss = -bounded * advantage  # Eq. 6: -min(r A, clip(r, 1-eps, 1+eps) A)
        dloss = tl.where(cut | (log_ratio > MAX_LOG_RATIO), 0.0, -ratio * advantage)

    d = logprob - ref_logprob
    kl = tl.full([], 0.0, tl.float64)
    dkl = kl
    if KL_ESTIMATOR == "k1":
        kl = d
        dkl = tl.full([], 1.0, tl.float64)
    if KL_ESTIMATOR == "k2":
        kl = d * d / 2
        dkl = d
    if KL_ESTIMATOR == "k3":
        inverse = tl.where(-d > MAX_LOG_RATIO, MAX_LOG_RATIO, -d)
        e = expm1(inverse)
        kl = e - inverse
        dkl = tl.where(-d > MAX_LOG_RATIO, 0.0, -e)
    if KL_ESTIMATOR == "full":
        kl = full_kl
    if kl_coef != 0:  # else an infinite KL that is only measured would make the loss NaN (0 * inf)
        loss += kl_coef * kl  # Eq. 6: beta * D_KL[pi_theta || pi_ref]
        dloss += kl_coef * dkl
    return loss, dloss, ratio, kl, cut & (advantage != 0)


@triton.jit
def of_label(x_label, offset, total, dot, c, c_error):
    """(log-probability of the label, log2 of the total, mean exponent, the label's exponent), in fp64. Exponents are relative to
    `offset`, so that the common part of large logits has cancelled.

    total: sum of E = 2^(x c - offset); dot: sum of E log2 E; c_error: exact c / c - 1.
    """
    e_label = tl.exp2(tl.fma(x_label, c, -offset))
    is_certain = e_label == total
    total = total.to(tl.float64)
    log_total = tl.log2(total)
    y_label = x_label.to(tl.float64) * tl.cast(c, tl.float64) - offset
    mean = dot / total
    log2_p = y_label - log_total
    # For a likely label the rounded power is used, as it is in the sum, so that a certain label gets exactly 0.
    log2_p = tl.where(log2_p > -1, tl.log2(e_label.to(tl.float64)) - log_total, log2_p)
    log2_p += c_error * (tl.maximum(y_label, -1.0e30) - mean)  # first-order correction of the rounding of c
    log2_p = tl.where(is_certain, 0.0, log2_p)
    return tl.where(log2_p > 0, 0.0, log2_p) * LN2, log_total, mean, y_label


@triton.jit
def store_nothing(planes, plane):
    """Store the values of an ignored row."""
    for field in tl.static_range(NUM_FIELDS):
        tl.store(planes + field * plane, -1.0 if field == STEP else 0.0)


@triton.jit
def store_token(
    planes,
    plane,
    row,
    logprob,
    entropy,
    full_kl,
    outside,
    advantage,
    weight,
    step,
    old_logprobs,
    ref_logprobs,
    clips,
    kl_coef,
    CLIP_FORM: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
):
    """Returns the derivative of the token's term of the loss by its log-probability; stores all values of the row except LOGPROB
    and LSE."""
    old = stored(old_logprobs, row, logprob)
    ref = stored(ref_logprobs, row, logprob)
    loss, dloss, ratio, kl, clipped = token_loss(logprob, old, ref, full_kl, advantage, clips, kl_coef, CLIP_FORM, KL_ESTIMATOR)
    tl.store(planes + LOSS * plane, (weight * loss).to(tl.float32))
    tl.store(planes + RATIO * plane, ratio.to(tl.float32))
    tl.store(planes + KL * plane, kl.to(tl.float32))
    tl.store(planes + ENTROPY * plane, entropy.to(tl.float32))
    tl.store(planes + CLIPPED * plane, clipped.to(tl.float32))
    tl.store(planes + OUTSIDE * plane, outside)
    tl.store(planes + STEP * plane, step.to(tl.float32))
    return weight * dloss  # the weight carries 1/G sum 1/|o_i| of Eq. 6, decided by the caller
