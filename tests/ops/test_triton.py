"""The Triton kernels against the fp64 reference: in Triton's interpreter on a CPU, and with `-m gpu` the same tests on a GPU.

TRITON_INTERPRET must be set before triton is first imported, so `test_in_the_interpreter` runs this file in another process; in
every other process the tests need a GPU. The interpreter does not check types (test_triton_compile.py does) or the interleaving
of threads, and it rounds to bf16 by truncation.
"""

from __future__ import annotations

import math
import sys
from itertools import product
from typing import Any

import loss_cases as cases
import pytest
import torch
from interpreter import DEVICE, INTERPRETED, on_device, run_interpreted
from srpo_kernels import IGNORE, LossOptions, token_logprobs, triton_rows
from srpo_kernels.native import ROW_FIELDS

OPTIONS = ("plain", "k1", "k2", "k3", "full", "kept", "kept_full", "cispo", "on_policy", "on_policy_kl")
SMALL = [(3, 7), (7, 1000)]
# A held tile alone, several, and with streamed ones before; widths that are no multiple of anything
LARGE = [(0, 7), (1, 1), (33, 30), (3, 5003), (2, 50257)]
VAST = [(3, 32000), (2, 151643), (2, 151936), (2, 262144)]
# Many rows take the interpreter too long.
MANY = [] if INTERPRETED else [*product(OPTIONS, [(257, 1000)]), *product(("k3", "full"), [(300, 32000), (200, 151936)])]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.timeout(900)  # minutes, on a busy machine
def test_in_the_interpreter() -> None:
    run_interpreted(__file__, "not in_the_interpreter and not why_not")


def draw(*args: Any, **kw: Any) -> cases.Case:
    case = cases.draw(cases.a_seed(), *args, **kw)
    tables = {name: None if table is None else table.to(DEVICE) for name, table in case.tables.items()}
    return cases.Case(case.logits.to(DEVICE), tables, case.options)


def rows_of(case: cases.Case, dlogits: torch.Tensor | None, first_row: int = 0) -> torch.Tensor:
    """The backend's values per row, and the gradient in `dlogits`."""
    return triton_rows.rows("policy_loss", case.logits, dlogits, case.tables, LossOptions(**case.options), first_row)


