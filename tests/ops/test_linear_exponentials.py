"""The loss from hidden states with exponentials in place of logits: in Triton's interpreter on a CPU, and with `-m gpu` the same
tests on a GPU. As in test_triton.py, `test_in_the_interpreter` runs this file in a process of its own.

The interpreter multiplies only fp32, and a chunk holds fp32 exponentials there: all errors are the kernels' own. The fixture
`as_on_a_gpu` adds a GPU's roundings.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import srpo_kernels
import torch
from interpreter import DEVICE, INTERPRETED, on_device, run_interpreted
from linear_cases import Case, grad_of, relative, same
from srpo_kernels import IGNORE, LossOptions, linear_chunks, linear_exponentials, triton_rows
from torch import Tensor

DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
HELD: dict[str, Any] = {"impl": "triton", "chunk_holds": "exponentials"}
OPTIONS = ("plain", "k3", "dual", "cispo", "on_policy", "by_step", "by_sequence")
THREE_ROUNDINGS = 2.0**-8  # E, v times hidden states, result: sqrt(3) times 2^-8 / sqrt(3), all just above a power of two

interpreted = pytest.mark.skipif(not INTERPRETED, reason="emulates a GPU in the interpreter")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.timeout(900)  # minutes, on a busy machine
def test_in_the_interpreter() -> None:
    run_interpreted(__file__, "not in_the_interpreter and not without_a_gpu")


def draw(num_rows: int = 83, size: int = 37, vocab: int = 211, option: str = "plain", **more: Any) -> Case:
    """Hidden states and weights that bf16 holds exactly."""
    return Case(random.randrange(2**31), num_rows, size, vocab, option, DTYPE, DEVICE, **{"grid": True, **more})


def num_taken_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of rows of each chunk whose logits are computed."""
    heights: list[int] = []
    logits = linear_chunks.Chunks.logits

    def count(self: linear_chunks.Chunks, start: int, stop: int) -> tuple[Tensor, Tensor]:
        heights.append(stop - start)
        return logits(self, start, stop)

    monkeypatch.setattr(linear_chunks.Chunks, "logits", count)
    return heights


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors are rounded to bf16, to the nearest; products are exact and summed in fp32."""

    def put_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False, scale: float = 1.0) -> None:
        product = scale * (a.bfloat16().float() @ b.bfloat16().float())
        out.copy_(out + product if add else product)

    monkeypatch.setattr(linear_chunks, "put_product", put_product)


@on_device
@pytest.mark.parametrize(
    ("option", "shape", "chunk_rows"),
    [
        *((option, (40, 37, 211), 12) for option in OPTIONS),
        ("plain", (90, 128, 1000), None),
        ("k3", (50, 64, 640), 30),
        ("plain", (30, 1, 5), None),
    ],
    ids=str,
)
def test_equals_fp64(option: str, shape: tuple[int, int, int], chunk_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(*shape, option)
    exact, *exact_grads = case.exact()
    heights = num_taken_again(monkeypatch)
    out, *grads = case.run(chunk_rows=chunk_rows, **HELD)
    assert not heights or option.startswith("by_")  # those make the logits for the ratio
    assert (out.logprobs - exact.logprobs).abs().max() <= 2e-6
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.stats.stack(), exact.stats.stack(), rtol=2e-6, atol=2e-5)
    floor = 0.01 * float(case.tables["weights"].norm())  # few rows may nearly all be clipped
    for got, expected in zip(grads, exact_grads, strict=True):
        assert (got.double() - expected).norm() <= (1e-6 if INTERPRETED else THREE_ROUNDINGS) * max(floor, expected.norm())


@interpreted
@pytest.mark.usefixtures("triton_backend")
def test_every_tile_is_computed_once_in_whatever_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles of rows than go together, and as many of columns."""
    monkeypatch.setattr(linear_exponentials, "tiling", lambda _: ({"BLOCK_M": 4, "BLOCK_N": 16, "BLOCK_K": 16}, 3))
    case = draw(42, 24, 150, "k3", ignored=False)
    exact, *exact_grads = case.exact()
    out, *grads = case.run(**HELD)
    assert (out.logprobs - exact.logprobs).abs().max() <= 2e-6
    assert all(relative(got, expected) <= 1e-6 for got, expected in zip(grads, exact_grads, strict=True))


