"""The torch operators of `srpo_kernels.linear`. Chunk by chunk, hidden states give logits, the gradient of the loss overwrites
the logits, and from it follow the gradients of hidden states and weight.

As in `operators`, the forward pass of the policy loss computes the gradients, and the backward pass returns the stored ones.

Shapes: T packed rows, R of them with a label, C in one chunk, H hidden size, V vocabulary, J reasoning steps, K kept ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srpo_kernels import linear_exponentials, operators
from srpo_kernels.linear_chunks import Chunks, Gradient, as_factor, gradient_dtype
from srpo_kernels.native import ROW_FIELDS
from srpo_kernels.options import LossOptions
from srpo_kernels.segments import IGNORE, compact, scatter, step_of_row
from srpo_kernels.support import topk_support


@torch.library.custom_op("srpo::linear_policy_loss", mutates_args=())
def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    step_advantages: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    kept_ids: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    options: str,
    top_k: int,
    chunk_rows: int,
    exponentials: bool,
    hidden_grad: bool,
    weight_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], logprobs [T], sums [6, J] fp64 as `StepStats.stack`, gradient [T, H], gradient [V, H]); [0, H] for a gradient
    that is not needed. options: `LossOptions.packed`; top_k 0: no filter except `kept_ids`; chunk_rows 0: the default;
    exponentials: a chunk holds exponentials in place of logits."""
    backend, with_grad = operators.BACKENDS[impl], hidden_grad or weight_grad
    by_row = {"labels": labels, "weights": weights, "kept_ids": kept_ids}
    by_row |= {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    settings = LossOptions.unpack(options)
    factor = as_factor(weight)
    gradient = Gradient(hidden, weight, factor, hidden_grad, weight_grad, _stored)

    def take(rows: Tensor, exponentials: bool) -> Tensor:
        """Values of these rows [R], [len(ROW_FIELDS), R]. Adds their gradients to `gradient`."""
        edges, ends = compact(torch.zeros_like(labels, dtype=torch.bool).index_fill(0, rows, True), cu_seqlens, step_ends)
        per_sequence = {"cu_seqlens": edges, "step_ends": ends, "step_advantages": step_advantages}
        has_gradient = None  # [R] bool: the row's gradient may differ from zero; None: every row's may
        if with_grad and settings.kl_coef == 0:
            sequence, step = step_of_row(edges, ends, torch.arange(rows.shape[0], device=rows.device))
            has_gradient = (weights[rows] != 0) & (step_advantages[sequence, step] != 0)
        holds, dtype = torch.float32, gradient_dtype(factor, backend)
        if exponentials:
            holds = factor.dtype if with_grad else None
        beside = dtype if with_grad and not exponentials and dtype != holds else None
        matrices = 1 if ref_hidden is None else 2
        chunks = Chunks(hidden, factor, rows, chunk_rows, backend, matrices=matrices, holds=holds, gradient=beside)
        ref_chunks = None
        if ref_hidden is not None and ref_weight is not None:
            ref_chunks = Chunks(ref_hidden, as_factor(ref_weight), rows, chunks.num_rows, backend)
        values = hidden.new_empty(len(ROW_FIELDS), rows.shape[0], dtype=torch.float32)
        for start, stop in chunks:
            own = rows[start:stop]
            tables = {**per_sequence, **{name: None if table is None else table[own] for name, table in by_row.items()}}
            matrix = chunks.gradient(start, stop) if with_grad else None
            if exponentials:
                x = chunks.hidden_rows(start, stop)
                values[:, start:stop], scales = linear_exponentials.rows(x, factor, matrix, tables, settings, start)
            else:
                x, logits = chunks.logits(start, stop)
                tables["ref_logits"] = None if ref_chunks is None else ref_chunks.logits(start, stop)[1]
                if top_k:
                    tables["kept_ids"] = topk_support(logits, top_k)
                values[:, start:stop] = backend.rows("policy_loss", logits, matrix, tables, settings, start)
                scales = None
            if matrix is not None:
                alive = None if has_gradient is None else has_gradient[start:stop]
                if alive is not None and settings.clip_form == "ppo":
                    alive &= values[ROW_FIELDS.index("clipped"), start:stop] == 0
                gradient.add(own, x, matrix, alive, scales)
        return values

    rows = (labels != IGNORE).nonzero()[:, 0]
    values = take(rows, exponentials)
    if exponentials:
        far = (values[ROW_FIELDS.index("step")] < 0).nonzero()[:, 0]  # rows that need logits; synchronizes
        if far.shape[0]:
            values[:, far] = take(rows[far], False)
    loss, logprobs, sums = operators.reduce_rows(values, step_ends.shape[1])
    return loss, scatter(logprobs, rows, labels.shape[0]), sums, *gradient.finish()


@policy_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, step_advantages: Tensor, step_ends: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    hidden_grad, weight_grad = args[-3:-1]
    gradients = (
        tensor.new_empty(tensor.shape if wanted else (0, tensor.shape[1]), dtype=_stored(tensor.dtype))
        for tensor, wanted in ((hidden, hidden_grad), (weight, weight_grad))
    )
    return *operators.fake_results(hidden, step_ends), *gradients


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_inputs, ctx.dtypes, ctx.impl = len(inputs), (inputs[0].dtype, inputs[1].dtype), inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])


