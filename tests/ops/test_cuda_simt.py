"""The CUDA kernels as they are written, run on a CPU by the emulator of tests/helpers/simt, against fp64. test_cuda_protocol.py
tries every order of events of rows_one_read; test_cuda.py runs the kernels on a GPU."""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path
from typing import Any

import loss_cases as cases
import pytest
import torch
from emulated import Emulated, KernelError, compile_library
from srpo_kernels import IGNORE, LossOptions, build, cuda, native, operators, token_logprobs, topk_support
from srpo_kernels.options import without_loss

OPTIONS = ("plain", "k1", "k2", "k3", "full", "kept", "kept_full", "cispo", "on_policy", "on_policy_kl")
CLUSTERS = (0, 1, 8, 16)  # CTAs per row; 0: the kernel that reads twice
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOP_K = cuda.MAX_TOP_K


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_library(tmp_path_factory.mktemp("simt") / "rows_simt.so")


@pytest.fixture(params=CLUSTERS)
def model(request: pytest.FixtureRequest, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> str:
    return install(request.param, library, monkeypatch)


def install(cluster: int, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the backend that takes `cluster` CTAs per row where it can, with threads in a random order."""
    library.simt_seed(cases.a_seed())
    monkeypatch.setitem(operators.BACKENDS, "simt", Emulated(library, cluster))
    return "simt"


def problems() -> list[tuple[int, tuple[int, int], str]]:
    """(CTAs per row, shape, options); the filter and the exact KL do not take clusters."""
    found = [*product([(0, 8), (7, 1), (40, 7), (20, 1000)], OPTIONS), *product([(4, 32000), (3, 50257)], ("k3", "full"))]
    found += [((200, 5001), "kept"), ((200, 5001), "kept_full")]
    found += product([(50, 64), (3, 151643), (2, 151936), (1, 262144)], ("k3",))
    return [(c, shape, name) for c in CLUSTERS for shape, name in found if c == 0 or not ("full" in name or "kept" in name)]


@pytest.mark.parametrize(("cluster", "shape", "name"), problems(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_fp64(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, cluster: int, shape: tuple[int, int], name: str, dtype: torch.dtype
) -> None:
    """In place rows lie V + 3 apart: their 16-byte units begin at a different column each, and rows_one_read cannot take them."""
    case = cases.draw(cases.a_seed(), *shape, dtype, name)
    fp64, model = case.exact(), install(cluster, library, monkeypatch)
    cases.check(case, model, in_place=False, fp64=fp64)
    cases.check(case, model, in_place=True, fp64=fp64)


@pytest.mark.parametrize("name", ["plain", "full"])
def test_without_a_reference(model: str, name: str) -> None:
    case = cases.draw(cases.a_seed(), 30, 1000, torch.float32, name)
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
    case = cases.draw(cases.a_seed(), 40, 3000, torch.float32, name, scale=scale)
    case.tables["old_logprobs"] = None  # one of -20,000 is stored to 1e-3, and a ratio is no better than that
    if name != "full":
        case.options["kl_coef"] = 0.0
    exact, exact_grad = case.exact()
    out, grad = case.measured(model)
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=6e-8, atol=2e-6)
    assert case.error(grad, exact_grad) <= 3e-7


def test_columns_of_minus_infinity(model: str) -> None:
    case = cases.draw(cases.a_seed(), 30, 5000, torch.float32, "k3")
    labels = case.tables["labels"]
    blocked = torch.rand(30, 5000) < 0.5
    blocked[:, 1250:2504] = True  # whole slices with nothing in them
    blocked[labels >= 0, labels[labels >= 0]] = False
    case.logits[blocked] = -torch.inf
    case.tables["old_logprobs"] = None  # it was that of more columns
    cases.check(case, model, in_place=False)
    assert not bool(case.measured(model)[1][blocked].any())


def test_a_single_finite_entry(model: str) -> None:
    case = cases.draw(cases.a_seed(), 12, 2500, torch.float32, "on_policy")
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


def test_rows_and_gradient_that_are_aligned_differently(library: ctypes.CDLL) -> None:
    """Logits, reference and gradient begin at any element of a 16-byte unit; nothing beside a row is written."""
    backend = Emulated(library)
    for dtype, name, shifts in product(DTYPES, ("k3", "full", "kept", "kept_full"), [(0, 1, 2), (3, 0, 1), (5, 5, 0), (7, 2, 7)]):
        case = cases.draw(cases.a_seed(), 6, 77, dtype, name)
        expected = torch.full_like(case.logits, 7.0)
        rows = backend.rows("policy_loss", case.logits, expected, case.tables, LossOptions(**case.options))
        wide = [torch.full((6, 101), 7.0, dtype=dtype) for _ in range(3)]
        logits, ref, gradient = (x[:, shift : shift + 77] for x, shift in zip(wide, shifts, strict=True))
        logits.copy_(case.logits)
        tables = dict(case.tables)
        if case.tables["ref_logits"] is not None:
            tables["ref_logits"] = ref.copy_(case.tables["ref_logits"])
        got = backend.rows("policy_loss", logits, gradient, tables, LossOptions(**case.options))
        torch.testing.assert_close(got, rows, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)
        beside = torch.ones(6, 101, dtype=torch.bool)
        beside[:, shifts[2] : shifts[2] + 77] = False
        assert bool((wide[2][beside] == 7).all())


@pytest.mark.parametrize(("name", "vocab"), [("k3", 4104), ("k3", 4099), ("full", 4104), ("kept", 4104)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_any_order_of_threads(library: ctypes.CDLL, dtype: torch.dtype, name: str, vocab: int) -> None:
    backend, case = Emulated(library), cases.draw(cases.a_seed(), 9, vocab, dtype, name)
    results = []
    for seed in range(4):
        library.simt_seed(seed)
        gradient = torch.full_like(case.logits, torch.nan)
        results.append((backend.rows("policy_loss", case.logits, gradient, case.tables, LossOptions(**case.options)), gradient))
        assert bool(gradient.isfinite().all())
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_ids_that_are_no_columns_make_their_row_not_a_number(library: ctypes.CDLL) -> None:
    logits = torch.randn(4, 104)
    labels = torch.tensor([5, 104, 10**9, 7])
    kept = torch.tensor([[1, 2, 104], [1, 2, 3], [1, 2, 3], [1, -1, 3]])
    backend = Emulated(library)
    both: list[dict[str, Any]] = [{"labels": labels}, {"labels": labels, "kept_ids": kept}]
    for tables in both:
        logprobs = backend.rows("logprobs", logits, None, tables, without_loss(1.0))[native.ROW_FIELDS.index("logprob")]
        assert logprobs.isnan().tolist() == [len(tables) == 2, True, True, False]


def test_a_cluster_that_cannot_be_and_a_kernel_that_is_stuck(library: ctypes.CDLL) -> None:
    with pytest.raises(KernelError, match="error 9"):
        tensors: dict[str, Any] = {"logits": torch.zeros(2, 7), "labels": torch.zeros(2, dtype=torch.long)}
        args, _ = native.row_args("logprobs", tensors | {"rows": torch.zeros(9, 2)}, without_loss(1.0))
        Emulated.check(library.srpo_cuda_rows(ctypes.byref(args), 0, 8, None))
    with pytest.raises(KernelError, match="error 702"):
        Emulated.check(library.simt_stuck())


@pytest.mark.parametrize(
    ("file", "safeguard"),
    [
        ("rows_one_read.cuh", "      bulk_stores_wait<false>();\n"),  # a slice is stored before the next row overwrites it
        ("rows_one_read.cuh", "    barrier_wait(&s.finished[stage], n / kStages);\n"),  # and only when its gradient is complete
        ("rows_one_read.cuh", "      barrier_wait(&s.loaded[stage], n / kStages);\n"),
        ("rows_filtered.cuh", "      __syncthreads();\n"),  # no bit is set before all are 0
        ("top_k.cuh", "      __syncthreads();\n"),  # a step of the sort ends before the next begins
    ],
)
def test_the_emulator_notices_a_missing_safeguard(file: str, safeguard: str, tmp_path: Path) -> None:
    for path in build.CSRC.iterdir():
        text = path.read_text(encoding="utf-8")
        if path.name == file:
            assert text.count(safeguard) == 1
            text = text.replace(safeguard, "")
        (tmp_path / path.name).write_text(text, encoding="utf-8")
    library = compile_library(tmp_path / "broken.so", tmp_path)
    backend = Emulated(library)

    def is_right(seed: int) -> bool:
        library.simt_seed(seed)
        case = cases.draw(seed, 12, 8200, torch.bfloat16, "kept" if file == "rows_filtered.cuh" else "k3")
        if file == "top_k.cuh":
            return torch.equal(backend.top_k(case.logits, 50), largest(case.logits, 50))
        gradient = case.logits.clone()
        try:
            backend.rows("policy_loss", gradient, gradient, case.tables, LossOptions(**case.options))
        except KernelError:
            return False
        return cases.relative(gradient, case.exact()[1]) < 0.01

    assert not all(is_right(seed) for seed in range(30))


def largest(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Ids of the largest logits, equal ones in the order of their ids, NaN first."""
    return logits.float().sort(dim=1, descending=True, stable=True).indices[:, :top_k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocab", "top_k"), [(1, 1, 1), (5, 7, 3), (4, 3000, TOP_K), (3, 50257, 100), (2, 151936, 100)]
)
def test_top_k(library: ctypes.CDLL, num_rows: int, vocab: int, top_k: int, dtype: torch.dtype) -> None:
    library.simt_seed(cases.a_seed())
    logits = torch.randn(num_rows, vocab + 3).to(dtype)[:, 1 : vocab + 1]  # rows begin anywhere in a unit
    assert torch.equal(Emulated(library).top_k(logits, top_k), largest(logits, top_k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top_k_of_difficult_rows(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Ascending rows fill the buffer again and again; equal ones, zeros of both signs, infinities and NaN are in order."""
    library.simt_seed(cases.a_seed())
    rising = torch.arange(30_000.0) / 30_000
    tied = torch.randint(3, (30_000,)).float()
    signs = torch.zeros(30_000).copysign(torch.randn(30_000))
    special = torch.full((30_000,), -torch.inf)
    special[20_000:20_003] = torch.tensor([torch.inf, torch.nan, -torch.nan])
    rows = [rising, -rising, tied, signs, special, special.flip(0), torch.full((30_000,), -torch.inf)]
    logits = torch.stack(rows).to(dtype)
    for top_k in (1, 50, TOP_K):
        assert torch.equal(Emulated(library).top_k(logits, top_k), largest(logits, top_k)), top_k


def test_loss_on_the_support_it_finds(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """top_k alone: one kernel finds the support, another takes the loss on it."""
    backend, calls = Emulated(library), []
    monkeypatch.setitem(operators.BACKENDS, "simt", backend)
    monkeypatch.setattr(cuda, "why_not", backend.why_not)
    monkeypatch.setattr(cuda, "top_k", lambda logits, top_k: calls.append(top_k) or backend.top_k(logits, top_k))
    case = cases.draw(cases.a_seed(), 20, 5000, torch.float32, "k3", nan=False)
    assert torch.equal(topk_support(case.logits, 50), largest(case.logits, 50))
    assert topk_support(case.logits[:, :7], 50).shape == (20, 7) and topk_support(case.logits, TOP_K + 1).shape == (20, TOP_K + 1)
    case.options["top_k"] = 50
    case.tables["old_logprobs"] = None
    exact, exact_grad = case.exact()
    out, grad = case.measured("simt")
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=6e-8, atol=2e-6)
    assert case.error(grad, exact_grad) <= 3e-7
    assert int((grad != 0).sum(1).max()) <= 51
    assert calls == [50, 7, 50], "the exact loss and the support of more ids are torch.topk's"


@pytest.mark.parametrize(("dtype", "vocab", "cluster"), [(torch.bfloat16, 151936, 8), (torch.float32, 151936, 16)])
def test_the_plan_for_qwen(library: ctypes.CDLL, dtype: torch.dtype, vocab: int, cluster: int) -> None:
    args, _ = native.row_args("logprobs", {"logits": torch.empty(1, vocab, dtype=dtype)}, without_loss(1.0))
    assert library.srpo_cuda_cluster(ctypes.byref(args), 0) == cluster


def test_ignored_rows_alone(library: ctypes.CDLL) -> None:
    logits, labels = torch.full((300, 16), torch.nan), torch.full((300,), IGNORE)
    for columns in (16, 15):  # either kernel
        rows = Emulated(library).rows("logprobs", logits[:, :columns], None, {"labels": labels}, without_loss(1.0))
        assert not bool(rows[:-1].any()) and bool((rows[-1] == -1).all())