@interpreted
@pytest.mark.usefixtures("triton_backend", "as_on_a_gpu")
@pytest.mark.parametrize("chunk_rows", [None, 100])
def test_rounding_of_the_gradients(chunk_rows: int | None) -> None:
    """Before the rounding to the dtype of the result. One rounding has a mean relative error of 1.66e-3, so the weight's gradient
    should have 2.35e-3; the margin of a tenth is for chance, since the labels' entries dominate and are as few as the rows."""
    case = draw(250, 70, 300, "on_policy", grid=False, ignored=False)
    case.hidden, case.weight = case.hidden.bfloat16().float(), case.weight.bfloat16().float()
    case.tables["weights"][:] = 1
    case.tables["step_advantages"] = torch.ones(4, 3)
    _, *exact = case.exact()
    _, of_hidden, of_weight = case.run(chunk_rows=chunk_rows, **HELD)
    print(relative(of_hidden, exact[0]), relative(of_weight, exact[1]))
    assert relative(of_weight, exact[1]) <= 1.1 * 2.35e-3 and relative(of_hidden, exact[0]) <= 1.15 * 1.66e-3


@on_device
@pytest.mark.parametrize("impl", ["triton", "reference" if INTERPRETED else "cuda"])
def test_on_policy_ratio_is_one(impl: str) -> None:
    """With old log-probabilities from another product. Each row is a step, so that the sums by step show each row's ratio."""
    if impl not in srpo_kernels.implementations(torch.empty(0, 1, device=DEVICE)):
        pytest.skip(f"{impl} is not here")
    case = draw(30, 200, 3000, grid=False)
    tables = {"cu_seqlens": torch.tensor([0, 30]), "step_ends": torch.arange(1, 31)[None], "step_advantages": torch.ones(1, 30)}
    case.tables |= {name: table.to(DEVICE) for name, table in tables.items()}
    case.tables["old_logprobs"] = case.logprobs(case.hidden, case.weight, impl=impl)[0]
    out, _, _ = case.run(**HELD)
    ratio = out.stats.sum_ratio[out.stats.num_tokens > 0]
    assert ratio.shape[0] > 10 and (ratio - 1).abs().max() <= 1e-5


@on_device
@pytest.mark.parametrize(("num_rows", "vocab"), [(0, 211), (1, 1), (1, 129), (3, 1), (3, 127), (257, 384)])
def test_edges_of_tiles(num_rows: int, vocab: int) -> None:
    case = draw(num_rows, 64, vocab, ignored=num_rows > 3)
    exact, *exact_grads = case.exact()
    out, *grads = case.run(**HELD)
    assert out.logprobs.shape == (num_rows,)
    if num_rows:
        assert (out.logprobs - exact.logprobs).abs().max() <= 2e-6
    floor = float(case.tables["weights"].norm()) + 1e-12
    for got, expected in zip(grads, exact_grads, strict=True):
        assert (got.double() - expected).norm() <= (1e-6 if INTERPRETED else 5e-3) * max(floor, float(expected.norm()))


@on_device
def test_offsets_of_more_than_32_bits() -> None:
    """Rows 2^30 elements apart, so that the last one begins at element 2^31. Memory between rows is never touched."""
    case = draw(3, 64, 304, "k3", ignored=False)
    options = LossOptions(**case.options)

    def run(exponentials: Tensor) -> tuple[Tensor, Tensor]:
        return linear_exponentials.rows(case.hidden, case.weight, exponentials, case.tables, options)

    near = torch.full((3, 304), math.nan, dtype=torch.bfloat16, device=DEVICE)
    far = torch.empty(2**31 + 304, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 304), (2**30, 1))
    (rows, scales), (far_rows, far_scales) = run(near), run(far)
    assert torch.equal(rows, far_rows) and torch.equal(scales, far_scales) and torch.equal(near, far)
    assert rows.isfinite().all() and near.isfinite().all()


@on_device
def test_nothing_but_ignored_rows_and_ignored_rows_are_never_read() -> None:
    case = draw(40, option="k3")
    clean = case.run(chunk_rows=20, **HELD)
    ignored = case.tables["labels"] == IGNORE
    assert 1 < ignored.sum() < 30
    case.hidden[ignored] = math.nan
    for name, table in case.tables.items():
        if table.shape[0] == 40 and name != "labels":
            table[ignored] = math.nan if table.is_floating_point() else 10**9
    assert same(case.run(chunk_rows=20, **HELD), clean) and not clean[1][ignored].any()
    case.tables["labels"][:] = IGNORE
    out, *grads = case.run(**HELD)
    assert out.loss == 0 and not out.stats.stack().any() and not any(grad.any() for grad in grads)


