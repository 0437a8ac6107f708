"""The loss from hidden states and the output head, chunk by chunk, against fp64 autograd over all logits at once."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from linear_cases import DEVICES, OPTIONS, Case, chunked, relative, rounding, two_roundings
from srpo_kernels import IGNORE, cpu, dispatch, linear_chunks, operators
from torch import Tensor


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(83, 37, 211), (300, 100, 1000), (40, 1, 5)])
def test_fp32_on_exact_logits(shape: tuple[int, int, int], option: str, device: str) -> None:
    """If fp32 holds the logits exactly, all error is the op's own."""
    case = Case(1, *shape, option, device=device, grid=True)
    exact, *exact_grads = case.exact()
    for chunk_rows in (None, 20, 3):
        out, *grads = case.run(chunk_rows=chunk_rows)
        assert (out.logprobs - exact.logprobs).abs().max() <= 2e-6
        torch.testing.assert_close(out.loss.double(), exact.loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(out.stats.stack(), exact.stats.stack(), rtol=2e-6, atol=2e-5)
        for got, expected in zip(grads, exact_grads, strict=True):
            assert expected.norm() > 0.01
            assert relative(got, expected) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", ["plain", "k3", "full", "top_k"])
@pytest.mark.parametrize(("num_rows", "size", "vocab"), [(300, 64, 1000), (83, 333, 701)])
def test_fp32_loses_no_more_than_plain_torch(num_rows: int, size: int, vocab: int, option: str, device: str) -> None:
    """On normal draws the fp32 product itself errs, by 2e-6 in a logit of 5: twice what plain torch loses is the bound."""
    case = Case(random.randrange(2**31), num_rows, size, vocab, option, device=device)
    exact, *exact_grads = case.exact()
    plain, *plain_grads = case.run(impl="reference")
    out, *grads = case.run(chunk_rows=31)
    allowed = max(2e-6, 2 * float((plain.logprobs - exact.logprobs).abs().max()))
    assert (out.logprobs - exact.logprobs).abs().max() <= allowed
    for got, other, expected in zip(grads, plain_grads, exact_grads, strict=True):
        assert relative(got, expected) <= max(1e-6, 2 * relative(other, expected))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("option", ["plain", "k3", "full", "kept"])
def test_low_precision(option: str, dtype: torch.dtype, device: str) -> None:
    """On a CPU nothing but the results is rounded. A GPU rounds the gradient of the logits, too."""
    case = Case(random.randrange(2**31), 300, 70, 1501, option, dtype, device, grid=True)
    exact, *exact_grads = case.exact()
    out, *grads = case.run(chunk_rows=70)
    assert (out.logprobs - exact.logprobs).abs().max() <= 2e-6
    for got, expected in zip(grads, exact_grads, strict=True):
        assert got.dtype == dtype
        bound = 1.01 * rounding(expected, dtype) if device == "cpu" else two_roundings(dtype)
        assert relative(got, expected) <= bound <= 3.2e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [32000, 50257, 151643, 151936, 262144])
@pytest.mark.parametrize("option", ["k3", "full"])
def test_large_vocabularies(option: str, vocab: int, device: str) -> None:
    case = Case(6, 5, 8, vocab, option, device=device, grid=True, ignored=False)
    exact, *exact_grads = case.exact()
    out, *grads = case.run(chunk_rows=2)
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=6e-8, atol=2e-6)
    torch.testing.assert_close(out.stats.stack(), exact.stats.stack(), rtol=2e-6, atol=2e-5)
    assert relative(grads[1], exact_grads[1]) <= 1e-6
    _, plain, _ = case.run(impl="reference")  # sums over the vocabulary are the BLAS's
    assert relative(grads[0], exact_grads[0]) <= max(1e-6, 2 * relative(plain, exact_grads[0]))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors in 16 bits, whose products are exact and summed in fp32, as tensor cores do."""

    def put_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False, scale: float = 1.0) -> None:
        product = scale * (a.float() @ b.float())
        out.copy_(out + product if add else product)

    monkeypatch.setattr(linear_chunks, "factor_dtype", lambda tensor: tensor.dtype)
    monkeypatch.setattr(linear_chunks, "put_product", put_product)


@chunked
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("option", ["plain", "k3", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 2.0**-20])
def test_rounded_gradients_of_logits(dtype: torch.dtype, option: str, scale: float) -> None:
    """Emulates a GPU's products; fp16 must not flush tiny weights to zero."""
    case = Case(3, 300, 70, 1501, option, dtype, grid=True)
    case.tables["weights"] *= scale
    _, *exact = case.exact()
    _, *grads = case.run(upstream=1 / scale, chunk_rows=70)
    for got, expected in zip(grads, exact, strict=True):
        assert relative(got, expected / scale) <= two_roundings(dtype)


