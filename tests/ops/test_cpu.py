"""The C++ kernels against the fp64 reference, on every instruction set of this machine."""

from __future__ import annotations

import ctypes
import os
import re
from itertools import product
from pathlib import Path
from typing import Any

import loss_cases as cases
import pytest
import torch
from loss_cases import policy_loss
from srpo_kernels import IGNORE, build, cpu, token_logprobs

OPTIONS = ("plain", "k1", "k2", "k3", "full", "kept", "kept_full", "cispo", "on_policy", "on_policy_kl")
SMALL = [(0, 7), (1, 1), (3, 7), (257, 1000), (33, 2048)]
LARGE = [(31, 32000), (9, 50257), (3, 151643), (3, 151936), (2, 262144)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def levels() -> tuple[str, ...]:
    """Instruction sets that this machine supports, slowest first; none without a compiler."""
    library = cpu.library()
    return () if isinstance(library, build.BuildError) else cpu.LEVELS[: library.srpo_cpu_level() + 1]


@pytest.fixture(params=cpu.LEVELS, autouse=True)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces an instruction set; "all": the test loops over them itself."""
    if request.param == "all":
        return "all"
    if request.param not in levels():
        pytest.skip(f"this machine has no {request.param}, or no compiler")
    monkeypatch.setattr(cpu, "forced_level", request.param)
    return request.param


@pytest.mark.parametrize("level", ["all"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "name"), [*product(SMALL, OPTIONS), *product(LARGE, ("k3", "full"))], ids=lambda x: str(x).replace(", ", "x")
)
def test_equals_fp64(shape: tuple[int, int], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not levels():
        pytest.skip("no compiler")
    case = cases.draw(cases.a_seed(), *shape, dtype, name)
    fp64 = case.exact()
    for level in levels():
        print(level)
        monkeypatch.setattr(cpu, "forced_level", level)
        cases.check(case, "cpu", in_place=False, fp64=fp64)
        cases.check(case, "cpu", in_place=True, fp64=fp64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_place_and_again_and_with_more_threads(dtype: torch.dtype) -> None:
    case = cases.draw(cases.a_seed(), 61, 3001, dtype, "k3")
    out, grad = case.measured("cpu")
    again, same = case.measured("cpu", in_place=True)
    assert torch.equal(grad, same) and torch.equal(out.logprobs, again.logprobs) and out.loss == again.loss
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threaded, same = case.measured("cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(grad, same) and torch.equal(out.stats.stack(), threaded.stats.stack())


@pytest.mark.parametrize("num_rows", [60, 4500])
def test_a_gradient_that_bypasses_the_caches_is_the_same(num_rows: int) -> None:
    """Large gradients are written past the caches (4,500 x 1,500 in fp32 is 27 MB); each row is what it is alone."""
    case = cases.draw(cases.a_seed(), num_rows, 1500, torch.float32, "plain")
    _, grad = case.measured("cpu", in_place=True)
    exact = case.exact()[1]
    assert case.error(grad, exact) <= 3e-7
    assert bool((grad[case.tables["labels"] == IGNORE] == 0).all())


@pytest.mark.parametrize("power", [23, 24, 25, 26, 27])
def test_small_terms_are_not_lost_in_a_large_sum(power: int) -> None:
    cases.check_small_terms("cpu", power)


@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
@pytest.mark.parametrize("name", ["k3", "full", "kept"])
def test_huge_tiny_and_equal_logits(name: str, scale: float) -> None:
    case = cases.draw(cases.a_seed(), 40, 3000, torch.float32, name, scale=scale)
    case.tables["old_logprobs"] = None  # one of -20,000 is stored to 1e-3, and a ratio is no better than that
    if name != "full":
        case.options["kl_coef"] = 0.0
    exact, exact_grad = case.exact()
    out, grad = case.measured("cpu")
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=6e-8, atol=2e-6)
    assert case.error(grad, exact_grad) <= 3e-7


def test_columns_of_minus_infinity() -> None:
    case = cases.draw(cases.a_seed(), 30, 5000, torch.float32, "k3", nan=False)
    labels = case.tables["labels"]
    blocked = torch.rand(30, 5000) < 0.5
    blocked[:, 2048:4096] = True  # a tile with nothing in it
    blocked[labels != IGNORE, labels[labels != IGNORE]] = False
    case.logits[blocked] = -torch.inf
    cases.check(case, "cpu", in_place=False)
    assert not bool(case.measured("cpu")[1][blocked].any())


def test_a_single_finite_entry() -> None:
    case = cases.draw(cases.a_seed(), 12, 2500, torch.float32, "on_policy", nan=False)
    labels = case.tables["labels"]
    case.logits.fill_(-torch.inf)[torch.arange(12), labels.clamp(min=0)] = 3.0
    out, grad = case.measured("cpu")
    assert not bool(out.logprobs.any()) and not bool(grad.any())
    assert bool((out.stats.sum_entropy.abs() <= 3e-7 * out.stats.num_tokens).all())  # of each token: rounding of a sum of ones


def test_a_label_that_is_impossible_or_not_a_number() -> None:
    logits = torch.randn(3, 100)
    logits[0, 5], logits[1, 7] = -torch.inf, torch.nan
    labels = torch.tensor([5, 8, 9])
    logprobs, lse = token_logprobs(logits, labels, temperature=1.0, impl="cpu")
    assert logprobs[0] == -torch.inf and logprobs[1].isnan() and lse[1].isnan() and logprobs[2].isfinite()


@pytest.mark.parametrize("label", [5, -1, -101, 2**40])
def test_labels_and_ids_that_are_no_columns(label: int) -> None:
    logits = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\) or be -100"):
        token_logprobs(logits, torch.tensor([1, label]), temperature=1.0, impl="cpu")
    if label > 0:
        with pytest.raises(ValueError, match="kept id is not a column"):
            kept_ids = torch.tensor([[0], [label]])
            token_logprobs(logits, torch.tensor([1, 1]), temperature=1.0, kept_ids=kept_ids, impl="cpu")


def test_labels_on_the_edges_of_tiles_and_vectors() -> None:
    labels = torch.tensor([0, 1, 15, 16, 63, 64, 2047, 2048, 2049, 4095, 4096, 4099])
    logits = torch.randn(len(labels), 4100)
    x = logits.clone().requires_grad_()
    logprobs, lse = token_logprobs(x, labels, temperature=0.9, impl="cpu")
    upstream, upstream_lse = torch.randn(len(labels)), torch.randn(len(labels))
    (grad,) = torch.autograd.grad((logprobs * upstream + lse * upstream_lse).sum(), x)
    y = logits.double().requires_grad_()
    exact, exact_lse = token_logprobs(y, labels, temperature=0.9, impl="reference")
    (exact_grad,) = torch.autograd.grad((exact * upstream + exact_lse * upstream_lse).sum(), y)
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=2e-6)
    assert float((grad - exact_grad).norm() / exact_grad.norm()) <= 3e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [False, True])
def test_logprobs_and_their_gradient(dtype: torch.dtype, kept: bool) -> None:
    case = cases.draw(cases.a_seed(), 50, 3000, dtype, "kept" if kept else "plain")
    options: dict[str, Any] = {"temperature": 0.8, "kept_ids": case.tables["kept_ids"]}
    upstream, upstream_lse = torch.randn(50), torch.randn(50)

    def gradient(logits: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = logits.clone().requires_grad_()
        logprobs, lse = token_logprobs(logits, case.tables["labels"], **options, impl=impl)
        loss = (logprobs * upstream + lse * upstream_lse).sum()
        return logprobs, lse, torch.autograd.grad(loss, logits)[0]

    logprobs, lse, grad = gradient(case.logits, "cpu")
    exact_logprobs, exact_lse, exact = gradient(case.logits.double(), "reference")
    torch.testing.assert_close(logprobs.double(), exact_logprobs, rtol=6e-8, atol=2e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=6e-8, atol=2e-6)
    assert cases.relative(grad, exact) <= (3e-7 if dtype == torch.float32 else 1.05 * cases.relative(exact.to(dtype), exact))


def test_a_token_that_has_not_moved_has_ratio_one() -> None:
    case = cases.draw(cases.a_seed(), 100, 3000, torch.bfloat16, "plain")
    options = {"temperature": case.options["temperature"], "impl": "cpu"}
    case.tables["old_logprobs"] = token_logprobs(case.logits, case.tables["labels"], **options)[0]
    case.options |= {"clip_eps_low": 0.0, "clip_eps_high": 0.0}  # any other ratio would be clipped
    stats = case.measured("cpu")[0].stats
    assert torch.equal(stats.sum_ratio, stats.num_tokens) and not bool(stats.num_clipped.any())
    exact = token_logprobs(case.logits.double(), case.tables["labels"], temperature=1.0, impl="reference")[0]
    case.tables["old_logprobs"] = exact.float()
    case.options |= {"clip_eps_low": 0.2, "clip_eps_high": 0.2}
    stats = case.measured("cpu")[0].stats
    assert float((stats.sum_ratio / stats.num_tokens.clamp(min=1) - (stats.num_tokens > 0).double()).abs().max()) <= 1e-5


def test_rounding_to_16_bits_is_to_nearest_even() -> None:
    """Gradients of every size down to the subnormals: one row for each, whose weight is the scale."""
    weights = torch.cat([10.0 ** torch.linspace(-12, 4, 4000), torch.tensor([65519.9, 65520.1, 6e4])])
    logits = torch.zeros(len(weights), 2)
    for dtype in (torch.bfloat16, torch.float16):
        x = logits.to(dtype).requires_grad_()
        tables = (torch.full((1, 1), -1.0), torch.ones(1, 1), torch.tensor([0, len(weights)]), 2 * weights)
        options: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "kl_coef": 0.0, "kl_estimator": "k3"}
        out = policy_loss(x, torch.zeros(len(weights), dtype=torch.long), *tables, **options, temperature=1.0, impl="cpu")
        out.loss.backward()
        assert x.grad is not None and torch.equal(x.grad[:, 0], weights.to(dtype)) and torch.equal(x.grad[:, 1], -x.grad[:, 0])


@pytest.mark.slow
def test_more_logits_than_32_bits_count(level: str) -> None:
    num_rows, vocab, period = 2**16 + 2**12, 2**15 + 64, 2**6  # 2.3 billion, 4.6 GB
    if level != levels()[-1]:
        pytest.skip("takes long on the lesser instruction sets")
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 * 2**30:
        pytest.skip("less than 8 GiB of memory are free")
    part = 3 * torch.randn(period, vocab, generator=torch.Generator().manual_seed(cases.a_seed()))
    labels = torch.randint(vocab, (period,))

    def run(times: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities, gradient) of the part, repeated, as one sequence."""
        logits = torch.empty(times * period, vocab, dtype=torch.bfloat16)
        logits.view(times, period, vocab).copy_(part)
        logits.requires_grad_()
        tables = (torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0, len(logits)]), torch.ones(len(logits)))
        options: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "kl_coef": 0.0, "kl_estimator": "k3"}
        out = policy_loss(logits, labels.repeat(times), *tables, **options, temperature=1.0, in_place=True, impl="cpu")
        out.loss.backward()
        assert logits.grad is not None
        return out.logprobs, logits.grad

    logprobs, gradient = run(1)
    many_logprobs, many_gradients = run(num_rows // period)
    assert torch.equal(many_logprobs, logprobs.repeat(num_rows // period))
    assert all(torch.equal(part, gradient) for part in many_gradients.split(period))


def test_nothing_is_compiled_twice(level: str) -> None:
    library = build.build_cpu()
    stamp = library.stat().st_mtime_ns
    assert build.build_cpu() == library and library.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("level", ["all"], indirect=True)
def test_a_cached_library_that_is_not_whole_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loading a cut library ends the process with a bus error."""
    monkeypatch.setenv("SRPO_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int seven() { return 7; }')
    commands = [[os.environ.get("CXX") or "g++", "-shared", "-fPIC", str(source), "-o", "{out}"]]
    library = build.compile_once("tiny", [], commands)
    whole = library.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:-1] + b"x"):
        library.unlink()  # a file of its own: the last one is loaded
        library.write_bytes(damage)
        again = build.compile_once("tiny", [], commands)
        assert ctypes.CDLL(str(again)).seven() == 7
    monkeypatch.setattr(build, "_version", lambda compiler: "another")
    assert build.compile_once("tiny", [], commands) != library


@pytest.mark.parametrize("level", ["all"], indirect=True)
def test_a_cache_that_cannot_be_made_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = {"file/cache": "Not a directory", "x" * 300: "File name too long", "file": "Not a directory|File exists"}
    for place, reason in places.items():
        monkeypatch.setenv("SRPO_CACHE_DIR", str(tmp_path / place))
        with pytest.raises(build.BuildError, match=rf"{place[:4]}.*: ({reason}): set SRPO_CACHE_DIR to a folder") as caught:
            build.compile_once("tiny", [], [["g++", "-o", "{out}"]])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [build.build_cpu, build.build_cuda])
def test_a_library_is_named_by_all_that_it_is_made_from(make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise the cache would miss the change of a header."""
    known: set[str] = set()
    monkeypatch.setenv("NVCC", "true")

    def compile_once(name: str, sources: list[str], commands: object) -> Path:
        known.update(sources)
        return tmp_path

    monkeypatch.setattr(build, "compile_once", compile_once)
    make()
    assert known
    for source in known:
        included = re.findall(r'#include "(.*)"', (build.CSRC / source).read_text(encoding="utf-8"))
        assert known.issuperset(included), source


def test_a_compiler_from_before_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other instruction sets are built."""
    monkeypatch.setattr(build, "_takes", lambda compiler, flag: False)
    text = repr(build.cpu_commands())
    assert "avx512bf16" not in text and "AVX512BF16" not in text and "rows_cpu.cpp" in text


@pytest.mark.parametrize("level", ["all"], indirect=True)
def test_a_gradient_leaves_its_memory_to_the_next(level: str) -> None:
    """But not while a tensor, a view or an array still uses it, nor to a gradient that is much smaller or larger."""
    cpu.empty_cache()
    rows = cpu.KEPT_BYTES // 4000
    logits = torch.zeros(1, 1000).expand(rows + 1, 1000)

    def fresh(like: torch.Tensor) -> torch.Tensor:
        gradient = cpu.new_gradient(like)
        assert gradient.shape == like.shape and gradient.dtype == like.dtype and gradient.is_contiguous()
        return gradient.fill_(1)

    first = fresh(logits)
    address, last_row, array = first.data_ptr(), first[-1], first.numpy()
    del first
    second = fresh(logits)
    addresses = {address, second.data_ptr()}
    assert len(addresses) == 2
    second[:] = 2
    assert bool((last_row == 1).all()) and bool((array == 1).all())
    del second, last_row, array
    third = fresh(logits.bfloat16()[:-1])
    assert third.nbytes < cpu.KEPT_BYTES and len(cpu._kept) == 1  # too small to be worth it
    fourth = fresh(logits.bfloat16().expand(2, rows + 1, 1000).reshape(-1, 500))  # of the same size in another shape and dtype
    assert fourth.data_ptr() in addresses and not cpu._kept
    del fourth
    large = fresh(logits.expand(3, rows + 1, 1000).reshape(-1, 1000))
    assert large.nbytes > 2 * logits.nbytes
    del large
    assert cpu._kept[0].nbytes > 2 * logits.nbytes
    small = fresh(logits)  # does not hold on to three times of what it needs
    assert not cpu._kept
    del small
    assert cpu._kept[0].nbytes < 2 * logits.nbytes
    cpu.empty_cache()
    assert not cpu._kept
