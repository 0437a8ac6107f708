"""The ops as torch operators: `torch.ops.srpo.*` with fake implementations and autograd, so that torch.compile, activation
checkpointing and FSDP2 see opaque functions. A backend computes the rows; this module has the rest, once for all backends.

The forward pass of `policy_loss` computes the gradient: one token's gradient is a number times (onehot - softmax), and the number
follows from the log-probability that the forward pass has just computed. The backward pass returns the stored gradient.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from srpo_kernels.native import ROW_FIELDS
from srpo_kernels.options import LossOptions, without_loss
from srpo_kernels.segments import StepStats, Tables


class Backend(Protocol):
    """A module that computes rows. T rows, V vocabulary.

    In mode "policy_loss" `tables` has the tensors of `segments.Tables`, None if absent; the KL is 0 without a reference.
    first_row is the packed index of row 0, for labels, weights and log-probabilities that are a slice of a batch while
    step_advantages, step_ends and cu_seqlens cover the whole batch. Mode "logprobs" uses only labels and kept_ids, and of the
    options the temperature; "logprobs_backward" also uses grad_logprobs and grad_lse. `options.ratio_over` has already been
    applied to old_logprobs.
    """

    any_gradient_dtype: bool  # whether `dlogits` may have another dtype than the logits

    def why_not(self, logits: Tensor) -> str | None:
        """The reason why this backend cannot take these logits (device, dtype, missing compiler); None if it can."""
        ...

    def new_gradient(self, logits: Tensor) -> Tensor:
        """An empty tensor of the logits' shape, dtype and device, contiguous."""
        ...

    def rows(
        self,
        mode: str,
        logits: Tensor,
        dlogits: Tensor | None,
        tables: dict[str, Tensor | None],
        options: LossOptions,
        first_row: int = 0,
    ) -> Tensor:
        """Values per row, [len(ROW_FIELDS), T] fp32.

        policy_loss: all fields, `loss` multiplied by its weight; ignored rows have `step` -1 and 0 in all other fields. `dlogits`
        [T, V], which may be `logits` itself, is filled with the gradient of the sum of the losses; None: no gradient.
        logprobs: `logprob` and `lse`, 0 for ignored rows. logprobs_backward: no values, `dlogits` is filled.
        """
        ...

    def scaled(self, gradient: Tensor, factor: Tensor) -> Tensor:
        """`gradient` times `factor` []. The factor is nearly always 1, which costs nothing. May overwrite `gradient`."""
        ...


BACKENDS: dict[str, Backend] = {}


@torch.library.custom_op("srpo::policy_loss", mutates_args=())
def policy_loss(
    logits: Tensor,
    labels: Tensor,
    step_advantages: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    kept_ids: Tensor | None,
    ref_logits: Tensor | None,
    options: str,
    with_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], logprobs [T], sums [6, J] fp64 as `StepStats.stack`, gradient [T, V]; [0, V] without `with_grad`).

    options: `LossOptions.packed`.
    """
    tables = Tables(labels, step_advantages, step_ends, cu_seqlens, weights, old_logprobs, ref_logprobs, kept_ids, ref_logits)
    dlogits = BACKENDS[impl].new_gradient(logits) if with_grad else None
    results = _loss_rows(impl, logits, dlogits, tables, options)
    return *results, logits.new_empty(0, logits.shape[1]) if dlogits is None else dlogits


@torch.library.custom_op("srpo::policy_loss_", mutates_args=("logits",))
def policy_loss_(
    logits: Tensor,
    labels: Tensor,
    step_advantages: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    kept_ids: Tensor | None,
    ref_logits: Tensor | None,
    options: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `policy_loss`, with the gradient written over the logits."""
    tables = Tables(labels, step_advantages, step_ends, cu_seqlens, weights, old_logprobs, ref_logprobs, kept_ids, ref_logits)
    return _loss_rows(impl, logits, logits, tables, options)


def _loss_rows(impl: str, logits: Tensor, dlogits: Tensor | None, tables: Tables, options: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logprobs, sums by step); fills `dlogits`."""
    rows = BACKENDS[impl].rows("policy_loss", logits, dlogits, tables._asdict(), LossOptions.unpack(options))
    return reduce_rows(rows, tables.step_ends.shape[1])


def reduce_rows(rows: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logprobs, sums by step) of the values per row. The order of summation is the same on every run, on a GPU too."""
    row: dict[str, Tensor] = dict(zip(ROW_FIELDS, rows, strict=True))
    row["num_tokens"] = torch.ones_like(row["step"])
    fields = ("num_tokens", "clipped", "outside", "ratio", "kl", "entropy")  # the order of `StepStats`
    values = torch.stack([row[name] for name in fields])[:, None]  # [6, 1, T]
    own = row["step"] == torch.arange(num_steps, device=rows.device)[:, None]  # [J, T]
    sums = torch.where(own, values, 0).sum(2, dtype=torch.float64)
    return row["loss"].sum(dtype=torch.float64).float(), row["logprob"].clone(), sums


