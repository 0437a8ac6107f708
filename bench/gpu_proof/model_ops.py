"""Stage model_ops: attention and experts in bf16 against fp32 on the CPU, with gradients; the registered ops; speeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from gpu_proof import lab
from gpu_proof.operators_check import operator_parts
from gpu_proof.parts import Found, Parts, Skip, Wrong, figure, small

BAR = 0.02  # relative error of bf16 results and gradients: a few roundings of 2^-9, which partly cancel
LENGTHS = (5, 1, 130, 64, 17)


def kernel(name: str, width: int) -> Any:
    """A kernel of `policy.attention` for heads of this width; None for torch's, which pads where it has no kernel. Raises Skip,
    with what to install or to change, if it cannot run here."""
    from srpo.core.errors import UserError
    from srpo.policy.varlen_kernels import check_kernel, check_widths, kernel_of

    if name == "torch":
        return None
    try:
        check_kernel(name, lab.device(), torch.bfloat16)
        check_widths(name, [(width, width)], lab.device())
        return kernel_of(name)
    except UserError as error:
        raise Skip(str(error)) from None


def attention(name: str, heads: int, kv_heads: int, dim: int, window: int | None) -> Found:
    """Output and three gradients of packed sequences by a kernel, against fp32 on the CPU."""
    from srpo.policy.attention import varlen_attention

    chosen = kernel(name, dim)
    rows = sum(LENGTHS)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    sources = [torch.randn(1, h, rows, dim).bfloat16() for h in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(1, rows, heads, dim).bfloat16()

    def results(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        by = chosen if dtype == torch.bfloat16 else None
        inputs = [x.to(device, dtype).requires_grad_() for x in sources]
        packed = (None, dim**-0.5, bounds.to(device), max(LENGTHS))
        out, _ = varlen_attention(torch.nn.Identity(), inputs[0], inputs[1], inputs[2], *packed, sliding_window=window, kernel=by)
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(device, dtype))]

    return compared(("output", "query", "key", "value"), results)


def experts(tokens: int, num_experts: int, chosen: int, hidden: int, size: int) -> Found:
    """The last expert gets no token: its gradient must be zero, whatever lay in that memory."""
    from srpo.policy.experts import grouped_mm_experts, loop_experts

    up, down = torch.randn(num_experts, 2 * size, hidden) * hidden**-0.5, torch.randn(num_experts, hidden, size) * size**-0.5
    rows, upstream = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    index = torch.rand(tokens, num_experts - 1).topk(chosen).indices
    weights = torch.rand(tokens, chosen)

    def results(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        forward = loop_experts if dtype == torch.float32 else grouped_mm_experts
        x, *factors = (t.bfloat16().to(device, dtype).requires_grad_() for t in (rows, up, down))
        out = forward(layer(*factors), x, index.to(device), weights.bfloat16().to(device, dtype))
        return [out.detach(), *torch.autograd.grad(out, (x, *factors), upstream.bfloat16().to(device, dtype))]

    if not small():  # so that memory that is not written holds no zeros by chance
        dirt = torch.full((num_experts * 3 * size * hidden * 4,), float("nan"), device=lab.device())
        del dirt
    found = compared(("output", "hidden", "gate and up", "down"), results, keep := [])
    idle = max(float(gradient[-1].abs().nan_to_num(nan=torch.inf).max()) for gradient in keep[2:])
    if idle:
        raise Wrong(f"the gradient of an expert without a token is up to {idle}, not 0")
    return found


def compared(names: tuple[str, ...], results: Any, keep: list[torch.Tensor] | None = None) -> Found:
    """Hold bf16 on the device to fp32 on the CPU; `keep` gets the device's results."""
    got, wanted = results(lab.device(), torch.bfloat16), results(torch.device("cpu"), torch.float32)
    if keep is not None:
        keep += got
    errors = {name: lab.relative(g, w) for name, g, w in zip(names, got, wanted, strict=True)}
    lab.hold(errors, BAR, got, wanted)
    return {"figures": [figure("largest relative error", max(errors.values()), "", bar=BAR)]}


