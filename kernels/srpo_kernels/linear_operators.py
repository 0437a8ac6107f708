"""The torch operators behind `srpo_kernels.linear`: some rows at a time from hidden states to logits, to the gradient of the
logits in their place, and on to the gradients of hidden states and weight.

As in `operators` the gradient of the policy loss is formed by the forward pass; backward only hands it out.

Shapes: T packed rows, R of them with a label, C in one chunk, H hidden size, V vocabulary, J reasoning steps, K kept ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from srpo_kernels import operators, reference
from srpo_kernels.native import ROW_FIELDS
from srpo_kernels.segments import IGNORE, compact, step_of_row

CPU_CHUNK_BYTES = 2**28  # of fp32 matrices [C, V] at a time
GPU_CHUNK_ROWS = 8192  # enough for matrix products at full speed
_MOVES = 16  # blocks in which rows are moved within a chunk: their copy is that much smaller than the chunk


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
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float,
    clip_form: str,
    kl_coef: float,
    kl_estimator: str,
    temperature: float,
    top_k: int,
    chunk_rows: int,
    hidden_grad: bool,
    weight_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], logprobs [T], sums [6, J] fp64 as `StepStats.stack`, gradient [T, H], gradient [V, H]); [0, H] for a gradient
    that is not wanted. chunk_rows 0: the default; top_k 0: no filter but `kept_ids`."""
    backend, with_grad = operators.BACKENDS[impl], hidden_grad or weight_grad
    rows = (labels != IGNORE).nonzero()[:, 0]
    cu_seqlens, step_ends = compact(labels != IGNORE, cu_seqlens, step_ends)
    whole = {"cu_seqlens": cu_seqlens, "step_ends": step_ends, "step_advantages": step_advantages}
    by_row = {"labels": labels, "weights": weights, "kept_ids": kept_ids}
    by_row |= {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    settings = (clip_eps_low, clip_eps_high, dual_clip, clip_form, kl_coef, kl_estimator, temperature)
    options = operators.options_of({"ref_logprobs": ref_logprobs, "ref_logits": ref_hidden}, *settings)
    maybe = None  # [R] rows whose gradient may not be zero
    if with_grad and kl_coef == 0:
        sequence, step = step_of_row(cu_seqlens, step_ends, torch.arange(rows.shape[0], device=rows.device))
        maybe = (weights[rows] != 0) & (step_advantages[sequence, step] != 0)

    chunks = Chunks(hidden, weight, rows, chunk_rows, backend, matrices=1 if ref_hidden is None else 2)
    ref_chunks = None
    if ref_hidden is not None and ref_weight is not None:
        ref_chunks = Chunks(ref_hidden, ref_weight, rows, chunks.num_rows, backend)
    gradient = Gradient(chunks, hidden_grad, weight_grad, _stored)
    values = hidden.new_empty(len(ROW_FIELDS), rows.shape[0], dtype=torch.float32)
    for start, stop in chunks:
        own = rows[start:stop]
        x, logits = chunks.logits(start, stop)
        tables = {**whole, **{name: None if table is None else table[own] for name, table in by_row.items()}}
        tables["ref_logits"] = None if ref_chunks is None else ref_chunks.logits(start, stop)[1]
        if top_k:
            tables["kept_ids"] = reference.topk_support(logits, top_k)
        dlogits = logits if with_grad else None
        values[:, start:stop] = backend.rows("policy_loss", logits, dlogits, tables, {**options, "first_row": start})
        if with_grad:
            alive = None if maybe is None else maybe[start:stop]
            if alive is not None and clip_form == "ppo":
                alive &= values[ROW_FIELDS.index("clipped"), start:stop] == 0
            gradient.add(start, x, logits, alive)
    loss, logprobs, sums = operators.reduce_rows(values, step_ends.shape[1])
    return loss, spread(logprobs, rows, labels), sums, *gradient.finish()


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
    """(log-probabilities [T], log-sum-exp [T], both fp32, the top-k filter's support [T, K]: [T, 0] without `top_k`)."""
    rows = (labels != IGNORE).nonzero()[:, 0]
    values = hidden.new_zeros(2, labels.shape[0], dtype=torch.float32)
    support = labels.new_full((labels.shape[0], min(top_k, weight.shape[0])), -1)
    chunks = Chunks(hidden, weight, rows, chunk_rows, operators.BACKENDS[impl])
    for start, stop in chunks:
        own = rows[start:stop]
        _, logits = chunks.logits(start, stop)
        kept = None if kept_ids is None else kept_ids[own]
        if top_k:
            kept = support[own] = reference.topk_support(logits, top_k)
        found = operators.logprob_rows(impl, logits, labels[own], kept, temperature)
        values[:, own] = torch.stack(found)
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
    """(gradient [T, H], gradient [V, H]) of `linear_token_logprobs`; [0, H] where it is not wanted."""
    rows = ((labels != IGNORE) & ((grad_logprobs != 0) | (grad_lse != 0))).nonzero()[:, 0]
    chunks = Chunks(hidden, weight, rows, chunk_rows, operators.BACKENDS[impl], matrices=2)
    gradient = Gradient(chunks, hidden_grad, weight_grad, lambda dtype: dtype)
    for start, stop in chunks:
        own = rows[start:stop]
        x, logits = chunks.logits(start, stop)
        tables = (labels[own], None if kept_ids is None else kept_ids[own], temperature, grad_logprobs[own], grad_lse[own])
        gradient.add(start, x, operators.logprob_rows_backward(impl, logits, *tables))
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
    found = token_logprobs_backward(*ctx.saved_tensors, ctx.temperature, *grads, ctx.chunk_rows, *wanted, ctx.impl)
    return *(gradient if needed else None for gradient, needed in zip(found, wanted, strict=True)), *[None] * 6


torch.library.register_autograd("srpo::linear_token_logprobs", _recompute, setup_context=_save_inputs)


def default_rows(vocab: int, device: torch.device, matrices: int) -> int:
    """Rows of a chunk where `matrices` fp32 matrices [C, V] exist at once."""
    rows = CPU_CHUNK_BYTES // (4 * max(vocab, 1)) if device.type == "cpu" else GPU_CHUNK_ROWS
    return max(1, rows // matrices)


def factor_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor enters a product that comes out in fp32: a CPU multiplies bf16 and fp16 only into their own."""
    return torch.float32 if tensor.device.type == "cpu" or tensor.dtype == torch.float64 else tensor.dtype


def put_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False, scale: float = 1.0) -> None:
    """out = scale * a @ b, or out += that; `out` is fp32, and so is the sum whatever the dtype of the factors. Autocast leaves
    products with `out=` alone."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=float(add), alpha=scale, out=out)  # with beta 0 what is in `out` counts nothing, NaN included
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=float(add), alpha=scale, out=out)


def to_factor(dlogits: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(the gradient in the dtype of a factor, what to multiply its products by). fp16 would flush most of it to 0: it is moved,
    in place, by a power of two to the upper end of fp16's range. Waits for the device then."""
    scale = 1.0
    if dtype == torch.float16:
        largest = torch.linalg.vector_norm(dlogits, ord=math.inf).item()
        if 0 < largest < math.inf:
            scale = 2.0 ** min(15 - math.frexp(largest)[1], 100)
            dlogits.mul_(scale)
    return dlogits.to(dtype), 1 / scale


class Chunks:
    """Iterates over (start, stop): slices of the selected rows, as equal in length as can be. One buffer serves all of them.

    hidden [T, H]; weight [V, H]; rows [R] indices into T; num_rows: the most that a chunk may have, 0: the default.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, rows: Tensor, num_rows: int, backend: operators.Backend, *, matrices: int = 1
    ) -> None:
        self.hidden, self.weight, self.rows = hidden, weight, rows
        self.factor = weight.to(factor_dtype(weight))
        total, vocab = rows.shape[0], weight.shape[0]
        # A short last chunk would cost a whole pass over the gradient of the weight, and products of one to three rows are
        # rounded otherwise than larger ones.
        count = -(-total // (num_rows or default_rows(vocab, weight.device, matrices)))
        self.edges = [i * total // max(count, 1) for i in range(count + 1)]
        self.num_rows = max((stop - start for start, stop in self), default=0)
        self.buffer = backend.new_gradient(hidden.new_empty((), dtype=torch.float32).expand(self.num_rows, vocab))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.edges[:-1], self.edges[1:], strict=True)

    def logits(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(the hidden states as a factor [C, H], the logits [C, V] fp32: valid until the next call)."""
        x = self.hidden[self.rows[start:stop]].to(self.factor.dtype)
        logits = self.buffer[: stop - start]
        put_product(logits, x, self.factor.T)
        return x, logits


class Gradient:
    """Gathers the gradients of hidden states and weight, whichever are wanted, from that of the logits."""

    def __init__(self, chunks: Chunks, of_hidden: bool, of_weight: bool, stored: Callable[[torch.dtype], torch.dtype]) -> None:
        """`stored` gives the dtype of a gradient from that of its tensor."""
        hidden, weight = chunks.hidden, chunks.weight
        self.factor, self.rows, self.weight_dtype = chunks.factor, chunks.rows, stored(weight.dtype)
        num_rows = hidden.shape[0] if of_hidden else 0
        self.hidden = hidden.new_zeros(num_rows, hidden.shape[1], dtype=stored(hidden.dtype))
        self.weight = weight.new_empty(weight.shape if of_weight else (0, weight.shape[1]), dtype=torch.float32)
        self.of_hidden, self.of_weight, self.started = of_hidden, of_weight, False

    def add(self, start: int, x: Tensor, dlogits: Tensor, alive: Tensor | None = None) -> None:
        """Add what the gradient dlogits [C, V] of one chunk gives; it is lost. `alive` [C]: the other rows have none."""
        rows = self.rows[start : start + x.shape[0]]
        if alive is not None:
            order = move_up(dlogits, alive)
            dlogits, x, rows = dlogits[: order.shape[0]], x[order], rows[order]
        if not rows.shape[0]:
            return
        factor, scale = to_factor(dlogits, x.dtype)
        if self.of_weight:
            put_product(self.weight, factor.T, x, add=self.started, scale=scale)
            self.started = True
        if self.of_hidden:
            gradient = torch.empty_like(x, dtype=torch.float32)
            put_product(gradient, factor, self.factor, scale=scale)
            self.hidden.index_copy_(0, rows, gradient.to(self.hidden.dtype))

    def finish(self) -> tuple[Tensor, Tensor]:
        """(gradient of the hidden states [T, H], of the weight [V, H]); [0, H] where it was not wanted."""
        if self.of_weight and not self.started:
            self.weight.zero_()
        return self.hidden, self.weight.to(self.weight_dtype)


def move_up(matrix: Tensor, alive: Tensor) -> Tensor:
    """Brings the rows that are alive to the front, in place, by moving the last of them into the places of the others. Returns
    where each of them was, [number alive] int64. Waits for the device."""
    is_alive = alive.cpu()
    num_alive, num_rows = int(is_alive.sum()), alive.shape[0]
    order = torch.arange(num_alive)
    holes, movers = (~is_alive[:num_alive]).nonzero()[:, 0], is_alive[num_alive:].nonzero()[:, 0] + num_alive
    order[holes] = movers
    size = -(-num_rows // _MOVES)
    for to, source in zip(holes.to(matrix.device).split(size), movers.to(matrix.device).split(size), strict=True):
        matrix.index_copy_(0, to, matrix.index_select(0, source))
    return order.to(matrix.device)


def _stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient waits for the backward pass: fp16 is for the scaled loss, whose scale comes only then."""
    return torch.float32 if dtype == torch.float16 else dtype


def spread(values: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Values of the labelled rows put back among all, [T]; 0 where ignored."""
    return values.new_zeros(labels.shape[0]).index_copy(0, rows, values)