def fake_results(logits: Tensor, step_ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    fp32 = logits.new_empty((), dtype=torch.float32)
    sums = fp32.new_empty(len(StepStats.zeros(1).stack()), step_ends.shape[1], dtype=torch.float64)
    return fp32, fp32.new_empty(logits.shape[0]), sums


@policy_loss.register_fake
def _(logits: Tensor, labels: Tensor, step_advantages: Tensor, step_ends: Tensor, *args: Any) -> tuple[Tensor, ...]:
    with_grad = args[-2]
    gradient = (
        torch.empty_like(logits, memory_format=torch.contiguous_format) if with_grad else logits.new_empty(0, logits.shape[1])
    )
    return *fake_results(logits, step_ends), gradient


@policy_loss_.register_fake
def _(logits: Tensor, labels: Tensor, step_advantages: Tensor, step_ends: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return fake_results(logits, step_ends)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_inputs, ctx.impl = len(inputs), inputs[-1]
    ctx.set_materialize_grads(False)  # else autograd allocates zeros [T, V] as the gradient of the saved gradient
    ctx.save_for_backward(output[3])
    ctx.mark_non_differentiable(*output[1:])


def _hand_out(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (dlogits,) = ctx.saved_tensors
    return times(ctx.impl, dlogits, grad_loss), *[None] * (ctx.num_inputs - 1)


def times(impl: str, gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """The saved gradient times the gradient of the loss; an ordinary product while torch.compile is tracing."""
    traced = type(grad_loss) is not Tensor or torch.compiler.is_compiling()
    return gradient * grad_loss if traced else BACKENDS[impl].scaled(gradient, grad_loss)


torch.library.register_autograd("srpo::policy_loss", _hand_out, setup_context=_save_gradient)


class PolicyLossInPlace(torch.autograd.Function):
    """`policy_loss_` with autograd: `torch.library.register_autograd` refuses ops that mutate their inputs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Arguments and results of `policy_loss_`."""
        results = policy_loss_(logits, *args)
        ctx.num_inputs, ctx.impl = 1 + len(args), args[-1]
        ctx.save_for_backward(logits.detach())  # after the write: the tensor holds the gradient now
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits, and None for all other inputs."""
        return _hand_out(ctx, grad_loss)


def logprob_rows(impl: str, logits: Tensor, labels: Tensor, kept_ids: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities, log-sum-exp), each [T] fp32, 0 for ignored rows."""
    tables: dict[str, Tensor | None] = {"labels": labels, "kept_ids": kept_ids}
    rows = BACKENDS[impl].rows("logprobs", logits, None, tables, without_loss(temperature))
    return rows[ROW_FIELDS.index("logprob")].clone(), rows[ROW_FIELDS.index("lse")].clone()


def logprob_rows_backward(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    kept_ids: Tensor | None,
    temperature: float,
    grad_logprobs: Tensor,
    grad_lse: Tensor,
) -> Tensor:
    """Backward of `logprob_rows`: the gradient of the logits, [T, V]."""
    backend = BACKENDS[impl]
    dlogits = backend.new_gradient(logits)
    tables = {"labels": labels, "kept_ids": kept_ids, "grad_logprobs": grad_logprobs, "grad_lse": grad_lse}
    backend.rows("logprobs_backward", logits, dlogits, tables, without_loss(temperature))
    return dlogits


@torch.library.custom_op("srpo::token_logprobs", mutates_args=())
def token_logprobs(
    logits: Tensor, labels: Tensor, kept_ids: Tensor | None, temperature: float, impl: str
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, log-sum-exp), each [T] fp32."""
    return logprob_rows(impl, logits, labels, kept_ids, temperature)


@token_logprobs.register_fake
def _(logits: Tensor, labels: Tensor, kept_ids: Tensor | None, temperature: float, impl: str) -> tuple[Tensor, Tensor]:
    rows = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(rows)


@torch.library.custom_op("srpo::token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    kept_ids: Tensor | None,
    temperature: float,
    grad_logprobs: Tensor,
    grad_lse: Tensor,
    impl: str,
) -> Tensor:
    """Backward of `token_logprobs`: the gradient of the logits, [T, V]."""
    return logprob_rows_backward(impl, logits, labels, kept_ids, temperature, grad_logprobs, grad_lse)


@token_logprobs_backward.register_fake
def _(logits: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, kept_ids, ctx.temperature, ctx.impl = inputs
    ctx.save_for_backward(logits, labels, kept_ids)


def _recompute(ctx: Any, grad_logprobs: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels, kept_ids = ctx.saved_tensors
    dlogits = token_logprobs_backward(logits, labels, kept_ids, ctx.temperature, grad_logprobs, grad_lse, ctx.impl)
    return dlogits, None, None, None, None


torch.library.register_autograd("srpo::token_logprobs", _recompute, setup_context=_save_logits)
