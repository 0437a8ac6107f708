"""Forward of a layer of experts, registered with transformers: `grouped_mm` (default), `loop` (the reference), `megablocks`.

Each implementation takes the experts module, hidden [T, H], the chosen experts [T, K] and their weights [T, K], and returns
[T, H]. No token is dropped. The module says how its experts compute, by transformers' `use_experts_implementation`: gate_up_proj
[E, 2I, H] or, without a gate, up_proj [E, I, H]; down_proj [E, H, I]; whether these are transposed and have biases; its gate.
Letters: T tokens, H hidden, E experts, K experts per token, S = T * K (token, expert) pairs, I intermediate.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from srpo.core.errors import MissingPackage, UserError

IMPLEMENTATIONS = ("grouped_mm", "loop", "megablocks")
_STRIDE_BYTES = 16  # the strides of what torch's grouped kernel multiplies on a GPU are multiples of it

# (x [S, in] sorted by expert, weight [E, out, in], rows of each expert [E]) -> [S, out]
GroupedMatmul = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def loop_experts(module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """The reference: applies one expert after the other, each to the tokens that are routed to it."""
    out, up = torch.zeros_like(hidden), _up(module)
    for e in range(module.num_experts):
        token, slot = (top_k_index == e).nonzero(as_tuple=True)
        inner = F.linear(hidden[token], _weight(module, up)[e], _bias(module, up, e))
        term = F.linear(_activation(module, inner), _weight(module, "down_proj")[e], _bias(module, "down_proj", e))
        term = term * top_k_weights[token, slot, None]
        out = out.index_add(0, token, term.to(out.dtype))
    return out


def permuted_experts(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, matmul: GroupedMatmul
) -> torch.Tensor:
    """Sort the pairs by expert, apply two grouped products, restore the order of tokens. Deterministic: no atomic additions."""
    num_slots = top_k_index.shape[1]
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)  # [S] number of the pair at each sorted row
    inverse = torch.empty_like(order).index_copy_(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.zeros(module.num_experts, dtype=torch.int64, device=flat.device).index_add_(0, flat, torch.ones_like(flat))
    x = _Rows.apply(hidden, order, inverse, num_slots)
    expert = flat[order] if module.has_bias else None  # [S]; only biases need it
    up = _up(module)
    inner = matmul(x, _weight(module, up), counts)
    inner = _activation(module, inner if expert is None else inner + _bias(module, up, expert))
    y = matmul(inner, _weight(module, "down_proj"), counts)
    y = y if expert is None else y + _bias(module, "down_proj", expert)
    y = _Rows.apply(y, inverse, order, 1).view(-1, num_slots, hidden.shape[1])
    return (y * top_k_weights[:, :, None]).sum(1).to(hidden.dtype)


def _up(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _weight(module: Any, name: str) -> torch.Tensor:
    """[E, out, in]."""
    weight = getattr(module, name)
    return weight.transpose(1, 2) if module.is_transposed else weight


def _bias(module: Any, name: str, expert: int | torch.Tensor) -> Any:
    """Bias [out] of one expert or [S, out] of the experts [S]; None if the experts have none."""
    return getattr(module, f"{name}_bias")[expert] if module.has_bias else None


def _activation(module: Any, inner: torch.Tensor) -> torch.Tensor:
    """The module's own gate, which may clamp, scale or interleave; without a gate, its activation."""
    return module._apply_gate(inner) if module.has_gate else module.act_fn(inner)


