"""The CUDA C++ kernels on a GPU, against the fp64 reference. `pytest -m gpu tests/ops/test_cuda.py`.

For memory errors and races, on a few rows of each kind:
`compute-sanitizer --tool memcheck python -m pytest -q -m gpu tests/ops/test_cuda.py -k "forced or once or bits"`, and the same
with `--tool racecheck`, `synccheck` and `initcheck`.
"""

from __future__ import annotations

import ctypes
from itertools import product
from typing import Any

import loss_cases as cases
import pytest
import torch
from srpo_kernels import IGNORE, LossOptions, cuda, operators, token_logprobs, topk_support
from srpo_kernels.native import ROW_FIELDS, row_args
from srpo_kernels.options import without_loss

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
OPTIONS = ("plain", "k1", "k2", "k3", "full", "kept", "kept_full", "cispo", "on_policy", "on_policy_kl")
CLUSTERS = (1, 2, 4, 8, 16)  # CTAs per row
SMALL = [(0, 8), (1, 1), (3, 7), (1, 8), (257, 1000), (33, 2048)]
LARGE = [(300, 32000), (9, 50257), (3, 151643), (200, 151936), (40, 262144)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def usable() -> None:
    reason = cuda.why_not(torch.empty(0, 1, device=DEVICE))
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=CLUSTERS)
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cuda, "forced_cluster", request.param)
    return request.param


def draw(*args: Any, **kw: Any) -> Any:
    """A case of loss_cases.py on the GPU."""
    case = cases.draw(cases.a_seed(), *args, **kw)
    tables = {name: None if table is None else table.to(DEVICE) for name, table in case.tables.items()}
    return cases.Case(case.logits.to(DEVICE), tables, case.options)


def rows_of(case: Any, logits: torch.Tensor, dlogits: torch.Tensor | None) -> torch.Tensor:
    """The backend's own values per row."""
    return cuda.rows("policy_loss", logits, dlogits, case.tables, LossOptions(**case.options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "name"), [*product(SMALL, OPTIONS), *product(LARGE, ("k3", "full"))], ids=str)
def test_equals_fp64(shape: tuple[int, int], name: str, dtype: torch.dtype) -> None:
    case = draw(*shape, dtype, name)
    cases.check(case, "cuda", in_place=False)
    cases.check(case, "cuda", in_place=True)  # rows V + 3 apart: they cannot be moved in 16-byte units


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [8, 128, 4104, 32000])
def test_forced_clusters_equal_fp64(forced: int, vocab: int, dtype: torch.dtype) -> None:
    """Every size of cluster, with slices that are empty, short and long, and clusters that get several rows or none."""
    for num_rows in (1, 7, 700):
        cases.check(draw(num_rows, vocab, dtype, "k3"), "cuda", in_place=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1000, 151936])
def test_the_same_bits_in_place_again_and_in_another_batch(dtype: torch.dtype, vocab: int) -> None:
    case = draw(150, vocab, dtype, "k3")
    poisoned = torch.full_like(case.logits, torch.nan)
    rows = rows_of(case, case.logits, poisoned)
    assert bool(poisoned.isfinite().all()) and bool(rows.isfinite().all())
    for _ in range(20):
        again = torch.full_like(case.logits, 7.0)
        assert torch.equal(rows_of(case, case.logits, again), rows) and torch.equal(again, poisoned)
    wide = torch.full((150, vocab + 64), 7.0, dtype=dtype, device=DEVICE)
    wide[:, :vocab] = case.logits
    assert torch.equal(rows_of(case, wide[:, :vocab], wide[:, :vocab]), rows)
    assert torch.equal(wide[:, :vocab], poisoned) and bool((wide[:, vocab:] == 7).all())
    lone = torch.empty_like(case.logits[100:101])
    per_row = ("labels", "weights", "old_logprobs", "ref_logprobs")
    tables = {name: t[100:101] if name in per_row and t is not None else t for name, t in case.tables.items()}
    one = cuda.rows("policy_loss", case.logits[100:101], lone, tables, LossOptions(**case.options), first_row=100)
    assert torch.equal(one[:, 0], rows[:, 100]) and torch.equal(lone[0], poisoned[100])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["k3", "full", "kept", "kept_full"])
