"""The loss, and log-probabilities, from hidden states and the output head: logits exist for some rows at a time.

Of one chunk of rows the logits are made in fp32, the gradient of the loss is written over them, and both are gone into the
gradients of the hidden states and of the head before the next chunk begins. Three matrix products in all, where an op that
returns log-probabilities needs a fourth, since its backward has to make the logits again.

Shapes: T packed rows, H hidden size, V vocabulary, N sequences, J reasoning steps, K ids of a top-k filter.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from srpo_kernels import linear_exponentials, linear_operators, reference
from srpo_kernels.checks import check_options, check_rows, check_segments, check_softmax
from srpo_kernels.dispatch import choose
from srpo_kernels.linear_operators import spread
from srpo_kernels.segments import IGNORE, PolicyLoss, StepStats, compact, old_of_segments


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
    clip_eps_low: float,
    clip_eps_high: float,
    kl_coef: float,
    kl_estimator: Literal["k1", "k2", "k3", "full"],
    temperature: float,
    top_k: int | None = None,
    kept_ids: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    dual_clip: float | None = None,
    clip_form: Literal["ppo", "cispo"] = "ppo",
    ratio_over: Literal["token", "step", "sequence"] = "token",
    chunk_rows: int | None = None,
    chunk_holds: Literal["logits", "exponentials"] = "logits",
    impl: str = "auto",
) -> PolicyLoss:
    """`srpo_kernels.policy_loss` of the logits hidden @ weight.T, which never exist as a whole.

    hidden [T, H] and weight [V, H], both fp32, bf16, fp16 or fp64. Gradient flows to them alone, in their dtypes; one that needs
    none saves its matrix product. All else as in `policy_loss`, but that the reference of the exact KL comes as
    ref_hidden [T, H'] and ref_weight [V, H'], without gradient. A `ratio_over` other than "token" makes the logits twice.

    chunk_rows: the most rows whose logits exist at a time. None: 8192 on a GPU, on a CPU as many as have 256 MiB of fp32 logits;
        half of that with ref_hidden, whose logits lie beside. It changes memory and time, and results by rounding alone.

    Logits are fp32 whatever the dtype of the inputs: their products are exact and summed in fp32. For that a CPU brings bf16 and
    fp16 inputs to fp32, the weight once per call. A GPU rounds the gradient of the logits to the dtype of the inputs before it
    enters a product, as any backward pass in mixed precision does. The gradient of the weight is summed in fp32, rounded once.

    Memory beyond inputs, outputs and gradients: the logits of one chunk (on a GPU also a copy in 16 bits) and, for a weight in 16
    bits, its gradient's sum and on a CPU its copy, in fp32. The gradients are made in the forward pass and wait for the backward
    pass; those of fp16 inputs wait in fp32, so that the scale of a scaled loss still reaches what fp16 would have flushed to 0.

    Rows without a label are never read. Rows that surely have no gradient (clipped, or advantage or weight 0; only with kl_coef
    0) are left out of the products of the gradient; to count them, a GPU is waited for once per chunk.

    chunk_holds: what exists of a chunk. "exponentials" needs bf16 inputs, a GPU and Triton (impl "auto" or "triton"), and takes
        neither a filter nor the exact KL. A kernel of our own writes E = exp(logits / temperature - the label's) in 16 bits in
        place of logits, and sums it in fp32 on the way. What Eq. 6 adds is one number per row, which goes to the side of the
        hidden states: nothing but the three products touches [chunk_rows, V], which has a third of the bytes. Loss,
        log-probabilities and stats are as exact; the gradient of the weight is rounded once more, where the number per row enters
        its product. Rows whose label has a probability below 2^-60 are taken again by way of logits; to know of them a GPU is
        waited for, once.

    impl: "reference" holds all logits. "auto" takes it for fp64 inputs, and where there is no other implementation. For bf16
        inputs on a GPU it takes "triton", which writes the gradient of a chunk in 16 bits at once; "cuda" writes it in fp32,
        over the logits, and a copy is made.

    Raises ValueError as `policy_loss` does, and for hidden states, weights or a chunk_rows that do not fit.
    """
    _check(hidden, weight, labels, temperature, top_k, kept_ids, chunk_rows)
    if chunk_holds != "logits":
        _check_exponentials(chunk_holds, hidden, impl, filtered=bool(top_k) or kept_ids is not None, full=kl_estimator == "full")
    check_segments(labels.shape[0], step_advantages, step_ends, cu_seqlens)
    check_rows(labels, weights=weights, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    check_options(clip_eps_low, clip_eps_high, dual_clip, clip_form, kl_estimator, ratio_over)
    if kl_estimator == "full":
        ref_logprobs = None
        _check_reference_head(ref_hidden, ref_weight, weight, labels)
    else:
        ref_hidden = ref_weight = None
    if kl_coef and ref_logprobs is None and ref_hidden is None:
        wanted = "ref_hidden and ref_weight" if kl_estimator == "full" else "ref_logprobs"
        raise ValueError(f"kl_coef is {kl_coef} but there is no reference: give {wanted}, or set kl_coef to 0")
    narrow = hidden.is_cuda and hidden.dtype == torch.bfloat16
    name = choose("linear_policy_loss", impl, hidden.device, _math_dtype(hidden), narrow=narrow)
    if ratio_over != "token" and old_logprobs is not None:
        with torch.no_grad():
            options = {"temperature": temperature, "top_k": top_k, "kept_ids": kept_ids, "chunk_rows": chunk_rows}
            logprobs = linear_token_logprobs(hidden, weight, labels, **options, impl=impl)[0]
        old_logprobs = old_of_segments(logprobs, old_logprobs, labels, cu_seqlens, step_ends if ratio_over == "step" else None)
    if name == "reference":
        rows = (labels != IGNORE).nonzero()[:, 0]
        cu_seqlens, step_ends = compact(labels != IGNORE, cu_seqlens, step_ends)
        out = reference.policy_loss(
            _logits(hidden, weight, rows),
            labels[rows],
            step_advantages,
            step_ends,
            cu_seqlens,
            weights[rows],
            None if old_logprobs is None else old_logprobs[rows],
            None if ref_logprobs is None else ref_logprobs[rows],
            clip_eps_low=clip_eps_low,
            clip_eps_high=clip_eps_high,
            dual_clip=dual_clip,
            clip_form=clip_form,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            temperature=temperature,
            top_k=top_k,
            kept_ids=None if kept_ids is None else kept_ids[rows],
            ref_logits=None if ref_hidden is None or ref_weight is None else _logits(ref_hidden, ref_weight, rows),
        )
        return out._replace(logprobs=spread(out.logprobs, rows, labels))
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
        clip_eps_low,
        clip_eps_high,
        dual_clip or math.inf,
        clip_form,
        kl_coef,
        kl_estimator,
        temperature,
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
    """`srpo_kernels.token_logprobs` of the logits hidden @ weight.T, which never exist as a whole: (log-probabilities [T],
    log-sum-exp [T]), 0 where ignored, fp32 (fp64 for fp64 inputs), differentiable in hidden [T, H] and weight [V, H].

    The backward pass makes the logits again, of those rows alone whose gradient is not zero; it holds a chunk's gradient beside
    the chunk's logits, so that the default of `chunk_rows` is half as large there. All else as in `linear_policy_loss`.
    """
    _check(hidden, weight, labels, temperature, top_k, kept_ids, chunk_rows)
    name = choose("linear_token_logprobs", impl, hidden.device, _math_dtype(hidden))
    if name == "reference":
        rows = (labels != IGNORE).nonzero()[:, 0]
        kept_ids = None if kept_ids is None else kept_ids[rows]
        found = reference.token_logprobs(
            _logits(hidden, weight, rows), labels[rows], temperature=temperature, top_k=top_k, kept_ids=kept_ids
        )
        return spread(found[0], rows, labels), spread(found[1], rows, labels)
    filter_by = 0 if kept_ids is not None else top_k or 0
    return linear_operators.token_logprobs(hidden, weight, labels, kept_ids, temperature, filter_by, chunk_rows or 0, name)[:2]


def _logits(hidden: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Logits of the selected rows, all at once, in the dtype of the math: the reference's way."""
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
    temperature: float,
    top_k: int | None,
    kept_ids: Tensor | None,
    chunk_rows: int | None,
) -> None:
    _check_head(hidden, weight, labels, "")
    check_softmax(labels, temperature, top_k, kept_ids)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}: give at least 1, or None for the default")


def _check_exponentials(chunk_holds: str, hidden: Tensor, impl: str, *, filtered: bool, full: bool) -> None:
    """Raises ValueError where a chunk cannot hold exponentials."""
    if chunk_holds != "exponentials":
        raise ValueError(f"chunk_holds {chunk_holds!r} is unknown: give logits or exponentials")
    reason = linear_exponentials.why_not(hidden)
    if impl not in ("auto", "triton"):
        reason = f"impl is {impl!r} and only 'triton' makes them"
    elif filtered:
        reason = "a filter (top_k, kept_ids) gathers logits"
    elif full:
        reason = "kl_estimator 'full' needs the logits"
    if reason is not None:
        raise ValueError(f"chunk_holds 'exponentials' cannot be, since {reason}: leave it at 'logits'")


def _check_head(hidden: Tensor, weight: Tensor, labels: Tensor, prefix: str) -> None:
    """Raises ValueError where `hidden` and `weight`, or those of the reference, are no factors of logits for these labels."""
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
        raise ValueError(f"the exact KL needs ref_hidden and ref_weight: give {missing}, too")
    _check_head(ref_hidden, ref_weight, labels, "ref_")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"ref_weight has {ref_weight.shape[0]} rows and weight {weight.shape[0]}: give as many, V")
