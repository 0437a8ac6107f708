"""The arithmetic of the CUDA kernels, run on the CPU from the same header, against fp64. test_cuda_protocol.py models their
synchronisation; test_cuda.py runs the kernels on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import loss_cases as cases
import pytest
import torch
from srpo_kernels import LossOptions, build, native, operators, token_logprobs

OPTIONS = ("plain", "k1", "k2", "k3", "full", "kept", "kept_full", "cispo", "on_policy", "on_policy_kl")
CLUSTERS = (0, 1, 8, 16)  # CTAs per row; 0: the kernel that reads twice


@dataclass
class Model:
    """A backend that runs the arithmetic of the GPU kernels on the CPU."""

    library: ctypes.CDLL
    num_ctas: int
    fine: bool
    any_gradient_dtype = False

    def why_not(self, logits: torch.Tensor) -> str | None:
        return None if logits.dtype == torch.float32 else f"logits are {logits.dtype}"

    def new_gradient(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, 7.0, memory_format=torch.contiguous_format)

    def rows(
        self,
        mode: str,
        logits: torch.Tensor,
        dlogits: torch.Tensor | None,
        tables: dict[str, torch.Tensor | None],
        options: LossOptions,
        first_row: int = 0,
    ) -> torch.Tensor:
        rows = logits.new_full((len(native.ROW_FIELDS), logits.shape[0]), 7.0)
        args, held = native.row_args(mode, {**tables, "logits": logits, "dlogits": dlogits, "rows": rows}, options, first_row)
        self.library.rows_model(ctypes.byref(args), self.num_ctas, int(self.fine))
        assert held
        return rows

    def scaled(self, gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return gradient * factor


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on the PATH")
    output = tmp_path_factory.mktemp("model") / "rows_model.so"
    source = Path(__file__).with_name("rows_model.cpp")
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{build.CSRC}")
    subprocess.run([compiler, *flags, str(source), "-o", str(output)], check=True)
    return ctypes.CDLL(str(output))


@pytest.fixture(params=CLUSTERS)
def model(request: pytest.FixtureRequest, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(operators.BACKENDS, "cuda_model", Model(library, request.param, fine=True))
    return "cuda_model"


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        *product([(0, 8), (1, 4), (7, 1), (40, 7), (60, 1000)], OPTIONS),
        *product([(6, 32000), (3, 50257)], ("k3", "full")),
        *product([(257, 64), (3, 151643), (3, 151936), (2, 262144)], ("k3",)),
    ],
    ids=str,
)
def test_equals_fp64(model: str, shape: tuple[int, int], name: str) -> None:
    cases.check(cases.draw(cases.a_seed(), *shape, torch.float32, name, nan=False), model, in_place=False)
    cases.check(cases.draw(cases.a_seed(), *shape, torch.float32, name, nan=False), model, in_place=True)


@pytest.mark.parametrize("name", ["plain", "full"])
def test_without_a_reference(model: str, name: str) -> None:
    case = cases.draw(cases.a_seed(), 30, 1000, torch.float32, name, nan=False)
    case.tables["ref_logprobs"] = case.tables["ref_logits"] = None
    case.options["kl_coef"] = 0.0
    cases.check(case, model, in_place=False)
    assert not bool(case.measured(model)[0].stats.sum_kl.any())


@pytest.mark.parametrize("power", [23, 24, 25, 26, 27])
def test_small_terms_are_not_lost_in_a_large_sum(model: str, power: int) -> None:
    cases.check_small_terms(model, power)


@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
@pytest.mark.parametrize("name", ["k3", "full", "kept"])
def test_huge_tiny_and_equal_logits(model: str, name: str, scale: float) -> None:
    case = cases.draw(cases.a_seed(), 40, 3000, torch.float32, name, scale=scale, nan=False)
    case.tables["old_logprobs"] = None  # one of -20,000 is stored to 1e-3, and a ratio is no better than that
    if name != "full":
        case.options["kl_coef"] = 0.0
    exact, exact_grad = case.exact()
    out, grad = case.measured(model)
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=6e-8, atol=2e-6)
    assert case.error(grad, exact_grad) <= 3e-7


def test_columns_of_minus_infinity(model: str) -> None:
    case = cases.draw(cases.a_seed(), 30, 5000, torch.float32, "k3", nan=False)
    labels = case.tables["labels"]
    blocked = torch.rand(30, 5000) < 0.5
    blocked[:, 1250:2504] = True  # whole slices with nothing in them
    blocked[labels >= 0, labels[labels >= 0]] = False
    case.logits[blocked] = -torch.inf
    case.tables["old_logprobs"] = None  # it was that of more columns
    cases.check(case, model, in_place=False)
    assert not bool(case.measured(model)[1][blocked].any())


def test_a_single_finite_entry(model: str) -> None:
    case = cases.draw(cases.a_seed(), 12, 2500, torch.float32, "on_policy", nan=False)
    labels = case.tables["labels"]
    case.logits.fill_(-torch.inf)[torch.arange(12), labels.clamp(min=0)] = 3.0
    out, grad = case.measured(model)
    assert not bool(grad.any()) and not bool(out.logprobs.any())


def test_logprobs_and_their_gradient(model: str) -> None:
    """Labels on the edges of vectors, shares and slices."""
    labels = torch.tensor([0, 1, 3, 4, 127, 128, 1023, 1024, 511, 512, 513, 2055, 2056, 4099])
    logits, upstream, upstream_lse = torch.randn(14, 4100), torch.randn(14), torch.randn(14)

    def gradient(dtype: torch.dtype, impl: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = logits.to(dtype, copy=True).requires_grad_()
        logprobs, lse = token_logprobs(x, labels, temperature=0.9, impl=impl)
        return logprobs, lse, torch.autograd.grad((logprobs * upstream + lse * upstream_lse).sum(), x)[0]

    logprobs, lse, grad = gradient(torch.float32, model)
    exact, exact_lse, exact_grad = gradient(torch.float64, "reference")
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=2e-6)
    assert float((grad - exact_grad).norm() / exact_grad.norm()) <= 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_ctas", CLUSTERS)
@pytest.mark.parametrize("name", ["plain", "k3", "full", "kept"])
def test_16_bit_logits_notice_nothing_of_the_faster_exponential(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_ctas: int, name: str
) -> None:
    """Its relative error is up to 2^-22.5. Log-probabilities stay within 2e-6, and nearly all gradients round correctly."""
    monkeypatch.setitem(operators.BACKENDS, "cuda_model", Model(library, num_ctas, fine=False))
    case = cases.draw(cases.a_seed(), 30, 3000, dtype, name, nan=False)
    case.logits = case.logits.float()
    exact, exact_grad = case.exact()
    out, grad = case.measured("cuda_model")
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=6e-8, atol=2e-6)
    torch.testing.assert_close(out.stats.stack(), exact.stats.stack(), rtol=2e-6, atol=2e-5)
    assert case.error(grad.to(dtype), exact_grad) <= 1.05 * case.error(exact_grad.to(dtype), exact_grad)