def test_rows_that_begin_anywhere_in_a_16_byte_unit(name: str, dtype: torch.dtype) -> None:
    """Logits, reference and gradient are aligned differently; nothing beside a row is written."""
    case = draw(300, 5001, dtype, name)
    expected = torch.full_like(case.logits, torch.nan)
    rows = rows_of(case, case.logits, expected)
    for shifts in ((0, 1, 2), (3, 0, 1), (5, 5, 0), (7, 2, 7)):
        wide = [torch.full((300, 5031), 7.0, dtype=dtype, device=DEVICE) for _ in range(3)]
        logits, ref, gradient = (x[:, shift : shift + 5001] for x, shift in zip(wide, shifts, strict=True))
        logits.copy_(case.logits)
        tables = dict(case.tables)
        if case.tables["ref_logits"] is not None:
            tables["ref_logits"] = ref.copy_(case.tables["ref_logits"])
        got = rows_of(cases.Case(logits, tables, case.options), logits, gradient)
        torch.testing.assert_close(got, rows, rtol=1e-5, atol=2e-6)
        assert cases.relative(gradient, expected.double()) <= (1e-6 if dtype == torch.float32 else 2e-3)
        assert bool((wide[2][:, : shifts[2]] == 7).all()) and bool((wide[2][:, shifts[2] + 5001 :] == 7).all())


def largest(logits: torch.Tensor) -> torch.Tensor:
    """Ids in the order that `topk_support` promises, sorted on the CPU: torch's sort on a GPU puts negative NaN last."""
    return logits.cpu().float().sort(dim=1, descending=True, stable=True).indices.to(logits.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "top_k"), [((0, 8), 3), ((700, 7), 3), ((40, 3000), 1024), ((300, 151936), 100), ((9, 50257), 50)]
)
def test_top_k(shape: tuple[int, int], top_k: int, dtype: torch.dtype) -> None:
    """The smaller id of equal logits comes first; 16 bits have many of them."""
    logits = torch.randn(shape[0], shape[1] + 3, device=DEVICE).to(dtype)[:, 1 : shape[1] + 1]
    expected = largest(logits)[:, :top_k]
    for _ in range(3):
        assert torch.equal(topk_support(logits, top_k), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top_k_of_difficult_rows(dtype: torch.dtype) -> None:
    """Ascending rows fill the kernel's buffer again and again; equal ones, zeros of both signs, infinities, NaN are in order."""
    special = torch.full((30_000,), -torch.inf)
    special[20_000:20_003] = torch.tensor([torch.inf, torch.nan, -torch.nan])
    signs, tied = torch.zeros(30_000).copysign(torch.randn(30_000)), torch.randint(3, (30_000,)).float()
    rising = torch.arange(30_000.0) / 30_000
    logits = torch.stack([rising, -rising, tied, signs, special, special.flip(0)]).to(dtype).to(DEVICE)
    for top_k in (1, 50, 1024):
        assert torch.equal(topk_support(logits, top_k), largest(logits)[:, :top_k]), top_k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["kept", "kept_full"])
def test_a_filter_of_large_rows(name: str, dtype: torch.dtype) -> None:
    case = draw(300, 151936, dtype, name)
    cases.check(case, "cuda", in_place=False)
    cases.check(case, "cuda", in_place=True)


@pytest.mark.parametrize("name", ["plain", "full"])
def test_without_a_reference(name: str) -> None:
    case = draw(30, 32000, torch.float32, name)
    case.tables["ref_logprobs"] = case.tables["ref_logits"] = None
    case.options["kl_coef"] = 0.0
    cases.check(case, "cuda", in_place=False)
    assert not bool(case.measured("cuda")[0].stats.sum_kl.any())


@pytest.mark.parametrize("power", [23, 24, 25, 26, 27])
def test_small_terms_are_not_lost_in_a_large_sum(power: int) -> None:
    cases.check_small_terms("cuda", power, DEVICE)