def layer(up: torch.Tensor, down: torch.Tensor) -> SimpleNamespace:
    """An experts module as transformers has it: gate and up in one tensor, no biases."""

    def gate(inner: torch.Tensor) -> torch.Tensor:
        left, right = inner.chunk(2, -1)
        return F.silu(left) * right

    about = {"has_gate": True, "has_bias": False, "is_transposed": False, "_apply_gate": gate}
    return SimpleNamespace(num_experts=up.shape[0], gate_up_proj=up, down_proj=down, act_fn=F.silu, **about)


def attention_speed(name: str) -> Found:
    """Forward and backward, 32 heads on 8, causal: half of the pairs are computed; the backward pass has 2.5 times the work."""
    from srpo.policy.attention import varlen_attention

    sequences, length, heads, kv_heads, dim = (2, 64, 4, 2, 32) if small() else (16, 1024, 32, 8, 128)
    by = kernel(name, dim)
    rows = sequences * length
    make = partial(torch.randn, device=lab.device(), dtype=torch.bfloat16)
    inputs = [make(1, h, rows, dim).requires_grad_() for h in (heads, kv_heads, kv_heads)]
    upstream = make(1, rows, heads, dim)
    bounds = torch.arange(0, rows + 1, length, device=lab.device(), dtype=torch.int32)

    def both() -> None:
        packed = (None, dim**-0.5, bounds, length)
        out, _ = varlen_attention(torch.nn.Identity(), inputs[0], inputs[1], inputs[2], *packed, kernel=by)
        torch.autograd.grad(out, inputs, upstream)

    flops = 3.5 * 4 * sequences * heads * length**2 * dim / 2
    return speed(both, flops, f"{sequences} x {length}, {heads} heads on {kv_heads} of {dim}")


def experts_speed() -> Found:
    from srpo.policy.experts import grouped_mm_experts

    tokens, count, chosen, hidden, size = (64, 4, 2, 64, 32) if small() else (16384, 128, 8, 2048, 768)
    lab.needs_memory(6 << 30)  # weights and their gradients, and the rows of all chosen experts between the products
    make = partial(torch.randn, device=lab.device(), dtype=torch.bfloat16)
    rows, upstream = make(tokens, hidden).requires_grad_(), make(tokens, hidden)
    factors = [make(count, 2 * size, hidden).requires_grad_(), make(count, hidden, size).requires_grad_()]
    index = torch.rand(tokens, count, device=lab.device()).topk(chosen).indices
    weights = torch.rand(tokens, chosen, device=lab.device()).bfloat16()

    def both() -> None:
        torch.autograd.grad(grouped_mm_experts(layer(*factors), rows, index, weights), (rows, *factors), upstream)

    flops = 3 * 2 * tokens * chosen * 3 * hidden * size
    return speed(both, flops, f"{tokens} tokens x {chosen} of {count} experts, {hidden} x {size}")


def speed(call: Any, flops: float, shape: str) -> Found:
    ms = lab.interleaved({"call": call}, 3 if small() else 7)["call"]
    return {"figures": [figure("forward and backward", flops / ms / 1e9, "TFLOP/s")], "ms": ms, "shape": shape}


def attention_parts(name: str) -> Parts:
    """The parts of a kernel of `policy.attention`."""
    shapes = [(4, 2, 32, None), (8, 2, 64, None), (4, 4, 64, 16), (8, 1, 128, None), (8, 2, 128, 40)]
    by = "" if name == "torch" else f" by {name}"
    parts: dict[str, Callable[[], Found]] = {}
    for heads, kv_heads, dim, window in shapes:
        parts[f"attention{by} {heads} heads on {kv_heads} of {dim}, window {window}"] = partial(
            attention, name, heads, kv_heads, dim, window
        )
    return parts | {f"attention speed{by}": partial(attention_speed, name)}


def main() -> None:
    """The optional kernels come last: FlashAttention 4 compiles each of its shapes."""
    from srpo.policy.varlen_kernels import NAMES

    sizes = {"experts small": (37, 5, 2, 16, 8), "experts wide": (500, 16, 4, 128, 64)}
    parts: dict[str, Callable[[], Found]] = {
        **attention_parts("torch"),
        **{name: partial(experts, *size) for name, size in sizes.items()},
        **operator_parts(),
        "experts speed": experts_speed,
    }
    for name in NAMES[1:]:
        parts |= attention_parts(name)
    lab.run(parts)