def poisoned(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(logits.shape, math.nan, dtype=dtype, device=logits.device)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16 as the device does it."""
    return (
        (x.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
        if INTERPRETED
        else x.to(torch.bfloat16)
    )


@on_device
@pytest.mark.parametrize(
    ("name", "shape"),
    [*product(OPTIONS, SMALL), *product(("k3", "full", "kept"), LARGE), *product(("k3",), VAST), *MANY],
    ids=str,
)
def test_equals_fp64(name: str, shape: tuple[int, int]) -> None:
    case = draw(*shape, torch.float32, name)
    cases.check(case, "triton", in_place=False)
    cases.check(case, "triton", in_place=True)  # rows V + 3 apart: not in 16-byte units


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "name"), [((8, 1000), "k3"), ((4, 5003), "full"), ((8, 1000), "kept"), ((2, 50272), "k3")], ids=str
)
def test_16_bit_logits(shape: tuple[int, int], name: str, dtype: torch.dtype) -> None:
    """The gradient in fp32 is as accurate as for fp32 logits, and that in 16 bits is the same one rounded."""
    case = draw(*shape, dtype, name)
    _, exact = case.exact()
    wide, narrow = poisoned(case.logits, torch.float32), poisoned(case.logits, dtype)
    rows = rows_of(case, wide)
    assert torch.equal(rows, rows_of(case, narrow))
    assert torch.equal(narrow, rounded(wide) if dtype == torch.bfloat16 else wide.to(dtype))
    weights = case.tables["weights"]
    assert weights is not None and cases.relative(wide, exact, float(weights.norm())) <= 3e-7
    out, _ = case.measured("triton", in_place=True)
    torch.testing.assert_close(out.logprobs.double(), case.exact()[0].logprobs, rtol=6e-8, atol=2e-6)


@on_device
@pytest.mark.parametrize(
    ("name", "dtype"), [("k3", torch.float32), ("full", torch.bfloat16), ("kept_full", torch.float32)], ids=str
)
def test_the_same_bits_in_place_and_again(name: str, dtype: torch.dtype) -> None:
    case = draw(4, 21001, dtype, name)
    first, again, none = (poisoned(case.logits, dtype) for _ in range(3))
    rows = rows_of(case, first)
    assert torch.equal(rows, rows_of(case, again)) and torch.equal(rows, rows_of(case, None))
    case.logits = none.copy_(case.logits)
    assert torch.equal(rows, rows_of(case, case.logits))
    assert torch.equal(first, again) and torch.equal(first, case.logits)


@on_device
def test_fp32_logits_and_a_bf16_gradient() -> None:
    case = draw(9, 5000, torch.float32, "k3")
    wide, narrow = poisoned(case.logits, torch.float32), poisoned(case.logits, torch.bfloat16)
    assert torch.equal(rows_of(case, wide), rows_of(case, narrow))
    assert torch.equal(narrow, rounded(wide))


@on_device
@pytest.mark.parametrize("name", ["k3", "full", "kept"])
def test_a_slice_of_the_batch_is_that_of_the_whole(name: str) -> None:
    case = draw(10, 300, torch.float32, name)
    full = poisoned(case.logits, torch.float32)
    rows = rows_of(case, full)
    per_row = ("labels", "weights", "old_logprobs", "ref_logprobs", "kept_ids", "ref_logits")
    for start, end in ((0, 4), (4, 5), (5, 10)):
        tables = {k: v[start:end] if k in per_row and v is not None else v for k, v in case.tables.items()}
        part = cases.Case(case.logits[start:end], tables, case.options)
        d = poisoned(part.logits, torch.float32)
        assert torch.equal(rows_of(part, d, first_row=start), rows[:, start:end]) and torch.equal(d, full[start:end])


@on_device
def test_offsets_of_more_than_32_bits() -> None:
    """Rows 2^30 elements apart, so that the last one begins at element 2^31. Memory between rows is never touched."""
    case = draw(3, 304, torch.float16, "k3", nan=False)
    assert case.tables["labels"] is not None
    case.tables["labels"].clamp_(min=0)
    near = poisoned(case.logits, torch.float16)
    rows = rows_of(case, near)
    far = torch.empty(2**31 + 304, dtype=torch.float16, device=DEVICE).as_strided((3, 304), (2**30, 1))
    far.copy_(case.logits)
    assert torch.equal(rows_of(cases.Case(far, case.tables, case.options), far), rows) and torch.equal(far, near)
    assert torch.equal(triton_rows.scale_(far, torch.full((), 0.5, device=DEVICE)), near / 2)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter too long")
def test_more_rows_than_a_grid_may_have_in_its_other_dimensions() -> None:
    logits, labels = torch.randn(70_001, 16, device=DEVICE), torch.randint(16, (70_001,), device=DEVICE)
    logprobs = token_logprobs(logits, labels, temperature=1.0, impl="triton")[0]
    expected = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2e-6)


@on_device
@pytest.mark.parametrize("power", [24, 27] if INTERPRETED else [23, 24, 25, 26, 27])
def test_small_terms_are_not_lost_in_a_large_sum(power: int) -> None:
    cases.check_small_terms("triton", power, DEVICE)


@on_device
@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
@pytest.mark.parametrize("name", ["k3", "full", "kept"])
def test_huge_tiny_and_equal_logits(name: str, scale: float) -> None:
    case = draw(8, 3000, torch.float32, name, scale=scale)
    case.tables["old_logprobs"] = None  # one of -20,000 is stored to 1e-3, and a ratio is no better than that
    if name != "full":
        case.options["kl_coef"] = 0.0
    exact, exact_grad = case.exact()
    out, grad = case.measured("triton")
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=6e-8, atol=2e-6)
    assert case.error(grad, exact_grad) <= 3e-7


@on_device
def test_columns_of_minus_infinity() -> None:
    case = draw(12, 22000, torch.float32, "k3", nan=False)
    labels = case.tables["labels"]
    assert labels is not None
    blocked = torch.rand(case.logits.shape, device=DEVICE) < 0.5
    blocked[:, 4096:8192] = True  # a streamed tile with nothing in it
    blocked[:, 12288:] = True  # the last ones, too
    blocked[labels != IGNORE, labels[labels != IGNORE]] = False
    case.logits[blocked] = -torch.inf
    cases.check(case, "triton", in_place=False)
    assert not bool(case.measured("triton")[1][blocked].any())


@on_device
@pytest.mark.parametrize("vocab", [1, 2500, 21000])
def test_a_single_finite_entry(vocab: int) -> None:
    case = draw(12, vocab, torch.float32, "on_policy", nan=False)
    labels = case.tables["labels"]
    assert labels is not None
    case.logits.fill_(-torch.inf)[torch.arange(12), labels.clamp(min=0)] = 3.0
    out, grad = case.measured("triton")
    assert not bool(out.logprobs.any()) and not bool(grad.any()) and float(out.stats.sum_entropy.abs().max()) < 2e-6


@on_device
def test_a_label_that_is_impossible_or_not_a_number_or_no_column() -> None:
    logits = torch.randn(6, 100, device=DEVICE)
    logits[0, 5], logits[1, 7] = -torch.inf, torch.nan
    labels = torch.tensor([5, 8, 9, 100, -1, 2**40], device=DEVICE)
    logprobs, lse = token_logprobs(logits, labels, temperature=1.0, impl="triton")
    assert logprobs[0] == -torch.inf and logprobs[1].isnan() and lse[1].isnan() and bool(logprobs[3:].isnan().all())
    kept_ids = torch.tensor([[3], [3], [3], [3], [3], [100]], device=DEVICE)
    labels = torch.tensor([1, 1, 1, 100, -7, 1], device=DEVICE)
    logprobs, _ = token_logprobs(logits, labels, temperature=1.0, kept_ids=kept_ids, impl="triton")
    assert bool(logprobs[:3].isfinite().all()) and bool(logprobs[3:].isnan().all())


@on_device
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logprobs_and_their_gradient(dtype: torch.dtype, kept: bool) -> None:
    """With labels on the edges of tiles: in fp32 20,000 columns are one streamed tile and four held ones."""
    edges = torch.tensor([0, 1, 15, 16, 4094, 4095, 4096, 4097, 8191, 8192, 16383, 16384, 19999, IGNORE])
    case = draw(len(edges), 20000, dtype, "kept" if kept else "plain", nan=False)
    case.logits[-1] = math.nan
    options: dict[str, Any] = {"temperature": 0.8, "kept_ids": case.tables["kept_ids"]}
    upstream, upstream_lse = torch.randn(2, len(edges), device=DEVICE)

    def gradient(logits: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = logits.clone().requires_grad_()
        logprobs, lse = token_logprobs(logits, edges.to(DEVICE), **options, impl=impl)
        return logprobs, lse, torch.autograd.grad((logprobs * upstream + lse * upstream_lse).sum(), logits)[0]

    logprobs, lse, grad = gradient(case.logits, "triton")
    exact_logprobs, exact_lse, exact = gradient(case.logits.double(), "reference")
    torch.testing.assert_close(logprobs.double(), exact_logprobs, rtol=6e-8, atol=2e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=6e-8, atol=2e-6)
    assert cases.relative(grad, exact) <= (3e-7 if dtype == torch.float32 else 1.05 * cases.relative(exact.to(dtype), exact))


@on_device
@pytest.mark.parametrize("name", ["plain", "full", "kept"])
def test_a_token_that_has_not_moved_has_ratio_one(name: str) -> None:
    case = draw(12, 20000 if name == "plain" else 3000, torch.bfloat16, name)
    options = {"temperature": case.options["temperature"], "kept_ids": case.tables["kept_ids"], "impl": "triton"}
    labels = case.tables["labels"]
    assert labels is not None
    case.tables["old_logprobs"] = token_logprobs(case.logits, labels, **options)[0]
    case.options |= {"clip_eps_low": 0.0, "clip_eps_high": 0.0}  # any other ratio would be clipped
    stats = case.measured("triton")[0].stats
    assert torch.equal(stats.sum_ratio, stats.num_tokens) and not bool(stats.num_clipped.any())


@on_device
def test_on_and_beside_the_edges_of_clipping() -> None:
    """Rows of two equal logits. Log ratios around those of 1.25 and 0.75, by 1e-6; ratio 1 on an edge, and ratios beyond e^20."""
    log_ratios = [math.log(edge) + side for edge in (1.25, 0.75) for side in (-1e-6, 1e-6)] + [0.0, 0.0, 25.0, 25.0]
    advantages = torch.tensor([[1.0], [1.0], [-1.0], [-1.0], [1.0], [-1.0], [-1.0], [1.0]])
    num_rows = len(log_ratios)
    logits = torch.zeros(num_rows, 2, device=DEVICE)
    tables: dict[str, torch.Tensor | None] = {
        "labels": torch.zeros(num_rows, dtype=torch.long, device=DEVICE),
        "step_advantages": advantages.to(DEVICE),
        "step_ends": torch.ones(num_rows, 1, device=DEVICE),
        "cu_seqlens": torch.arange(num_rows + 1, device=DEVICE),
        "weights": torch.ones(num_rows, device=DEVICE),
        "old_logprobs": -math.log(2) - torch.tensor(log_ratios, device=DEVICE),
    }

    def run(eps: float, dual_clip: float | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
        dlogits = poisoned(logits, torch.float32)
        options = LossOptions(eps, eps, kl_coef=0.0, kl_estimator="k3", temperature=1.0, dual_clip=dual_clip)
        rows = triton_rows.rows("policy_loss", logits, dlogits, tables, options)
        return dict(zip(ROW_FIELDS, rows.cpu(), strict=True)), dlogits[:, 0].tolist()

    row, gradient = run(0.25)
    assert row["clipped"].tolist() == [0, 1, 1, 0, 0, 0, 0, 1]
    ratios = [min(math.exp(x), math.exp(20)) for x in log_ratios]
    assert row["ratio"].tolist() == pytest.approx(ratios, rel=1e-6)
    assert row["loss"].tolist() == pytest.approx([-1.25, -1.25, 0.75, 0.75, -1, 1, math.exp(20), -1.25], rel=1e-5)
    assert gradient == pytest.approx([-0.625, 0, 0, 0.375, -0.5, 0.5, 0, 0], rel=1e-5)
    assert run(0.0)[0]["clipped"].tolist() == [1, 1, 1, 1, 0, 0, 0, 1]
    row, gradient = run(0.25, dual_clip=3.0)
    assert row["clipped"].tolist() == [0, 1, 1, 0, 0, 0, 1, 1] and row["loss"][6] == 3 and gradient[6] == 0


@on_device
def test_a_reference_that_is_infinitely_far_away_only_measures() -> None:
    case = draw(9, 700, torch.float32, "full", nan=False)
    assert case.tables["ref_logits"] is not None
    case.tables["ref_logits"][:, 3] = -torch.inf
    case.options["kl_coef"] = 0.0
    _, exact = case.exact()
    out, grad = case.measured("triton")
    assert case.error(grad, exact) <= 3e-7 and bool(out.stats.sum_kl.isinf().any())


@on_device
def test_columns_apart_and_no_gradient_wanted() -> None:
    case = draw(9, 300, torch.float32, "full")
    rows = rows_of(case, None)
    for name in ("logits", "ref_logits"):
        apart = (case.logits if name == "logits" else case.tables[name]).t().contiguous().t()  # pyright: ignore
        tables = case.tables if name == "logits" else {**case.tables, name: apart}
        other = cases.Case(apart if name == "logits" else case.logits, tables, case.options)
        assert torch.equal(rows, rows_of(other, None))
    out = case.run(case.logits, "triton")
    assert not out.loss.requires_grad and torch.equal(out.logprobs, rows[ROW_FIELDS.index("logprob")])


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scaling_in_place(dtype: torch.dtype) -> None:
    padded = torch.randn(5, 5003, device=DEVICE).to(dtype)
    values = padded[:, :5000]
    before = padded.clone()
    assert triton_rows.scale_(values, torch.ones(1, device=DEVICE)) is values and torch.equal(padded, before)
    triton_rows.scale_(values, torch.full((), 0.5, device=DEVICE))
    assert torch.equal(values, before[:, :5000] / 2) and torch.equal(padded[:, 5000:], before[:, 5000:])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_other_batches_need_no_new_compilation() -> None:
    module = triton_rows.kernels()
    assert not isinstance(module, str)

    def num_compiled() -> int:
        return len(module.rows_kernel.device_caches[torch.cuda.current_device()][0])

    rows_of(draw(16, 4096, torch.bfloat16, "k3"), None)
    before = num_compiled()
    for num_rows in (1, 3, 17, 64):
        case = draw(num_rows, 4096, torch.bfloat16, "k3")
        case.options |= {"temperature": 1.0 + num_rows, "clip_eps_low": 0.0, "kl_coef": 1.0}
        rows_of(case, None)
    assert num_compiled() == before


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_rows.why_not(torch.empty(0, 1, dtype=torch.float64)) == "logits are torch.float64"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_rows.why_not(torch.empty(0, 1)) == "logits are on cpu"
    triton_rows.kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    try:
        assert "triton cannot be imported" in str(triton_rows.kernels())
    finally:
        triton_rows.kernels.cache_clear()
