"""Triton kernels of the loss rows: one program per row, for sm80 and later and gfx942. triton_rows.py launches them.

First sweep: sums of E = 2^(x c - k) with c = log2(e) / temperature and k an integer no smaller than any x c so far, so that
an exponent has a single rounding and a change to a larger k scales by a power of two. The row's last tiles come first and stay in
registers ("held"); the others ("streamed") follow. Then the row's log-sum-exp, the token's loss and its derivative are known, and
a second sweep writes gradient = E * (a number per row): the held tiles from registers, then the streamed ones backwards, which
are most likely still in the L2 cache. A tile is read completely before it is written, and the label's logit is read before the
second sweep: the gradient may overwrite the logits.

A filtered row (kept ids) is a single held tile of gathered candidates. Sums are fp32, per-row computations fp64. The rules are
those of csrc/rows.h; tests compare with fp64.
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# Annotations here are Triton's, not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from srpo_kernels.triton_tokens import LN2, LOGPROB, LSE, expm1, of_label, step_of_row, store_nothing, store_token

IGNORE = tl.constexpr(-100)
LOWEST = tl.constexpr(-3.0e38)  # the offset before the first finite logit
# Arguments that may differ from call to call without a new compilation: all except the layout of a row.
ANYTHING = (
    *("labels", "kept_ids", "step_advantages", "step_ends", "cu_seqlens", "weights", "old_logprobs", "ref_logprobs"),
    *("grad_logprobs", "grad_lse", "rows", "num_rows", "num_sequences", "num_steps", "num_kept", "first_row"),
)


@triton.jit
def _load(row, columns, valid, EVICT: tl.constexpr):
    """Elements of a row in their own dtype, -inf where not valid."""
    return tl.load(row + columns, mask=valid, other=float("-inf"), eviction_policy=EVICT)


@triton.jit
def _exponents(x, c, offset):
    """(new offset for this and all earlier tiles, old offset - new offset, x c - new offset of the tile)."""
    moved = tl.maximum(offset, tl.ceil(tl.max(x, 0) * c))
    return moved, offset - moved, tl.fma(x, c, -moved)


@triton.jit
def _fold(x, FOLD: tl.constexpr):
    """Sums of FOLD neighbours, all of which one thread holds."""
    return tl.sum(tl.reshape(x, [x.shape[0] // FOLD, FOLD]), 1)


@triton.jit
def _add_terms(total, lost, scale, terms, FINE: tl.constexpr):
    """(total scale + terms, the accumulated rounding error of that sum): Kahan summation; `scale` is a power of two. A thread
    adds dozens of terms to one that may be larger than all of them, so rounding errors need not average out. Without FINE a plain
    sum."""
    scaled = total * scale
    if FINE:
        owed = terms - lost * scale
        total = scaled + owed
        lost = (total - scaled) - owed
    else:
        total = scaled + terms
    return total, lost


@triton.jit
def _add_tile(x, ref_logits, columns, valid, c, sums, FOLD: tl.constexpr):
    """(offset, total, lost, dot, ref_offset, ref_total, ref_lost, gap) with one more tile. Every thread keeps its own sums, so a
    tile costs only one reduction over the threads, for its maximum.

    total: sum of E; lost: see `_add_terms`; dot: sum of E log2 E; ref_*: the same sums for the reference; gap: sum of
    E (log2 E - log2 of the reference's E).
    """
    offset, total, lost, dot, ref_offset, ref_total, ref_lost, gap = sums
    fine = x.dtype == tl.float32
    offset, drop, y = _exponents(x.to(tl.float32), c, offset)
    scale = tl.exp2(drop)
    e = tl.exp2(y)
    e_y = e * tl.maximum(y, -150.0)  # 2^-150 is 0 in fp32, and 0 * -inf is not
    dot = tl.fma(total, drop, dot) * scale + _fold(e_y, FOLD)
    if ref_logits is not None:
        ref_x = _load(ref_logits, columns, valid, "evict_last").to(tl.float32)
        ref_offset, ref_drop, ref_y = _exponents(ref_x, c, ref_offset)
        gap = tl.fma(total, drop - ref_drop, gap) * scale + _fold(tl.where(e != 0, e * (y - ref_y), 0.0), FOLD)
        ref_total, ref_lost = _add_terms(ref_total, ref_lost, tl.exp2(ref_drop), _fold(tl.exp2(ref_y), FOLD), fine)
    total, lost = _add_terms(total, lost, scale, _fold(e, FOLD), fine)
    return offset, total, lost, dot, ref_offset, ref_total, ref_lost, gap


@triton.jit
def _fill_zero(dlogits, vocab, BLOCK: tl.constexpr):
    """Fill the gradient of a row with zeros."""
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(dlogits + columns, tl.zeros([BLOCK], dlogits.dtype.element_ty), mask=columns < vocab, cache_modifier=".cs")


@triton.jit
def _held_tiles(logits, columns, vocab, BLOCK: tl.constexpr, NUM_HELD: tl.constexpr):
    """The tiles that stay in registers; `columns` are the columns of the first tile."""
    tiles = (_load(logits, columns, columns < vocab, ""),)
    for i in tl.static_range(1, NUM_HELD):
        tiles = tiles + (_load(logits, columns + i * BLOCK, columns + i * BLOCK < vocab, ""),)  # noqa: RUF005 (Triton does not unpack)
    return tiles


@triton.jit
def _tile(logits, held, i: tl.constexpr, columns, vocab):
    """One of the held tiles; loaded from memory if no tiles are held."""
    if held is None:
        x = _load(logits, columns, columns < vocab, "evict_last")
    else:
        x = held[i]
    return x


@triton.jit
def _row_sums(logits, ref_logits, held, columns, head, vocab, c, BLOCK: tl.constexpr, NUM_HELD: tl.constexpr, FOLD: tl.constexpr):
    """First sweep: (offset, total, dot, ref_offset, ref_total, gap) of the whole row, see `_add_tile`."""
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK // FOLD], tl.float32)
    lowest = tl.max(zeros, 0) + LOWEST
    sums = (lowest, zeros, zeros, zeros, lowest, zeros, zeros, zeros)
    x = _load(logits, lanes, lanes < head, "evict_last")
    for i in tl.static_range(NUM_HELD):
        own = columns + i * BLOCK
        sums = _add_tile(_tile(logits, held, i, own, vocab), ref_logits, own, own < vocab, c, sums, FOLD)
    for start in range(0, head, BLOCK):
        ahead = start + BLOCK  # load the next tile while this one is processed
        next_x = _load(logits, ahead + lanes, lanes < head - ahead, "evict_last")
        sums = _add_tile(x, ref_logits, start + lanes, lanes < head - start, c, sums, FOLD)
        x = next_x
    offset, total, _, dot, ref_offset, ref_total, _, gap = sums
    return offset, tl.sum(total, 0), tl.sum(dot, 0), ref_offset, tl.sum(ref_total, 0), tl.sum(gap, 0)


@triton.jit
def _write_tile(dlogits, x, ref_logits, columns, valid, row):
    """Gradient of one tile; `row` as in `_write_gradient`."""
    label, at_label, c, offset, ref_offset, factor, per_gap = row
    y = tl.fma(x.to(tl.float32), c, -offset)
    d = tl.exp2(y)
    if ref_logits is None:
        d = d * factor
    else:
        ref_x = _load(ref_logits, columns, valid, "evict_first").to(tl.float32)
        d = tl.where(d != 0, d * tl.fma(per_gap, y - tl.fma(ref_x, c, -ref_offset), factor), 0.0)
    d = tl.where(columns == label, at_label, d).to(dlogits.dtype.element_ty)
    tl.store(dlogits + columns, d, mask=valid, cache_modifier=".cs")


@triton.jit
def _write_gradient(logits, ref_logits, dlogits, held, columns, head, vocab, row, BLOCK: tl.constexpr, NUM_HELD: tl.constexpr):
    """Second sweep: the held tiles, then the streamed ones from the last to the first.

    row: (label, gradient there, c, offset, ref_offset, factor, per_gap); elsewhere it is E (factor + per_gap log2(E / E_ref)).
    """
    lanes = tl.arange(0, BLOCK)
    x = _load(logits, head - BLOCK + lanes, lanes < head, "evict_first")
    for i in tl.static_range(NUM_HELD):
        own = columns + i * BLOCK
        _write_tile(dlogits, _tile(logits, held, i, own, vocab), ref_logits, own, own < vocab, row)
    for done in range(0, head, BLOCK):
        start = head - BLOCK - done
        next_x = _load(logits, start - BLOCK + lanes, lanes < start, "evict_first")
        _write_tile(dlogits, x, ref_logits, start + lanes, lanes < head - start, row)
        x = next_x


@triton.jit(do_not_specialize=ANYTHING)
def rows_kernel(
    logits,  # [num_rows, vocab]
    ref_logits,  # the same or None
    dlogits,  # the same or None; any floating dtype
    labels,  # the rest as in csrc/rows.h
    kept_ids,
    step_advantages,
    step_ends,
    cu_seqlens,
    weights,
    old_logprobs,
    ref_logprobs,
    grad_logprobs,
    grad_lse,
    rows,
    logits_stride,
    ref_stride,
    dlogits_stride,
    num_rows,
    vocab,
    num_sequences,
    num_steps,
    num_kept,
    first_row,
    c: tl.float32,  # log2(e) / temperature
    c_error: tl.float64,  # exact c / c - 1: the relative error of rounding c to fp32
    inverse_temperature: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    kl_coef: tl.float64,
    MODE: tl.constexpr,  # policy_loss, logprobs, logprobs_backward
    CLIP_FORM: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a tile; the number of candidates if rows are filtered
    NUM_HELD: tl.constexpr,  # tiles that stay in registers
    FOLD: tl.constexpr,  # neighbours that one thread loads at once
):
    """Values per row, and the gradient if `dlogits` is given."""
    row = tl.program_id(0).to(tl.int64)
    planes = rows + row
    plane = tl.cast(num_rows, tl.int64)
    label = tl.load(labels + row)
    if dlogits is not None:
        dlogits += row * dlogits_stride
    if label == IGNORE:
        store_nothing(planes, plane)
        if dlogits is not None:
            _fill_zero(dlogits, vocab, BLOCK)
        return
    logits += row * logits_stride
    if ref_logits is not None:
        ref_logits += row * ref_stride

    # `columns`: columns of the first held tile; `head`: number of columns before it, which are streamed.
    lanes = tl.arange(0, BLOCK)
    is_column = (label >= 0) & (label < vocab)
    outside = 0.0
    head = 0
    if kept_ids is None:
        head = (tl.maximum(vocab - NUM_HELD * BLOCK, 0) + BLOCK - 1) // BLOCK * BLOCK
        columns = head + lanes
    else:  # the label first, so that it is always in its own support, then the rest of the support; `vocab` stands for padding
        kept = tl.load(kept_ids + row * num_kept + lanes - 1, mask=(lanes > 0) & (lanes <= num_kept), other=-1)
        outside = 1.0 - tl.max((kept == label).to(tl.float32), 0)
        is_column &= tl.max(kept, 0) < vocab
        columns = tl.where(lanes == 0, label, tl.where(kept == label, vocab, kept))
        columns = tl.where((columns < 0) | (columns > vocab), vocab, columns).to(tl.int32)
    held = None
    if (ref_logits is None) or (kept_ids is not None):  # two unfiltered rows at once leave no registers for held tiles
        held = _held_tiles(logits, columns, vocab, BLOCK, NUM_HELD)
    readable = tl.where(is_column, label, 0)  # a label that is not a column makes the row NaN: a kernel cannot raise
    x_label = tl.where(is_column, tl.load(logits + readable).to(tl.float32), float("nan"))
    if ref_logits is not None:
        ref_label = tl.load(ref_logits + readable).to(tl.float32)
    if MODE == "policy_loss":  # here, while the held tiles are being loaded
        sequence, step = step_of_row(row + first_row, cu_seqlens, step_ends, num_sequences, num_steps)
        advantage = tl.load(step_advantages + sequence * num_steps + step).to(tl.float64)
        weight = tl.load(weights + row).to(tl.float64)

    offset, total, dot, ref_offset, ref_total, gap = _row_sums(
        logits, ref_logits, held, columns, head, vocab, c, BLOCK, NUM_HELD, FOLD
    )

    logprob, log_total, mean, y_label = of_label(x_label, offset, total, dot, c, c_error)
    total = total.to(tl.float64)
    zero = tl.full([], 0.0, tl.float64)
    full_kl, label_log_ratio, log_ratio_of_totals = zero, zero, zero
    if ref_logits is not None:
        log_ratio_of_totals = log_total - tl.log2(ref_total.to(tl.float64))
        y_ref_label = ref_label.to(tl.float64) * tl.cast(c, tl.float64) - ref_offset
        full_kl = (gap / total - log_ratio_of_totals) * LN2
        label_log_ratio = (y_label - y_ref_label - log_ratio_of_totals) * LN2
    if MODE != "logprobs_backward":
        tl.store(planes + LOGPROB * plane, logprob.to(tl.float32))
        tl.store(planes + LSE * plane, ((offset + log_total + c_error * (offset + mean)) * LN2).to(tl.float32))

    # Gradient of the row: (label_coef onehot - softmax_coef p + kl_of_all p (log(p / q) - full_kl)) / temperature
    label_coef, softmax_coef, kl_of_all = zero, zero, zero
    if MODE == "policy_loss":
        entropy = (log_total - mean) * LN2
        clips = (clip_low, clip_high, dual_clip)
        label_coef = store_token(
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
            CLIP_FORM,
            KL_ESTIMATOR,
        )
        softmax_coef = label_coef
        if KL_ESTIMATOR == "full":
            kl_of_all = weight * kl_coef
    if MODE == "logprobs_backward":
        label_coef = tl.load(grad_logprobs + row).to(tl.float64)
        softmax_coef = label_coef - tl.load(grad_lse + row).to(tl.float64)
    if dlogits is not None:
        if kept_ids is not None:
            tl.debug_barrier()  # every thread has loaded its candidates before the row is overwritten
            _fill_zero(dlogits, vocab, BLOCK)
            tl.debug_barrier()
        if (label_coef != 0) | (softmax_coef != 0) | (kl_of_all != 0):
            scale = inverse_temperature / total
            at_label = (label_coef - softmax_coef) - softmax_coef * expm1(logprob)
            factor = -scale * softmax_coef
            per_gap = scale * kl_of_all * LN2
            if kl_of_all != 0:  # else the reference, whose KL may be infinite, must not enter
                p = tl.exp(logprob)
                at_label += tl.where(p > 0, kl_of_all * p * (label_log_ratio - full_kl), 0.0)
                factor -= per_gap * log_ratio_of_totals + scale * kl_of_all * full_kl
            at_label = (at_label * inverse_temperature).to(tl.float32)
            terms = (label.to(tl.int32), at_label, c, offset, ref_offset, factor.to(tl.float32), per_gap.to(tl.float32))
            if (KL_ESTIMATOR == "full") and (kl_of_all != 0):
                _write_gradient(logits, ref_logits, dlogits, held, columns, head, vocab, terms, BLOCK, NUM_HELD)
            else:
                _write_gradient(logits, None, dlogits, held, columns, head, vocab, terms, BLOCK, NUM_HELD)
        elif kept_ids is None:
            _fill_zero(dlogits, vocab, BLOCK)


@triton.jit
def scale_kernel(values, factor, stride, size, BLOCK: tl.constexpr):
    """values [rows, size] *= factor [1]; reads and writes no values if the factor is 1."""
    by = tl.load(factor).to(tl.float32)
    if by == 1:
        return
    values += tl.program_id(0).to(tl.int64) * stride
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(values + columns, mask=columns < size)
        tl.store(values + columns, (x.to(tl.float32) * by).to(x.dtype), mask=columns < size)