@pytest.mark.parametrize("name", ["k3", "full", "kept"])
@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
def test_huge_tiny_and_equal_logits(name: str, scale: float) -> None:
    case = draw(40, 3000, torch.float32, name, scale=scale)
    case.tables["old_logprobs"] = None  # one of -20,000 is stored to 1e-3, and a ratio is no better than that
    if name != "full":
        case.options["kl_coef"] = 0.0
    exact, exact_grad = case.exact()
    out, grad = case.measured("cuda")
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=6e-8, atol=2e-6)
    assert case.error(grad, exact_grad) <= 3e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_minus_infinity_and_a_single_finite_entry(dtype: torch.dtype) -> None:
    case = draw(30, 32000, dtype, "k3", nan=False)
    labels = case.tables["labels"]
    blocked = torch.rand(case.logits.shape, device=DEVICE) < 0.5
    blocked[:, 4000:20000] = True  # whole slices with nothing in them
    blocked[labels != IGNORE, labels[labels != IGNORE]] = False
    case.logits[blocked] = -torch.inf
    case.tables["old_logprobs"] = None  # it was that of more columns
    cases.check(case, "cuda", in_place=False)
    assert not bool(case.measured("cuda")[1][blocked].any())
    case = draw(12, 3200, dtype, "on_policy", nan=False)
    case.logits.fill_(-torch.inf)[torch.arange(12), case.tables["labels"].clamp(min=0)] = 3.0
    out, grad = case.measured("cuda")
    assert not bool(out.logprobs.any()) and not bool(grad.any())


def test_labels_that_are_impossible_no_columns_or_not_a_number() -> None:
    logits = torch.randn(4, 104, device=DEVICE)
    logits[0, 5], logits[1, 7] = -torch.inf, torch.nan
    labels = torch.tensor([5, 8, 9, 10**9], device=DEVICE)
    logprobs, lse = token_logprobs(logits, labels, temperature=1.0, impl="cuda")
    assert logprobs[0] == -torch.inf and logprobs[1].isnan() and lse[1].isnan() and logprobs[2].isfinite() and logprobs[3].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [4096, 4099])