def _hand_out(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = (
        operators.times(ctx.impl, gradient, grad_loss).to(dtype) if wanted else None
        for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    )
    return *gradients, *[None] * (ctx.num_inputs - 2)


torch.library.register_autograd("srpo::linear_policy_loss", _hand_out, setup_context=_save_gradients)


@torch.library.custom_op("srpo::linear_token_logprobs", mutates_args=())
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    kept_ids: Tensor | None,
    temperature: float,
    top_k: int,
    chunk_rows: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities [T], log-sum-exp [T], the top-k filter's support [T, K]). The first two are fp32; the support is [T, 0]
    without `top_k`."""
    rows = (labels != IGNORE).nonzero()[:, 0]
    values = hidden.new_zeros(2, labels.shape[0], dtype=torch.float32)
    support = labels.new_full((labels.shape[0], min(top_k, weight.shape[0])), -1)
    chunks = Chunks(hidden, as_factor(weight), rows, chunk_rows, operators.BACKENDS[impl])
    for start, stop in chunks:
        own = rows[start:stop]
        _, logits = chunks.logits(start, stop)
        kept = None if kept_ids is None else kept_ids[own]
        if top_k:
            kept = support[own] = topk_support(logits, top_k)
        values[:, own] = torch.stack(operators.logprob_rows(impl, logits, labels[own], kept, temperature))
    return values[0].clone(), values[1].clone(), support


@token_logprobs.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, kept_ids: Tensor | None, temperature: float, top_k: int, *args: Any) -> Any:
    rows = hidden.new_empty(labels.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(rows), labels.new_empty(labels.shape[0], min(top_k, weight.shape[0]))


@torch.library.custom_op("srpo::linear_token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    kept_ids: Tensor | None,
    temperature: float,
    grad_logprobs: Tensor,
    grad_lse: Tensor,
    chunk_rows: int,
    hidden_grad: bool,
    weight_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Backward of `linear_token_logprobs`: (gradient [T, H], gradient [V, H]); [0, H] for a gradient that is not needed."""
    rows = ((labels != IGNORE) & ((grad_logprobs != 0) | (grad_lse != 0))).nonzero()[:, 0]
    factor = as_factor(weight)
    chunks = Chunks(hidden, factor, rows, chunk_rows, operators.BACKENDS[impl], matrices=2)
    gradient = Gradient(hidden, weight, factor, hidden_grad, weight_grad, lambda dtype: dtype)
    for start, stop in chunks:
        own = rows[start:stop]
        x, logits = chunks.logits(start, stop)
        tables = (labels[own], None if kept_ids is None else kept_ids[own], temperature, grad_logprobs[own], grad_lse[own])
        gradient.add(own, x, operators.logprob_rows_backward(impl, logits, *tables))
    return gradient.finish()


@token_logprobs_backward.register_fake
def _(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shapes = (t.shape if wanted else (0, t.shape[1]) for t, wanted in zip((hidden, weight), args[-3:-1], strict=True))
    return hidden.new_empty(next(shapes)), weight.new_empty(next(shapes))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, kept_ids, ctx.temperature, top_k, ctx.chunk_rows, ctx.impl = inputs
    ctx.save_for_backward(hidden, weight, labels, output[2] if top_k else kept_ids)
    ctx.mark_non_differentiable(output[2])


def _recompute(ctx: Any, grad_logprobs: Tensor, grad_lse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:2]
    grads = (grad_logprobs, grad_lse)
    gradients = token_logprobs_backward(*ctx.saved_tensors, ctx.temperature, *grads, ctx.chunk_rows, *wanted, ctx.impl)
    return *(gradient if needed else None for gradient, needed in zip(gradients, wanted, strict=True)), *[None] * 6


torch.library.register_autograd("srpo::linear_token_logprobs", _recompute, setup_context=_save_inputs)


def _stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient is stored until the backward pass: fp32 for fp16, since a loss scale is applied only then."""
    return torch.float32 if dtype == torch.float16 else dtype