@chunked
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("option", ["plain", "on_policy"])
def test_the_weights_gradient_is_summed_over_chunks_in_fp32(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its final rounding to bf16 the sum has no larger error than the gradient of the logits. A sum in bf16 would have an
    error of 2.9e-3 after two chunks, and more after each further chunk."""
    sums: list[Tensor] = []
    finish = linear_chunks.Gradient.finish

    def watch(self: linear_chunks.Gradient) -> tuple[Tensor, Tensor]:
        sums.append(self.weight.clone())
        return finish(self)

    monkeypatch.setattr(linear_chunks.Gradient, "finish", watch)
    case = Case(random.randrange(2**31), 2000, 70, 1501, option, torch.bfloat16, grid=True)
    _, _, exact = case.exact()
    case.run(chunk_rows=130)
    assert len(sums) == 1 and sums[0].dtype == torch.float32 and relative(sums[0], exact) <= 2.4e-3


class Narrow:
    """The CPU backend with a gradient that is rounded when written. Records the dtypes of logits and gradient."""

    any_gradient_dtype = True
    why_not, new_gradient, scaled = staticmethod(cpu.why_not), staticmethod(cpu.new_gradient), staticmethod(cpu.scaled)

    def __init__(self) -> None:
        self.dtypes: list[tuple[torch.dtype, torch.dtype]] = []

    def rows(self, mode: str, logits: Tensor, dlogits: Tensor | None, *more: Any) -> Tensor:
        assert dlogits is not None
        self.dtypes.append((logits.dtype, dlogits.dtype))
        before, wide = logits.clone(), torch.empty_like(logits)
        values = cpu.rows(mode, logits, wide, *more)
        dlogits.copy_(wide)
        assert torch.equal(logits, before) == (dlogits.data_ptr() != logits.data_ptr())
        return values


@chunked
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("option", ["plain", "k3", "full", "top_k"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_logits_written_in_16_bits(dtype: torch.dtype, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equals, bit for bit, the gradient written in fp32 and then rounded. fp16 must be scaled first, so it stays fp32."""
    narrow = Narrow()
    monkeypatch.setitem(operators.BACKENDS, "narrow", narrow)
    case = Case(3, 150, 70, 801, option, dtype, grid=True)
    out, *grads = case.run(chunk_rows=40, impl="narrow")
    wide, *wide_grads = case.run(chunk_rows=40, impl="cpu")
    assert narrow.dtypes == [(torch.float32, dtype if dtype == torch.bfloat16 else torch.float32)] * len(narrow.dtypes) != []
    assert torch.equal(out.logprobs, wide.logprobs)
    for got, expected in zip(grads, wide_grads, strict=True):
        assert expected.norm() > 0 and torch.equal(got, expected)


def test_a_backend_that_writes_16_bits_comes_first_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    able, other = Narrow(), Narrow()
    other.any_gradient_dtype = False
    monkeypatch.setattr(operators, "BACKENDS", {"other": other, "able": able})
    kind = ("op", "auto", torch.device("cpu"), torch.float32)
    assert (dispatch.choose(*kind), dispatch.choose(*kind, narrow=True)) == ("other", "able")
    able.any_gradient_dtype = False
    assert dispatch.choose(*kind, narrow=True) == "other"


def test_fp16_waits_for_the_scale_of_a_scaled_loss() -> None:
    case = Case(5, dtype=torch.float16, grid=True)
    case.tables["weights"] *= 1e-7
    _, *exact = case.exact()
    _, *grads = case.run(upstream=2.0**20)
    for got, expected in zip(grads, exact, strict=True):
        assert relative(got, expected * 2**20) <= 3e-4


@chunked
@pytest.mark.parametrize("option", OPTIONS)
def test_chunks_change_neither_loss_nor_logprobs(option: str) -> None:
    """Bit for bit if the logits are exact; otherwise a BLAS may round small products differently from large ones."""
    case, loose = Case(11, option=option, grid=True), Case(11, option=option)
    unchunked, loose_unchunked = case.run(), loose.run()
    for chunk_rows in (1, 2, 7, 30, 1000):
        out, *grads = case.run(chunk_rows=chunk_rows)
        assert torch.equal(out.loss, unchunked[0].loss) and torch.equal(out.logprobs, unchunked[0].logprobs)
        assert torch.equal(out.stats.stack(), unchunked[0].stats.stack())
        assert max(relative(a, b.double()) for a, b in zip(grads, unchunked[1:], strict=True)) <= 3e-7
        out, *grads = loose.run(chunk_rows=chunk_rows)
        torch.testing.assert_close(out.logprobs, loose_unchunked[0].logprobs, rtol=0, atol=4e-6)
        assert max(relative(a, b.double()) for a, b in zip(grads, loose_unchunked[1:], strict=True)) <= 3e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other_chunk", [None, 9])
def test_on_policy_ratio_is_one(other_chunk: int | None, dtype: torch.dtype, device: str) -> None:
    """Each row is a step, so that the sums by step show each row's ratio."""
    case = Case(2, 60, 200, 3000, dtype=dtype, device=device, std=4.0)
    case.tables |= {
        "cu_seqlens": torch.tensor([0, 60]),
        "step_ends": torch.arange(1, 61)[None],
        "step_advantages": torch.ones(1, 60),
    }
    case.tables = {name: table.to(device) for name, table in case.tables.items()}
    case.tables["old_logprobs"] = case.logprobs(case.hidden, case.weight, chunk_rows=other_chunk)[0]
    out, _, _ = case.run()
    ratio = out.stats.sum_ratio[out.stats.num_tokens > 0]
    assert ratio.shape[0] > 30 and (ratio - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("option", ["plain", "kept", "top_k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk_rows", [None, 13])
def test_token_logprobs(chunk_rows: int | None, dtype: torch.dtype, option: str, device: str) -> None:
    case = Case(1, option=option, device=device, dtype=dtype, grid=True)
    gen = torch.Generator().manual_seed(0)
    upstream = torch.randn(2, 83, generator=gen).to(device) * (torch.rand(2, 83, generator=gen) < 0.5).to(device)
    upstream[0, case.tables["labels"] == IGNORE] = math.nan  # of rows that are never read

    def run(dtype: torch.dtype, **more: Any) -> tuple[Tensor, ...]:
        factors = [x.detach().to(dtype, copy=True).requires_grad_() for x in (case.hidden, case.weight)]
        outputs = case.logprobs(*factors, **more)
        assert outputs[0].dtype == outputs[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        return *outputs, *torch.autograd.grad(outputs, factors, [row.to(outputs[0].dtype) for row in upstream])

    exact, got = run(torch.float64, impl="reference"), run(dtype, chunk_rows=chunk_rows)
    for a, b in zip(got[:2], exact[:2], strict=True):
        assert (a - b).abs().max() <= 2e-6
    for a, b in zip(got[2:], exact[2:], strict=True):
        rounded_twice = device == "cuda" and dtype == torch.bfloat16
        assert relative(a, b) <= (two_roundings(dtype) if rounded_twice else 1e-6 + 1.01 * rounding(b, dtype))
