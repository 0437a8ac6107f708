from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import policy_lab as lab
import pytest
import torch
import torch.nn.functional as F

from srpo.core.errors import MissingPackage, UserError
from srpo.policy.experts import check_sizes, grouped_mm_experts, kernel_matmul, loop_experts, permuted_experts, registered_name

EXPERTS, HIDDEN, SIZE = 5, 8, 8  # a multiple of 8: the strides that the GPU kernel takes in bf16


def layer(dtype: torch.dtype = torch.float64, device: str = "cpu") -> SimpleNamespace:
    up = torch.randn(EXPERTS, 2 * SIZE, HIDDEN, dtype=dtype, device=device, requires_grad=True)
    down = torch.randn(EXPERTS, HIDDEN, SIZE, dtype=dtype, device=device, requires_grad=True)
    plain = {"has_gate": True, "has_bias": False, "is_transposed": False, "_apply_gate": swiglu}
    return SimpleNamespace(num_experts=EXPERTS, gate_up_proj=up, down_proj=down, act_fn=F.silu, **plain)


def swiglu(inner: torch.Tensor) -> torch.Tensor:
    gate, up = inner.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 37])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_grouped_equals_loop_with_gradients(num_tokens: int, top_k: int) -> None:
    module = layer()
    hidden = torch.randn(num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    index = torch.rand(num_tokens, EXPERTS).topk(top_k).indices
    weights = torch.rand(num_tokens, top_k, dtype=torch.float64, requires_grad=True)
    inputs = (hidden, weights, module.gate_up_proj, module.down_proj)
    upstream = torch.randn(num_tokens, HIDDEN, dtype=torch.float64)
    grouped, loop = (f(module, hidden, index, weights) for f in (grouped_mm_experts, loop_experts))
    assert torch.allclose(grouped, loop, atol=1e-12)
    for a, b in zip(torch.autograd.grad(grouped, inputs, upstream), torch.autograd.grad(loop, inputs, upstream), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_grouped_is_right_where_all_tokens_choose_one_expert() -> None:
    module = layer()
    hidden, weights = torch.randn(9, HIDDEN, dtype=torch.float64), torch.rand(9, 1, dtype=torch.float64)
    index = torch.full((9, 1), 3)
    gate, up = F.linear(hidden, module.gate_up_proj[3]).chunk(2, -1)
    want = F.linear(F.silu(gate) * up, module.down_proj[3]) * weights
    assert torch.allclose(grouped_mm_experts(module, hidden, index, weights), want, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
def test_experts_compute_as_their_module_says(plain: bool) -> None:
    """Biases, transposed weights and a clamped gate of their own, as in gpt-oss; or an activation without a gate."""
    width = SIZE if plain else 2 * SIZE
    up, down = (torch.randn(EXPERTS, *shape, dtype=torch.float64) for shape in ((HIDDEN, width), (SIZE, HIDDEN)))
    biases = [torch.randn(EXPERTS, size, dtype=torch.float64) for size in (width, HIDDEN)]
    name = "up_proj" if plain else "gate_up_proj"
    module = SimpleNamespace(
        num_experts=EXPERTS,
        has_gate=not plain,
        has_bias=True,
        is_transposed=True,
        act_fn=F.relu,
        _apply_gate=lambda inner: inner[:, ::2].clamp(max=0.5) * inner[:, 1::2],
        down_proj=down,
        down_proj_bias=biases[1],
        **{name: up, f"{name}_bias": biases[0]},
    )
    hidden, weights = torch.randn(7, HIDDEN, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)
    index = torch.rand(7, EXPERTS).topk(2).indices
    want = torch.zeros(7, HIDDEN, dtype=torch.float64)
    for token in range(7):
        for slot, expert in enumerate(index[token].tolist()):
            inner = hidden[token, None] @ up[expert] + biases[0][expert]
            inner = F.relu(inner) if plain else module._apply_gate(inner)
            want[token] += (inner @ down[expert] + biases[1][expert])[0] * weights[token, slot]
    for forward in (grouped_mm_experts, loop_experts):
        assert torch.allclose(forward(module, hidden, index, weights), want, atol=1e-12)


def test_permuted_hands_sorted_rows_and_counts_to_the_product() -> None:
    """An adapter of another library may rely on this: rows sorted by expert, int64 counts that sum to T * K."""
    module = layer()
    index = torch.tensor([[4, 0], [0, 2], [4, 2]])
    seen = []

    def product(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        seen.append((x.detach().clone(), counts))
        return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts.tolist()), weight, strict=True)])

    hidden = torch.arange(3, dtype=torch.float64)[:, None].expand(3, HIDDEN)
    permuted_experts(module, hidden, index, torch.ones(3, 2, dtype=torch.float64), product)
    x, counts = seen[0]
    assert counts.dtype == torch.int64 and counts.tolist() == [2, 0, 2, 0, 2]
    assert x[:, 0].tolist() == [0, 1, 1, 2, 0, 2]


