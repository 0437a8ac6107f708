"""Eq. 6 for one token, in Triton and fp64: its reasoning step, log-probability, loss and derivative, and what of it is stored.
Rules are those of csrc/rows.h."""
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
    """(sequence, reasoning step) of a packed row: Algorithm 1 line 11. An empty sequence owns no row."""
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
    """exp(x) - 1 in fp64, good to fp32 for small x as well."""
    return tl.where(tl.abs(x) < 1e-4, x * (1.0 + x * (0.5 + x * (1.0 / 6))), tl.exp(x) - 1.0)


@triton.jit
def stored(logprobs, row, computed):
    """A stored log-probability in fp64; the computed one where there is none, or where they differ by the rounding to fp32 alone,
    so that a token that has not moved has ratio 1 and KL 0 exactly."""
    if logprobs is not None:
        stored = tl.load(logprobs + row)
        computed = tl.where(stored == computed.to(tl.float32), computed, stored.to(tl.float64))
    return computed


@triton.jit
def token_loss(
    logprob, old_logprob, ref_logprob, full_kl, advantage, clips, kl_coef, CLIP_FORM: tl.constexpr, KL_ESTIMATOR: tl.constexpr
):
    """One token's (loss, derivative by its log-probability, ratio, KL, whether it is clipped), all but `weights`; fp64."""
    log_ratio = logprob - old_logprob
    ratio = tl.exp(tl.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio))
    # min(ratio A, clip(ratio) A) bounds the ratio above where A > 0 and below where A < 0; dual clip bounds it above there, too
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
        loss = -bounded * advantage
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
    if kl_coef != 0:  # so that a KL that only measures cannot spoil the loss with 0 * inf
        loss += kl_coef * kl
        dloss += kl_coef * dkl
    return loss, dloss, ratio, kl, cut & (advantage != 0)


@triton.jit
def of_label(x_label, offset, total, dot, c, c_error):
    """(log-probability of the label, log2 of the total, mean exponent, the label's), in fp64 and relative to `offset`: what large
    logits have in common has cancelled out.

    total: of E = 2^(x c - offset); dot: of E log2 E; c_error: by how much, relative to c, its rounding falls short of it.
    """
    e_label = tl.exp2(tl.fma(x_label, c, -offset))
    is_certain = e_label == total
    total = total.to(tl.float64)
    log_total = tl.log2(total)
    y_label = x_label.to(tl.float64) * tl.cast(c, tl.float64) - offset
    mean = dot / total
    log2_p = y_label - log_total
    # A likely label's own power is taken with the rounding that it has in the sum, so that a certain one gets exactly 0.
    log2_p = tl.where(log2_p > -1, tl.log2(e_label.to(tl.float64)) - log_total, log2_p)
    log2_p += c_error * (tl.maximum(y_label, -1.0e30) - mean)  # as with an exact c: the first order is all there is
    log2_p = tl.where(is_certain, 0.0, log2_p)
    return tl.where(log2_p > 0, 0.0, log2_p) * LN2, log_total, mean, y_label


@triton.jit
def store_nothing(planes, plane):
    """Values of a row that counts nothing."""
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
    """Derivative of the token's term of the loss by its log-probability; all values of the row but LOGPROB and LSE are stored."""
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
    return weight * dloss