class _Rows(torch.autograd.Function):
    """x[order // repeat], where `order` permutes x's rows, each repeated `repeat` times. The gradient, too, is a gather."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, repeat: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.repeat = repeat
        return x.index_select(0, order if repeat == 1 else order // repeat)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        return grad if ctx.repeat == 1 else grad.view(-1, ctx.repeat, grad.shape[1]).sum(1), None, None, None


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """A `GroupedMatmul`: torch's grouped kernel on CUDA, one product per expert elsewhere.

    On a CPU, products of contiguous slices take about 2/3 of the time of torch's grouped_mm, forward and backward.
    Raises UserError for sizes that the kernel cannot compute.
    """
    if x.is_cuda:
        return kernel_matmul(x, weight, counts, unwritten=_leaves_unwritten(x.device))
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts.tolist()), weight.unbind(), strict=True)])


def kernel_matmul(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, *, unwritten: bool) -> torch.Tensor:
    """A `GroupedMatmul` on torch's grouped kernel. unwritten: zero the weight's gradient of experts without a token."""
    _, width, size = weight.shape
    for words, length in (("inputs", size), ("outputs", width)):
        if length * weight.element_size() % _STRIDE_BYTES:
            raise UserError(_misaligned(f"an expert's product has {length} {words}", weight.dtype))
    if unwritten:
        weight = _Used.apply(weight, counts)
    return F.grouped_mm(x.to(weight.dtype), weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))


class _Used(torch.autograd.Function):
    """The weight [E, out, in] itself. Its gradient is zero exactly for experts without a token, whatever the kernel left there.

    A pass over the gradient, without waiting for the device. The gradient may hold NaN, so it is selected, not multiplied.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(counts)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (counts,) = ctx.saved_tensors
        return torch.where((counts > 0)[:, None, None], grads[0], 0), None


@cache
def _leaves_unwritten(device: torch.device) -> bool:
    """True on Blackwell: there torch's kernel leaves the gradient of an expert without a token unwritten (pytorch#172439)."""
    return torch.cuda.get_device_capability(device)[0] >= 10


def check_sizes(model: nn.Module, experts: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if `grouped_mm` on this device cannot compute the model's experts in this dtype. Looks at shapes only."""
    if experts != "grouped_mm" or device.type != "cuda":
        return
    for module in model.modules():
        down = getattr(module, "down_proj", None)
        if not (isinstance(down, torch.Tensor) and down.ndim == 3 and hasattr(module, "is_transposed")):
            continue
        _, hidden, size = _weight(module, "down_proj").shape
        config: Any = getattr(model, "config", None)
        own = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
        for name, length in (("hidden_size", hidden), (own, size)):
            if length * dtype.itemsize % _STRIDE_BYTES:
                raise UserError(_misaligned(f"{name} of the model is {length}", dtype))


def _misaligned(what: str, dtype: torch.dtype) -> str:
    multiple, name = _STRIDE_BYTES // dtype.itemsize, str(dtype).removeprefix("torch.")
    return (
        f"{what}, and torch's grouped product on a GPU takes multiples of {multiple} in {name} (hidden_size and "
        'moe_intermediate_size): set policy.experts to "loop"'
    )


def grouped_mm_experts(module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """`permuted_experts` on torch's grouped matrix product."""
    return permuted_experts(module, hidden, top_k_index, top_k_weights, grouped_matmul)


def megablocks_experts(module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """`permuted_experts` on MegaBlocks' grouped product (its `grouped` path). Needs CUDA and bf16."""
    gmm = _megablocks_gmm()

    def matmul(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return gmm(x.to(weight.dtype).contiguous(), weight.contiguous(), counts.cpu(), trans_b=True)

    return permuted_experts(module, hidden, top_k_index, top_k_weights, matmul)


def _megablocks_gmm() -> Callable[..., torch.Tensor]:
    try:
        grouped_gemm_util = importlib.import_module("megablocks.grouped_gemm_util")
        grouped_gemm_util.assert_grouped_gemm_is_available()
    except (ImportError, AssertionError) as error:
        raise MissingPackage(
            "policy.experts is 'megablocks', but MegaBlocks is not installed: pip install --no-deps megablocks==0.10.0 "
            "stanford-stk==0.7.1 grouped_gemm==0.3.0 (without --no-deps pip would replace torch), or set it to 'grouped_mm'"
        ) from error
    return grouped_gemm_util.ops.gmm


def registered_name(experts: str) -> str:
    """Transformers' name of one of `IMPLEMENTATIONS`. UserError for an unknown name, MissingPackage if it is not installed."""
    if experts not in IMPLEMENTATIONS:
        raise UserError(f"policy.experts is {experts!r}: set it to one of {', '.join(IMPLEMENTATIONS)}")
    if experts == "megablocks":
        _megablocks_gmm()
    return f"srpo_{experts}"


ExpertsInterface.register("srpo_loop", loop_experts)
ExpertsInterface.register("srpo_grouped_mm", grouped_mm_experts)
ExpertsInterface.register("srpo_megablocks", megablocks_experts)