def test_all_implementations_give_the_model_the_same_logits() -> None:
    from srpo.policy.model import Policy

    (batch,) = lab.batches(3)
    grouped, loop = (Policy(lab.tiny(experts=name))(batch) for name in ("grouped_mm", "loop"))
    assert torch.allclose(grouped, loop, atol=1e-5)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="grouped_mm, loop, megablocks"):
        registered_name("dense")


@pytest.mark.skipif(importlib.util.find_spec("megablocks") is not None, reason="MegaBlocks is installed")
def test_megablocks_that_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(MissingPackage, match="pip install --no-deps megablocks"):
        lab.tiny(experts="megablocks")


class Blackwell(torch.autograd.Function):
    """torch's grouped_mm as on Blackwell, where the weight's gradient of an expert without a row is whatever the memory held."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, offs)
        bounds = [0, *offs.tolist()]
        return torch.cat([x[a:b] @ w for a, b, w in zip(bounds, bounds[1:], weight, strict=False)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, offs = ctx.saved_tensors
        bounds = [0, *offs.tolist()]
        parts = [(x[a:b], grads[0][a:b], w) for a, b, w in zip(bounds, bounds[1:], weight, strict=False)]
        of_weight = torch.stack([rows.T @ grad if len(rows) else torch.full_like(w, torch.nan) for rows, grad, w in parts])
        return torch.cat([grad @ w.T for _, grad, w in parts]), of_weight, None


@pytest.mark.parametrize("counts", [[3, 0, 4, 0, 2], [0, 0, 9, 0, 0], [2, 1, 2, 3, 1]])
def test_experts_without_a_token_get_a_gradient_of_zero(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = []

    def grouped_mm(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> Any:
        offsets.append(offs)
        return Blackwell.apply(x, weight, offs)

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    weight = torch.randn(EXPERTS, SIZE, HIDDEN, dtype=torch.float64, requires_grad=True)
    x = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, SIZE, dtype=torch.float64)
    ours, theirs = (kernel_matmul(x, weight, torch.tensor(counts), unwritten=unwritten) for unwritten in (True, False))
    assert offsets[0].dtype == torch.int32 and offsets[0].tolist() == torch.tensor(counts).cumsum(0).tolist()
    want = torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts), weight, strict=True)])
    assert torch.allclose(ours, want, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), upstream, retain_graph=True) for y in (ours, want)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    (unmended,) = torch.autograd.grad(theirs, weight, upstream)
    assert bool(unmended.isnan().any()) == (0 in counts)


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.bfloat16, 8), (torch.float32, 4)])
def test_sizes_that_the_gpu_kernel_cannot_multiply_are_refused(dtype: torch.dtype, multiple: int) -> None:
    """16-byte strides, checked on the shapes when the model is loaded, and in the product itself."""
    gpu = torch.device("cuda")

    def model(**sizes: int) -> Any:
        return lab.tiny(config=replace(lab.CONFIG, **sizes))

    fits, narrow, odd = model(), model(expert_size=multiple // 2), model(hidden_size=32 + multiple // 2)
    check_sizes(fits, "grouped_mm", gpu, dtype)
    with pytest.raises(UserError, match=rf"moe_intermediate_size of the model is {multiple // 2}, .* multiples of {multiple} in"):
        check_sizes(narrow, "grouped_mm", gpu, dtype)
    with pytest.raises(UserError, match=rf'hidden_size of the model is {32 + multiple // 2}, .*policy.experts to "loop"'):
        check_sizes(odd, "grouped_mm", gpu, dtype)
    check_sizes(narrow, "loop", gpu, dtype)
    check_sizes(narrow, "grouped_mm", torch.device("cpu"), dtype)
    counts = torch.tensor([1, 2])
    for out, size in ((multiple // 2, 2 * multiple), (2 * multiple, multiple // 2)):
        with pytest.raises(UserError, match=r'policy\.experts to "loop"'):
            kernel_matmul(torch.ones(3, size, dtype=dtype), torch.ones(2, out, size, dtype=dtype), counts, unwritten=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["grouped_mm", "megablocks"])
def test_on_a_gpu_in_bf16(name: str) -> None:
    from srpo.policy import experts

    if name == "megablocks":
        pytest.importorskip("megablocks", reason="MegaBlocks is not installed")
    module = layer(torch.float32, "cuda")
    hidden = torch.randn(64, HIDDEN, device="cuda")
    index, weights = torch.rand(64, EXPERTS, device="cuda").topk(2).indices, torch.rand(64, 2, device="cuda")
    want = loop_experts(module, hidden, index, weights)
    module.gate_up_proj, module.down_proj = module.gate_up_proj.bfloat16(), module.down_proj.bfloat16()
    out = getattr(experts, f"{name}_experts")(module, hidden.bfloat16(), index, weights.bfloat16())
    assert (out.float() - want).norm() <= 0.02 * want.norm()
