"""Triton kernels of the loss from hidden states with exponentials in place of logits: linear_exponentials.py launches them.

`exponentials_kernel` computes the matrix product hidden @ weight.T and stores each tile as E = 2^(x c - k), c = log2(e) /
temperature, in the dtype of the factors, together with fp32 sums per row and the label's logit. k is an integer per row near the
label's x c, so that E is about 1 at the label and the row's total about 1 / p(label). bf16 has the exponent range of fp32, so
the row's maximum need not be known.

`finish_kernel` turns the sums into the values per row and the number v for which v E is the gradient of the logits. That gradient
is -g p, but g (1 - p) at the label, where E is overwritten accordingly: E[label] = -(1 - p) total. The gradient of the logits
therefore never exists; the gradients of hidden states and weight are v (E @ weight) and E.T @ (v hidden).
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# Annotations here are Triton's, not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from srpo_kernels.triton_tokens import LN2, LOGPROB, LSE, expm1, of_label, step_of_row, store_nothing, store_token

FARTHEST = tl.constexpr(2.0**60)  # total of a row, or its inverse, up to which E and v lose nothing in bf16 and fp32
GROUP = tl.constexpr(8)  # tiles of rows that share the tiles of the weight in the L2 cache
# Arguments that may differ from call to call without a new compilation: all except the layout of a row.
PRODUCT_ANYTHING = ("labels", "offsets", "sums", "label_logits", "num_rows")
FINISH_ANYTHING = (
    *("sums", "label_logits", "offsets", "scales", "labels", "step_advantages", "step_ends", "cu_seqlens", "weights"),
    *("old_logprobs", "ref_logprobs", "rows", "num_tiles", "num_rows", "num_sequences", "num_steps", "first_row"),
)


@triton.jit
def _tile_of_program(num_rows, vocab, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(tile of rows, tile of columns). Programs take GROUP tiles of rows for one tile of columns before the next columns."""
    program = tl.program_id(0)
    height, width = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(vocab, BLOCK_N)
    first = program // (GROUP * width) * GROUP
    members = tl.minimum(height - first, GROUP)
    within = program % (GROUP * width)
    return first + within % members, within // members


