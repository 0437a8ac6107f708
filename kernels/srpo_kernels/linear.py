"""The loss, and log-probabilities, from hidden states and the output head: logits exist for one chunk of rows at a time.

For one chunk of rows the logits are computed in fp32, the gradient of the loss is written over them, and the gradients of the
hidden states and of the head are accumulated from it before the next chunk begins. This takes three matrix products; an op that
returns log-probabilities needs a fourth, since its backward pass has to compute the logits again.

Shapes: T packed rows, H hidden size, V vocabulary, N sequences, J reasoning steps, K ids of a top-k filter.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from srpo_kernels import linear_exponentials, linear_operators, reference
from srpo_kernels.checks import check_filter, check_rows, check_segments
from srpo_kernels.dispatch import choose
from srpo_kernels.options import LossOptions, check_temperature
from srpo_kernels.segments import IGNORE, PolicyLoss, StepStats, Tables, compact, old_of_segments, scatter


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    step_advantages: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    *,
    options: LossOptions,
    top_k: int | None = None,
    kept_ids: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    chunk_rows: int | None = None,
    chunk_holds: Literal["logits", "exponentials"] = "logits",
    impl: str = "auto",
) -> PolicyLoss:
    """`srpo_kernels.policy_loss` of the logits hidden @ weight.T, of which only one chunk exists at a time.

    hidden [T, H] and weight [V, H], both fp32, bf16, fp16 or fp64. Gradient flows to these two alone, in their dtypes; an input
    that needs no gradient saves a matrix product. All other arguments as in `policy_loss`, except that the reference of the exact
    KL is given as ref_hidden [T, H'] and ref_weight [V, H'], without gradient. A `ratio_over` other than "token" computes the
    logits twice.

    chunk_rows: the largest number of rows whose logits exist at a time. None: 8192 on a GPU; on a CPU the number that has 256 MiB
        of fp32 logits; half of that with ref_hidden, whose logits exist at the same time. It changes memory and time, and results
        only by rounding.

    Logits are fp32 for inputs of 16 or 32 bits: products of two inputs are exact and summed in fp32. To this end a CPU converts
    bf16 and fp16 inputs to fp32, the weight once per call. A GPU rounds the gradient of the logits to the dtype of the inputs
    before the matrix product, as any backward pass in mixed precision does. The gradient of the weight is summed in fp32 and
    rounded once.

    Memory beyond inputs, outputs and gradients: the logits of one chunk (on a GPU also a copy in 16 bits) and, for a weight in 16
    bits, the fp32 sum of its gradient and on a CPU its fp32 copy. The forward pass computes the gradients and stores them for the
    backward pass; those of fp16 inputs are stored in fp32, since fp16 would flush small ones to 0 before the scale of a scaled
    loss is applied.

    Rows without a label are never read. Rows known to have no gradient (clipped, or advantage or weight 0; only with kl_coef 0)
    are left out of the products of the gradient; counting them synchronizes with the GPU once per chunk.

    chunk_holds: content of a chunk's buffer. "exponentials" needs bf16 inputs, a GPU and Triton (impl "auto" or "triton"), and
        supports neither a filter nor the exact KL. A Triton kernel writes E = exp(logits / temperature - the label's) in 16 bits
        in place of logits, and sums E in fp32 at the same time. Eq. 6 adds one number per row, which is multiplied into the
        hidden states: only the three products touch [chunk_rows, V], which has a third of the bytes. Loss, log-probabilities and
        stats are as exact; the gradient of the weight has one more rounding, that of hidden states times this number. Rows whose
        label has a probability below 2^-60 are computed again from logits; finding them synchronizes with the GPU once.

    impl: "reference" holds all logits. "auto" takes it for fp64 inputs, and if no other implementation is available. For bf16
        inputs on a GPU "auto" takes "triton", which writes the gradient of a chunk directly in 16 bits; "cuda" writes it in fp32
        over the logits and then copies it.

    Raises ValueError as `policy_loss` does, and for hidden states, weights or a chunk_rows that do not fit.
    """
    _check(hidden, weight, labels, top_k, kept_ids, chunk_rows)
    full = options.kl_estimator == "full"
    if chunk_holds != "logits":
        _check_exponentials(chunk_holds, hidden, impl, filtered=bool(top_k) or kept_ids is not None, full=full)
    check_segments(labels.shape[0], step_advantages, step_ends, cu_seqlens)
    check_rows(labels, weights=weights, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    if full:
        ref_logprobs = None
        _check_reference_head(ref_hidden, ref_weight, weight, labels)
    else:
        ref_hidden = ref_weight = None
    if options.kl_coef and ref_logprobs is None and ref_hidden is None:
        missing = "ref_hidden and ref_weight" if full else "ref_logprobs"
        raise ValueError(f"kl_coef is {options.kl_coef} but there is no reference: give {missing}, or set kl_coef to 0")
    narrow = hidden.is_cuda and hidden.dtype == torch.bfloat16
    name = choose("linear_policy_loss", impl, hidden.device, _math_dtype(hidden), narrow=narrow)
    if options.ratio_over != "token" and old_logprobs is not None:
        with torch.no_grad():
            softmax = {"temperature": options.temperature, "top_k": top_k, "kept_ids": kept_ids}
            logprobs = linear_token_logprobs(hidden, weight, labels, **softmax, chunk_rows=chunk_rows, impl=impl)[0]
        ends = step_ends if options.ratio_over == "step" else None
        old_logprobs = old_of_segments(logprobs, old_logprobs, labels, cu_seqlens, ends)
    if name == "reference":
        rows = (labels != IGNORE).nonzero()[:, 0]
        cu_seqlens, step_ends = compact(labels != IGNORE, cu_seqlens, step_ends)
        old, ref, kept = (None if table is None else table[rows] for table in (old_logprobs, ref_logprobs, kept_ids))
        ref_logits = None if ref_hidden is None or ref_weight is None else _logits(ref_hidden, ref_weight, rows)
        tables = Tables(labels[rows], step_advantages, step_ends, cu_seqlens, weights[rows], old, ref, kept, ref_logits)
        out = reference.policy_loss(_logits(hidden, weight, rows), tables, options, top_k)
        return out._replace(logprobs=scatter(out.logprobs, rows, labels.shape[0]))
    grad = torch.is_grad_enabled()
    loss, logprobs, sums, _, _ = linear_operators.policy_loss(
        hidden,
        weight,
        labels,
        step_advantages,
        step_ends,
        cu_seqlens,
        weights,
        old_logprobs,
        ref_logprobs,
        kept_ids,
        ref_hidden,
        ref_weight,
        options.packed,
        0 if kept_ids is not None else top_k or 0,
        chunk_rows or 0,
        chunk_holds == "exponentials",
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        name,
    )
    return PolicyLoss(loss, logprobs, StepStats.unstack(sums))


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    kept_ids: Tensor | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`srpo_kernels.token_logprobs` of the logits hidden @ weight.T, of which only one chunk exists at a time: (log-probabilities
    [T], log-sum-exp [T]), 0 for ignored rows, fp32 (fp64 for fp64 inputs), differentiable in hidden [T, H] and weight [V, H].

    The backward pass recomputes the logits of the rows whose gradient is not zero. It holds a chunk's gradient as well as its
    logits, so the default of `chunk_rows` is half as large there. Other arguments as in `linear_policy_loss`.
    """
    check_temperature(temperature)
    _check(hidden, weight, labels, top_k, kept_ids, chunk_rows)
    name = choose("linear_token_logprobs", impl, hidden.device, _math_dtype(hidden))
    if name == "reference":
        rows = (labels != IGNORE).nonzero()[:, 0]
        kept_ids = None if kept_ids is None else kept_ids[rows]
        logprobs, lse = reference.token_logprobs(
            _logits(hidden, weight, rows), labels[rows], temperature=temperature, top_k=top_k, kept_ids=kept_ids
        )
        return scatter(logprobs, rows, labels.shape[0]), scatter(lse, rows, labels.shape[0])
    filter_by = 0 if kept_ids is not None else top_k or 0
    return linear_operators.token_logprobs(hidden, weight, labels, kept_ids, temperature, filter_by, chunk_rows or 0, name)[:2]


def _logits(hidden: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Logits of the selected rows, all at once, in the dtype of the math; for the reference."""
    dtype = _math_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden[rows].to(dtype) @ weight.to(dtype).T


def _math_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the logits of these hidden states."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    top_k: int | None,
    kept_ids: Tensor | None,
    chunk_rows: int | None,
) -> None:
    _check_head(hidden, weight, labels, "")
    check_filter(labels, top_k, kept_ids)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}: give at least 1, or None for the default")


def _check_exponentials(chunk_holds: str, hidden: Tensor, impl: str, *, filtered: bool, full: bool) -> None:
    """Raises ValueError if a chunk cannot hold exponentials."""
    if chunk_holds != "exponentials":
        raise ValueError(f"chunk_holds {chunk_holds!r} is unknown: give logits or exponentials")
    reason = linear_exponentials.why_not(hidden)
    if impl not in ("auto", "triton"):
        reason = f"impl is {impl!r} and only 'triton' computes them"
    elif filtered:
        reason = "a filter (top_k, kept_ids) needs logits"
    elif full:
        reason = "kl_estimator 'full' needs the logits"
    if reason is not None:
        raise ValueError(f"chunk_holds 'exponentials' is unavailable because {reason}: leave it at 'logits'")


def _check_head(hidden: Tensor, weight: Tensor, labels: Tensor, prefix: str) -> None:
    """Raises ValueError if `hidden` and `weight` do not give logits for these labels. prefix: "ref_" for the reference's."""
    h, w = f"{prefix}hidden {tuple(hidden.shape)}", f"{prefix}weight {tuple(weight.shape)}"
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"{h} and labels {tuple(labels.shape)} do not fit: give [T, H] and [T]")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{h} and {w} do not fit: give [T, H] and [V, H], the head's weight as torch.nn.Linear has it")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"{h} is {hidden.dtype} and {w} is {weight.dtype}: bring both to one floating-point dtype")
    if len({hidden.device, weight.device, labels.device}) > 1:
        raise ValueError(f"{h} is on {hidden.device}, {w} on {weight.device}, labels on {labels.device}: bring all to one device")


def _check_reference_head(ref_hidden: Tensor | None, ref_weight: Tensor | None, weight: Tensor, labels: Tensor) -> None:
    if ref_hidden is None and ref_weight is None:
        return
    if ref_hidden is None or ref_weight is None:
        missing = "ref_hidden" if ref_hidden is None else "ref_weight"
        raise ValueError(f"kl_estimator 'full' needs both ref_hidden and ref_weight: give {missing}, too")
    _check_head(ref_hidden, ref_weight, labels, "ref_")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"ref_weight has {ref_weight.shape[0]} rows and weight {weight.shape[0]}: both must have V rows")