@pytest.mark.parametrize("kept", [False, True])
def test_logprobs_and_their_gradient_once_per_label(dtype: torch.dtype, vocab: int, kept: bool) -> None:
    """A row for every 61st label and those around it: edges of vectors, warps' shares and slices."""
    labels = torch.tensor(sorted({i + j for i in range(1, vocab - 1, 61) for j in (-1, 0, 1)} | {vocab - 1}), device=DEVICE)
    logits = (3 * torch.randn(len(labels), vocab, device=DEVICE)).to(dtype)
    kept_ids = torch.rand(len(labels), vocab, device=DEVICE).topk(50, 1).indices if kept else None
    upstream, upstream_lse = torch.randn(2, len(labels), device=DEVICE)

    def gradient(logits: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = logits.clone().requires_grad_()
        logprobs, lse = token_logprobs(x, labels, temperature=0.8, kept_ids=kept_ids, impl=impl)
        return logprobs, lse, torch.autograd.grad((logprobs * upstream + lse * upstream_lse).sum(), x)[0]

    logprobs, lse, grad = gradient(logits, "cuda")
    exact_logprobs, exact_lse, exact = gradient(logits.double(), "reference")
    torch.testing.assert_close(logprobs.double(), exact_logprobs, rtol=6e-8, atol=2e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=6e-8, atol=2e-6)
    limit = 3e-7 if dtype == torch.float32 else 1.05 * cases.relative(exact.to(dtype), exact)
    assert cases.relative(grad, exact) <= limit


def test_a_graph_can_be_captured_and_replayed() -> None:
    case, other = (draw(50, 32000, torch.bfloat16, "k3") for _ in range(2))
    logits, dlogits = case.logits.clone(), torch.empty_like(case.logits)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rows_of(case, logits, dlogits)  # what is done once is done before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = rows_of(case, logits, dlogits)
    keep = case.tables["labels"] != IGNORE
    for source in (case.logits, torch.where(keep[:, None], other.logits.nan_to_num(), case.logits)):
        logits.copy_(source)
        graph.replay()
        expected = torch.empty_like(dlogits)
        assert torch.equal(rows_of(case, source, expected), rows) and torch.equal(expected, dlogits)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_loss_and_gradient_in_one_graph(impl: str) -> None:
    """The public op waits for nothing: forward and backward are captured together, and follow what changes in their inputs."""
    case, other = (draw(50, 32000, torch.bfloat16, "k3", nan=False) for _ in range(2))
    logits = case.logits.clone().requires_grad_()

    def run(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = case.run(logits, impl, in_place=False).loss
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(logits)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(logits)
    for source in (case.logits, other.logits):
        logits.data.copy_(source)
        graph.replay()
        expected = run(source.clone().requires_grad_())
        assert all(torch.equal(got, wanted) for got, wanted in zip(captured, expected, strict=True))


def test_many_rows_and_all_ignored() -> None:
    labels = torch.full((70_001,), IGNORE, device=DEVICE)
    logits = torch.full((70_001, 16), torch.nan, device=DEVICE)
    logprobs, lse = token_logprobs(logits, labels, temperature=1.0, impl="cuda")
    assert not bool(logprobs.any()) and not bool(lse.any())
    logits.normal_()
    labels.random_(16)
    for columns in (16, 15):  # rows_one_read and rows_two_reads
        view = logits[:, :columns].contiguous()
        logprobs = token_logprobs(view, labels.clamp(max=columns - 1), temperature=1.0, impl="cuda")[0]
        expected = view.double().log_softmax(1).gather(1, labels.clamp(max=columns - 1)[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [32768, 32769])
def test_more_than_two_to_the_31_elements(vocab: int) -> None:
    num_rows = 2**31 // vocab + 100
    logits = torch.zeros(num_rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    logits[-3:] = torch.randn(3, vocab, device=DEVICE)
    labels = torch.full((num_rows,), IGNORE, device=DEVICE)
    labels[-3:] = torch.tensor([0, 5, vocab - 1], device=DEVICE)
    ones = torch.ones(num_rows, device=DEVICE)
    grad = operators.logprob_rows_backward("cuda", logits, labels, None, 1.0, ones, 0 * ones)
    last = logits[-3:].clone(), labels[-3:], None, 1.0, ones[-3:], 0 * ones[-3:]
    alone = operators.logprob_rows_backward("cuda", *last)
    assert torch.equal(grad[-3:], alone) and not bool(grad[:-3].any())


def test_which_kernel_takes_what() -> None:
    def cluster_size(logits: torch.Tensor) -> int:
        """Number of CTAs per row; 0: not rows_one_read."""
        args, _ = row_args("logprobs", {"logits": logits}, without_loss(1.0))
        library: Any = cuda.library()
        return library.srpo_cuda_cluster(ctypes.byref(args), torch.cuda.current_device())

    for dtype, vocab in product(DTYPES, (128, 32000, 151936)):
        assert cluster_size(torch.empty(2, vocab, dtype=dtype, device=DEVICE)) in CLUSTERS
    assert cluster_size(torch.empty(2, 50257, device=DEVICE)) == 0
    assert cluster_size(torch.empty(2, 1024, device=DEVICE)[:, 1:1021]) == 0  # not aligned
    assert cluster_size(torch.empty(2, 1024, device=DEVICE)[:, 4:1020]) > 0


def test_a_cluster_that_cannot_be_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "forced_cluster", 8)
    logits, labels = torch.zeros(2, 7, device=DEVICE), torch.zeros(2, dtype=torch.long, device=DEVICE)
    with pytest.raises(RuntimeError, match="CUDA error"):
        token_logprobs(logits, labels, temperature=1.0, impl="cuda")
    monkeypatch.undo()
    assert torch.zeros(1, device=DEVICE).item() == 0  # the device is none the worse for it


def test_tables_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"labels is on cpu .*: move both to one device"):
        operators.logprob_rows("cuda", torch.zeros(2, 8, device=DEVICE), torch.zeros(2, dtype=torch.long), None, 1.0)


@pytest.mark.multigpu
def test_a_device_that_is_not_the_current_one() -> None:
    case = cases.draw(cases.a_seed(), 20, 4096, torch.bfloat16, "k3")
    results = []
    for device in ("cuda:0", "cuda:1"):
        tables = {name: None if table is None else table.to(device) for name, table in case.tables.items()}
        logits = case.logits.to(device)
        rows = rows_of(cases.Case(logits, tables, case.options), logits, None)
        results.append(rows.cpu())
        assert rows.shape == (len(ROW_FIELDS), 20) and torch.cuda.current_device() == 0
    assert torch.equal(*results)