@triton.jit(do_not_specialize=PRODUCT_ANYTHING)
def exponentials_kernel(
    hidden,  # [num_rows, size]
    weight,  # [vocab, size]
    exponentials,  # [num_rows, vocab]; None: no gradient is needed
    labels,  # [num_rows] int64
    offsets,  # [num_rows] fp32: k
    sums,  # [2, num_rows, number of tiles of columns] fp32: of E, of E log2 E
    label_logits,  # [num_rows] fp32; not written if the label is not a column
    hidden_stride,
    weight_stride,
    exponentials_stride,
    num_rows,
    vocab,
    size,
    c: tl.float32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # size is a multiple of BLOCK_K
):
    """One tile of E."""
    tile_m, tile_n = _tile_of_program(num_rows, vocab, BLOCK_M, BLOCK_N)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Beyond the edges the last row and the last column are loaded again; masks below exclude them.
    x_rows, w_rows = tl.minimum(rows, num_rows - 1).to(tl.int64), tl.minimum(columns, vocab - 1).to(tl.int64)
    x_tile = hidden + x_rows[:, None] * hidden_stride + ks[None, :]
    w_tile = weight + w_rows[None, :] * weight_stride + ks[:, None]
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, size, BLOCK_K):
        if WHOLE:
            x, w = tl.load(x_tile), tl.load(w_tile)
        else:
            x = tl.load(x_tile, mask=ks[None, :] < size - start, other=0.0)
            w = tl.load(w_tile, mask=ks[:, None] < size - start, other=0.0)
        logits = tl.dot(x, w, logits)
        x_tile += BLOCK_K
        w_tile += BLOCK_K

    is_row, is_column = rows < num_rows, columns < vocab
    row, plane = rows.to(tl.int64), tl.cast(num_rows, tl.int64)
    label = tl.load(labels + row, mask=is_row, other=-1) - tile_n * BLOCK_N
    is_here = (label >= 0) & (label < BLOCK_N)
    at_label = tl.arange(0, BLOCK_N)[None, :] == tl.where(is_here, label, -1).to(tl.int32)[:, None]
    tl.store(label_logits + row, tl.sum(tl.where(at_label, logits, 0.0), 1), mask=is_row & is_here)

    y = tl.fma(logits, c, -tl.load(offsets + row, mask=is_row, other=0.0)[:, None])
    e = tl.where(is_column[None, :], tl.exp2(y), 0.0)
    e_y = e * tl.maximum(y, -150.0)  # 2^-150 is 0 in fp32, and 0 * -inf is not
    own = sums + row * tl.cdiv(vocab, BLOCK_N) + tile_n
    tl.store(own, tl.sum(e, 1), mask=is_row)
    tl.store(own + plane * tl.cdiv(vocab, BLOCK_N), tl.sum(e_y, 1), mask=is_row)
    if exponentials is not None:
        place = exponentials + row[:, None] * exponentials_stride + columns[None, :]
        tl.store(place, e.to(exponentials.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _sum(values, count, BLOCK: tl.constexpr):
    """Sum of `count` fp32 values, in fp64."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        places = start + tl.arange(0, BLOCK)
        total += tl.load(values + places, mask=places < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=FINISH_ANYTHING)
def finish_kernel(
    exponentials,  # [num_rows, vocab] or None
    sums,  # [2, num_rows, num_tiles]
    label_logits,  # [num_rows]
    offsets,  # [num_rows]
    scales,  # [num_rows] fp32: v
    labels,  # the rest as in csrc/rows.h
    step_advantages,
    step_ends,
    cu_seqlens,
    weights,
    old_logprobs,
    ref_logprobs,
    rows,
    exponentials_stride,
    num_tiles,
    num_rows,
    vocab,
    num_sequences,
    num_steps,
    first_row,
    c: tl.float32,
    c_error: tl.float64,
    inverse_temperature: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    kl_coef: tl.float64,
    CLIP_FORM: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values of one row, and its v. A row whose total is beyond FARTHEST gets the values of an ignored row, and E = 0."""
    row = tl.program_id(0).to(tl.int64)
    planes, plane = rows + row, tl.cast(num_rows, tl.int64)
    if exponentials is not None:
        exponentials += row * exponentials_stride
    own = sums + row * num_tiles
    total, dot = _sum(own, num_tiles, BLOCK), _sum(own + plane * num_tiles, num_tiles, BLOCK)
    label = tl.load(labels + row)
    is_near = (total <= FARTHEST) & (total >= 1.0 / FARTHEST)  # both are false for NaN
    if (label < 0) | (label >= vocab) | (is_near == 0):
        store_nothing(planes, plane)
        tl.store(scales + row, 0.0)
        if exponentials is not None:
            for start in range(0, vocab, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                zeros = tl.zeros([BLOCK], exponentials.dtype.element_ty)
                tl.store(exponentials + columns, zeros, mask=columns < vocab)
        return

    offset = tl.load(offsets + row)
    logprob, log_total, mean, _ = of_label(tl.load(label_logits + row), offset, total, dot, c, c_error)
    sequence, step = step_of_row(row + first_row, cu_seqlens, step_ends, num_sequences, num_steps)
    tl.store(planes + LOGPROB * plane, logprob.to(tl.float32))
    tl.store(planes + LSE * plane, ((offset + log_total + c_error * (offset + mean)) * LN2).to(tl.float32))
    coef = store_token(
        planes,
        plane,
        row,
        logprob,
        (log_total - mean) * LN2,
        tl.full([], 0.0, tl.float64),
        0.0,
        tl.load(step_advantages + sequence * num_steps + step).to(tl.float64),
        tl.load(weights + row).to(tl.float64),
        step,
        old_logprobs,
        ref_logprobs,
        (clip_low, clip_high, dual_clip),
        kl_coef,
        CLIP_FORM,
        KL_ESTIMATOR,
    )
    tl.store(scales + row, (-coef * inverse_temperature / total).to(tl.float32))
    if exponentials is not None:
        tl.store(exponentials + label, (expm1(logprob) * total).to(tl.float32).to(exponentials.dtype.element_ty))
