"""Attention of bf16 on a CPU, one sequence at a time: result and gradient against padded sequences, and when it is taken."""

from __future__ import annotations

import random
from typing import Any

import policy_lab as lab
import pytest
import torch

from srpo.policy import attention
from srpo.policy.attention import PadLayout, one_by_one, varlen_attention
from srpo.policy.model import Policy
from srpo.policy.plain_attention import plain_attention

SHAPES = [[5], [1, 1, 1], [1, 7, 3, 12], [9, 0, 2]]


def inputs(lengths: list[int], kv_heads: int, dtype: torch.dtype, width: int, value_width: int) -> list[torch.Tensor]:
    """Query, key and value [1, heads, T, D], as transformers gives them."""
    sizes = [(4, width), (kv_heads, width), (kv_heads, value_width)]
    packed = [torch.randn(1, sum(lengths), *size).to(dtype).requires_grad_() for size in sizes]
    return [x.transpose(1, 2) for x in packed]


def padded(qkv: list[torch.Tensor], lengths: list[int], scale: float | None, window: int | None) -> torch.Tensor:
    """The form of fp32 and fp64, in the dtype of the inputs."""
    layout = PadLayout.of(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))
    q, k, v = (layout.pad(x[0].transpose(0, 1)) for x in qkv)
    return layout.unpad(attention.by_torch(q, k, v, scale, window))[None]


def alone(qkv: list[torch.Tensor], lengths: list[int], scale: float | None, window: int | None) -> torch.Tensor:
    q, k, v = (x[0].transpose(0, 1) for x in qkv)
    return one_by_one(q, k, v, lengths, scale, window)[None]


@pytest.mark.parametrize("lengths", SHAPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("longest", [512, 6])  # 6: torch's kernel takes the longer ones
def test_result_and_gradient_are_those_of_padded_sequences(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], kv_heads: int, window: int | None, longest: int
) -> None:
    monkeypatch.setattr(attention, "LONGEST_PLAIN", longest)
    qkv, scale = inputs(lengths, kv_heads, torch.float64, 6, random.choice([4, 6])), random.choice([None, 0.37])
    ours, theirs = alone(qkv, lengths, scale, window), padded(qkv, lengths, scale, window)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    upstream = torch.randn_like(ours)
    pairs = zip(*(torch.autograd.grad(out, qkv, upstream) for out in (ours, theirs)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 20])
def test_bf16_loses_at_most_twice_as_much_as_torch_s_kernel(kv_heads: int, window: int | None) -> None:
    lengths = [random.randint(40, 90) for _ in range(4)]
    qkv = inputs(lengths, kv_heads, torch.bfloat16, 32, 32)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    upstream = torch.randn(1, sum(lengths), 4, 32).bfloat16()

    def run(form: Any, qkv: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        out = form(qkv, lengths, None, window)
        assert out.dtype == dtype
        return [x.detach().double() for x in (out, *torch.autograd.grad(out, qkv, upstream.to(dtype)))]

    right = run(padded, exact, torch.float64)
    ours, theirs = (run(form, qkv, torch.bfloat16) for form in (alone, padded))
    for a, b, want in zip(ours, theirs, right, strict=True):
        assert float((a - want).norm()) < 2 * float((b - want).norm())


@pytest.mark.parametrize(("dtype", "layouts"), [(torch.bfloat16, 0), (torch.float32, 1)])
def test_bf16_on_a_cpu_is_not_padded(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, layouts: int) -> None:
    of, laid_out = PadLayout.of, []
    monkeypatch.setattr(PadLayout, "of", lambda *bounds: laid_out.append(bounds) or of(*bounds))
    model = lab.tiny().to(dtype)
    Policy(model)(lab.batches(0)[0]).sum().backward()
    assert len(laid_out) == layouts


def test_in_bf16_no_bit_depends_on_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONGEST_PLAIN", 40)
    lengths = [17, 40, 41, 23, 64]
    qkv = inputs(lengths, 2, torch.bfloat16, 32, 32)

    def attend(qkv: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        return varlen_attention(torch.nn.Identity(), *qkv, None, 0.2, bounds, max(lengths))[0][0]  # pyright: ignore

    parts = zip(*(x.split(lengths, 2) for x in qkv), strict=True)
    each = [attend(list(part), [length]) for part, length in zip(parts, lengths, strict=True)]
    assert torch.equal(attend(qkv, lengths), torch.cat(each))


def test_a_gradient_of_the_gradient_is_refused() -> None:
    """It would miss the part that goes through the probabilities, which are stored."""
    q = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    out = plain_attention(q, q, q, 1.0, torch.zeros(3, 3))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