@on_device
@pytest.mark.parametrize(("option", "chunk_rows"), [("plain", 20), ("k3", None), ("on_policy", None)])
def test_rows_too_far_from_their_label(option: str, chunk_rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with a label of probability below 2^-60 are computed from logits."""
    case = draw(option=option, ignored=False)
    case.hidden *= 0.25
    labels = case.tables["labels"]
    far, near = torch.arange(0, 83, 7), torch.arange(1, 83, 7)
    case.weight[:, 0], case.weight[3, 0] = 0, -1
    case.hidden[:, 0], case.hidden[far, 0], case.hidden[near, 0] = 0, torch.arange(60.0, 300, 20).to(DTYPE).to(DEVICE), 20
    labels[far] = labels[near] = 3
    for name in ("old_logprobs", "ref_logprobs"):
        if name in case.tables:
            noise = 0.3 * torch.randn(83, device=DEVICE)
            case.tables[name] = (case.logprobs(case.hidden.double(), case.weight.double())[0] + noise).float()
    exact, *exact_grads = case.exact()
    assert exact.logprobs[far].max() < -42 and -41 < exact.logprobs[near].min() < -20
    heights = num_taken_again(monkeypatch)
    out, *grads = case.run(chunk_rows=chunk_rows, **HELD)
    assert sum(heights) == far.shape[0]
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=6e-8, atol=2e-6)
    torch.testing.assert_close(out.stats.stack(), exact.stats.stack(), rtol=1e-5, atol=2e-5)
    for got, expected in zip(grads, exact_grads, strict=True):
        assert relative(got, expected) <= (2e-6 if INTERPRETED else THREE_ROUNDINGS)


@on_device
def test_logits_that_are_no_numbers_and_labels_that_are_no_columns() -> None:
    """As from logits: these rows are NaN, and so is the weight's gradient; of the hidden states only their own gradients are."""
    case = draw(ignored=False)
    case.tables["weights"][:] = 1
    case.tables["step_advantages"][:] = 1
    case.tables["labels"][5], case.hidden[7] = 211, math.nan
    case.tables["labels"][9] = 2**40
    expected = case.run(impl="triton")
    out, of_hidden, _ = case.run(**HELD)
    bad = torch.zeros(83, dtype=torch.bool, device=DEVICE).index_fill(0, torch.tensor([5, 7, 9], device=DEVICE), True)
    assert torch.equal(out.logprobs.isnan(), bad) and torch.equal(expected[0].logprobs.isnan(), bad)
    assert torch.equal(of_hidden.isnan(), expected[1].isnan()) and not of_hidden[~bad].isnan().any()


@on_device
def test_huge_logits() -> None:
    """Products of thousands are as exact as small ones; most rows are certain of something, and many of something else."""
    case = draw(40, 32, 500, "on_policy", ignored=False)
    case.hidden *= 2.0**12
    exact, *exact_grads = case.exact()
    assert exact.logprobs.min() < -2000 and (exact.logprobs > -1e-6).any()
    out, *grads = case.run(**HELD)
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=6e-8, atol=2e-6)
    for got, expected in zip(grads, exact_grads, strict=True):
        assert relative(got, expected) <= (1e-6 if INTERPRETED else THREE_ROUNDINGS)


@on_device
def test_two_products_besides_the_kernel_and_none_for_rows_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw()
    expected = case.run(impl="triton")
    num_rows, products = int((case.tables["labels"] != IGNORE).sum()), []
    put_product = linear_chunks.put_product

    def count(out: Tensor, a: Tensor, b: Tensor, **more: Any) -> None:
        products.append(a.shape[0] * a.shape[1] * b.shape[1])
        put_product(out, a, b, **more)

    monkeypatch.setattr(linear_chunks, "put_product", count)
    case.run(impl="triton", chunk_rows=20)
    by_logits, num_alive = sum(products), (sum(products) / (37 * 211) - num_rows) / 2
    products.clear()
    out, *grads = case.run(chunk_rows=20, **HELD)
    assert 0 < num_alive < num_rows and sum(products) == by_logits - 37 * 211 * num_rows
    for got, other in zip(grads, expected[1:], strict=True):
        assert relative(got, other.double()) <= (2e-6 if INTERPRETED else 2 * THREE_ROUNDINGS)
    torch.testing.assert_close(out.loss, expected[0].loss, rtol=1e-6, atol=1e-6)


@on_device
def test_no_gradient_or_that_of_one_factor_and_a_factor_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(30, option="k3")
    out, *grads = case.run(**HELD)
    buffers: list[int] = []
    new_gradient = triton_rows.new_gradient
    monkeypatch.setattr(triton_rows, "new_gradient", lambda x: buffers.append(x.numel()) or new_gradient(x))
    alone = case.loss(case.hidden, case.weight, **HELD)
    assert not alone.loss.requires_grad and torch.equal(alone.logprobs, out.logprobs) and buffers == [0]
    assert torch.equal(alone.stats.stack(), out.stats.stack()) and torch.equal(alone.loss, out.loss)
    for i, name in enumerate(("hidden", "weight")):
        factors = {"hidden": case.hidden.clone(), "weight": case.weight.clone()}
        factors[name].requires_grad_()
        (-4.0 * case.loss(**factors, **HELD).loss).backward()
        assert torch.equal(grad_of(factors[name]), -4 * grads[i])


@on_device
def test_the_same_bits_again_and_from_any_stride() -> None:
    case = draw(40, 64, 500, "k3")
    first = case.run(chunk_rows=20, **HELD)
    assert same(case.run(chunk_rows=20, **HELD), first)
    case.hidden, case.weight = case.hidden.T.contiguous().T, case.weight.repeat(1, 2)[:, :64]
    assert same(case.run(chunk_rows=20, **HELD), first)


@interpreted
@pytest.mark.usefixtures("triton_backend")
def test_peak_memory_is_one_chunk() -> None:
    """Counts torch's allocations; those of the interpreter are numpy's. In fp32, twice as much as on a GPU."""
    chunk_rows, vocab, size = 100, 4000, 2
    case = draw(200, size, vocab, ignored=False)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        case.loss(hidden, weight, chunk_rows=chunk_rows, **HELD).loss.backward()
    profiler: Any = profile.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        top = max(top, held)
    chunk = 4 * chunk_rows * vocab
    assert chunk < top < 1.2 * chunk + 2 * 4 * size * vocab


@on_device
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_holds": "probabilities"}, "give logits or exponentials"),
        ({"top_k": 5}, "a filter .* leave it at 'logits'"),
        ({"kept_ids": torch.zeros(83, 2, dtype=torch.long)}, "a filter"),
        ({"kl_estimator": "full"}, "'full' needs the logits"),
        ({"impl": "reference"}, "only 'triton' computes them"),
        ({"impl": "cpu"}, "only 'triton' computes them"),
    ],
)
def test_what_it_cannot_take(change: dict[str, Any], message: str) -> None:
    case = draw()
    with pytest.raises(ValueError, match=message):
        case.loss(case.hidden, case.weight, **{**HELD, **change})


@pytest.mark.skipif(INTERPRETED, reason="nothing is missing in the interpreter")
def test_what_it_says_without_a_gpu() -> None:
    case = Case(0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'exponentials' is unavailable because logits are on cpu: leave it at 'logits'"):
        case.loss(case.hidden, case.weight, chunk_holds="exponentials")
    for dtype in (torch.float32, torch.float16):
        reason = linear_exponentials.why_not(torch.empty(1, 1, dtype=dtype))
        assert reason == f"hidden states are {dtype}, not bf16"


@on_device
def test_opcheck() -> None:
    """With a loss above 0. In its backward pass opcheck multiplies the loss by its sign. Triton applies a sign of -1 in place to
    the saved gradient, which is also an output of the op, and opcheck would compare it with an output that is not negated."""
    case = draw(9, 5, 11, ignored=False)
    case.tables["step_advantages"], case.tables["weights"][:] = -1 - case.tables["step_advantages"].abs(), 1
    t, factors = case.tables, (case.hidden.requires_grad_(), case.weight.requires_grad_())
    names = ("labels", "step_advantages", "step_ends", "cu_seqlens", "weights", "old_logprobs", "ref_logprobs")
    rest = (None, None, None, LossOptions(0.2, 0.3, 0.1, "k3", 0.9).packed, 0, 4, True, True, True, "triton")
    torch.library.opcheck(torch.ops.srpo.linear_policy_loss.default, (*factors, *(t[name] for name in names), *rest))
