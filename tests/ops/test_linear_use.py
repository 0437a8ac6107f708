"""The loss from hidden states in use: memory, frozen factors, compile, checkpointing, autocast, bad input, odd shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import srpo_kernels
import torch
from linear_cases import DEVICES, OPTIONS, Case, chunked, grad_of, relative, same
from loss_cases import policy_loss
from srpo_kernels import IGNORE, LossOptions, linear_chunks, token_logprobs, topk_support
from srpo_kernels.linear import linear_policy_loss, linear_token_logprobs
from srpo_kernels.segments import compact, step_of_row
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_factor(frozen: str, impl: str) -> None:
    case = Case(4)
    _, *expected = case.run(impl=impl)
    factors = {"hidden": case.hidden.clone(), "weight": case.weight.clone()}
    free = "weight" if frozen == "hidden" else "hidden"
    factors[free].requires_grad_()
    case.loss(**factors, impl=impl).loss.backward()
    assert factors[frozen].grad is None and torch.equal(grad_of(factors[free]), expected[free == "weight"])
    factors[free].grad = None
    case.logprobs(**factors, impl=impl)[0].sum().backward()
    assert factors[frozen].grad is None and grad_of(factors[free]).any()


@chunked
def test_three_products_and_none_for_rows_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(6, 83, 37, 211)
    products: list[int] = []
    put_product = linear_chunks.put_product

    def count(out: Tensor, a: Tensor, b: Tensor, **more: Any) -> None:
        products.append(a.shape[0] * a.shape[1] * b.shape[1])
        put_product(out, a, b, **more)

    monkeypatch.setattr(linear_chunks, "put_product", count)
    labelled = case.tables["labels"] != IGNORE
    num_rows = int(labelled.sum())
    row = 37 * 211

    def done(**more: Any) -> int:
        products.clear()
        case.run(**more)
        return sum(products)

    logprobs = case.logprobs(case.hidden, case.weight)[0]
    sequence, step = step_of_row(case.tables["cu_seqlens"], case.tables["step_ends"], torch.arange(83))
    advantages, log_ratio = case.tables["step_advantages"][sequence, step], logprobs - case.tables["old_logprobs"]
    dead = torch.where(advantages > 0, log_ratio > math.log(1.25), log_ratio < math.log(0.8))
    dead |= (advantages == 0) | (case.tables["weights"] == 0)
    num_alive = int((labelled & ~dead).sum())
    assert 0 < num_alive < num_rows - 8
    assert done(chunk_rows=20) == done() == row * (num_rows + 2 * num_alive)
    assert done(kl_coef=0.1) == 3 * row * num_rows
    products.clear()
    case.loss(case.hidden, case.weight)
    assert sum(products) == row * num_rows
    case.tables["step_advantages"] = torch.zeros(4, 3)
    assert done() == row * num_rows
    assert not any(grad.any() for grad in case.run()[1:])


@chunked
@pytest.mark.parametrize(("dtype", "option"), [(torch.float32, "plain"), (torch.bfloat16, "k3"), (torch.float32, "full")])
def test_peak_memory_is_one_chunk(dtype: torch.dtype, option: str) -> None:
    """Adds all allocations that the profiler saw and subtracts the freed ones, in order."""
    num_rows, size, vocab, chunk_rows = 1200, 16, 5000, 50
    case = Case(8, num_rows, size, vocab, option, dtype)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def peak(step: Callable[[], Any]) -> int:
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            kept = step()
        assert kept is not None
        profiler: Any = profile.profiler
        events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        held = top = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            top = max(top, held)
        return top

    chunk, head, all_logits = 4 * chunk_rows * vocab, 4 * size * vocab, 4 * num_rows * vocab
    own = 2 * head if dtype == torch.float32 else 4 * head  # fp32 gradient; in 16 bits: its sum, its result, the weight in fp32
    chunks = 2 if option == "full" else 1
    loss = peak(lambda: case.loss(hidden, weight, chunk_rows=chunk_rows).loss.backward() or 1)
    assert chunks * chunk < loss < chunks * chunk * 1.15 + own + all_logits / 40
    logprobs = peak(lambda: case.logprobs(hidden, weight, chunk_rows=chunk_rows)[0].sum().backward() or 1)
    assert chunk < logprobs < 2.15 * chunk + own + all_logits / 40
    assert peak(lambda: case.loss(hidden, weight, impl="reference")) > all_logits  # the measure sees what it should


def test_default_chunks() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert linear_chunks.default_rows(151936, cpu, 1) == 2**28 // (4 * 151936)
    assert linear_chunks.default_rows(2**30, cpu, 1) == 1
    assert [linear_chunks.default_rows(151936, gpu, matrices) for matrices in (1, 2)] == [8192, 4096]


@chunked
def test_the_default_leaves_room_for_a_second_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    heights: list[int] = []
    logits = linear_chunks.Chunks.logits

    def count(self: linear_chunks.Chunks, start: int, stop: int) -> tuple[Tensor, Tensor]:
        heights.append(stop - start)
        return logits(self, start, stop)

    monkeypatch.setattr(linear_chunks, "CPU_CHUNK_BYTES", 4 * 211 * 20)
    monkeypatch.setattr(linear_chunks.Chunks, "logits", count)
    case = Case(10, ignored=False)
    hidden = case.hidden.requires_grad_()
    case.loss(hidden, case.weight)
    assert sum(heights) == 83 and max(heights) == 17 and min(heights) == 16  # 5 chunks of at most 20
    heights.clear()
    case.logprobs(hidden, case.weight)[0].sum().backward()
    assert sum(heights) == 2 * 83 and heights[:5] == [16, 17, 16, 17, 17] and max(heights[5:]) <= 10
    heights.clear()
    Case(10, option="full", ignored=False).run()
    assert sum(heights) == 2 * 83 and max(heights) <= 10


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("option", ["k3", "kept_full", "by_step", "top_k"])
def test_ignored_rows_are_never_read(option: str, impl: str) -> None:
    case = Case(9, option=option)
    clean = case.run(impl=impl, chunk_rows=20)
    ignored = case.tables["labels"] == IGNORE
    assert 5 < ignored.sum() < 60
    case.hidden[ignored] = math.nan
    for name, table in case.tables.items():
        if table.shape[0] == 83 and name != "labels":
            table[ignored] = math.nan if table.is_floating_point() else 10**9
    poisoned = case.run(impl=impl, chunk_rows=20)
    assert same(poisoned, clean) and not clean[1][ignored].any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("option", ["plain", "full", "top_k"])
@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_nothing_or_one_row(num_rows: int, option: str, impl: str) -> None:
    case = Case(1, num_rows, option=option)
    case.tables["labels"][:] = IGNORE if num_rows > 1 else 2
    out, *grads = case.run(impl=impl)
    logprobs, _ = case.logprobs(case.hidden.requires_grad_(), case.weight, impl=impl)
    logprobs.sum().backward()
    assert out.logprobs.shape == logprobs.shape == (num_rows,)
    if num_rows == 1:
        exact, *_ = case.exact()
        assert out.loss.item() == pytest.approx(exact.loss.item(), abs=1e-5)
        assert out.logprobs.item() == pytest.approx(logprobs.item(), abs=2e-6) != 0
    else:
        assert out.loss == 0 and not out.stats.stack().any() and not any(grad.any() for grad in grads)
        assert not grad_of(case.hidden).any()


@pytest.mark.parametrize("option", OPTIONS)
def test_equals_policy_loss_of_the_logits(option: str) -> None:
    case = Case(12, option=option, grid=True)
    tables = {k: v for k, v in case.tables.items() if k not in ("ref_hidden", "ref_weight")}
    if "ref_hidden" in case.tables:
        tables["ref_logits"] = case.tables["ref_hidden"] @ case.tables["ref_weight"].T
    logits = (case.hidden @ case.weight.T).requires_grad_()
    expected = policy_loss(logits, **tables, **case.options)
    (dlogits,) = torch.autograd.grad(expected.loss, logits)
    out, *grads = case.run(chunk_rows=25)
    assert torch.equal(out.logprobs, expected.logprobs)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.stats.stack(), expected.stats.stack(), rtol=1e-6, atol=1e-5)
    assert relative(grads[0], dlogits.double() @ case.weight.double()) <= 1e-6
    assert relative(grads[1], dlogits.double().T @ case.hidden.double()) <= 1e-6
    options: dict[str, Any] = {"temperature": 1.0, "top_k": case.options.get("top_k"), "kept_ids": tables.get("kept_ids")}
    for a, b in zip(
        linear_token_logprobs(case.hidden, case.weight, tables["labels"], **options, chunk_rows=25),
        token_logprobs(logits.detach(), tables["labels"], **options),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("option", ["k3", "full", "top_k"])
def test_a_vocabulary_of_one(option: str) -> None:
    case = Case(0, 90, 10, 1, option)
    out, *grads = case.run(chunk_rows=20)
    limit = 1e-6 if option == "full" else 0.0  # the exact KL is a difference of log-sum-exps, which rounding leaves
    assert not out.logprobs.any() and all(grad.abs().max() <= limit for grad in grads)


def test_top_k_is_the_support_of_each_chunk() -> None:
    case = Case(13, option="top_k", grid=False)
    kept_ids = topk_support(case.hidden @ case.weight.T, 5)
    given = case.run(top_k=None, kept_ids=kept_ids, chunk_rows=25)
    assert same(case.run(chunk_rows=25), given) and given[0].stats.num_outside_support.any()


@pytest.mark.parametrize("option", ["k3", "kept", "full", "dual"])
def test_reference_gradcheck(option: str) -> None:
    case = Case(14, 12, 3, 7, option, torch.float64)
    factors = (case.hidden.requires_grad_(), case.weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: case.loss(*x).loss, factors)
    assert torch.autograd.gradcheck(lambda *x: case.logprobs(*x), factors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_gradient_and_a_graph_used_again(dtype: torch.dtype, device: str) -> None:
    case = Case(15, dtype=dtype, device=device)
    _, *once = case.run()
    _, *more = case.run(upstream=-4.0)
    assert all(torch.equal(a, -4 * b) for a, b in zip(more, once, strict=True))
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss = case.loss(hidden, weight).loss
    for times in (1, 2, 4):  # sums of these are exact
        for _ in range(max(1, times // 2)):
            loss.backward(retain_graph=True)
        assert torch.equal(grad_of(hidden), times * once[0]) and torch.equal(grad_of(weight), times * once[1])


@pytest.mark.parametrize("option", ["plain", "full", "top_k"])
def test_bitwise_repeatable_from_any_memory(option: str) -> None:
    case = Case(16, option=option)
    first = case.run(chunk_rows=20)
    torch.use_deterministic_algorithms(True)  # fills what is allocated and not written with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert same(case.run(chunk_rows=20), first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_stay_as_they_were_and_may_have_any_stride() -> None:
    case = Case(17, option="full")
    expected = case.run()
    before = {name: table.clone() for name, table in case.tables.items()}
    case.hidden, case.weight = case.hidden.T.contiguous().T, case.weight.repeat(1, 2)[:, :37]
    wide = case.run()
    assert all(torch.equal(case.tables[name], table) for name, table in before.items())
    torch.testing.assert_close(wide[0].logprobs, expected[0].logprobs, rtol=0, atol=4e-6)
    assert relative(wide[1], expected[1].double()) <= 3e-6 and relative(wide[2], expected[2].double()) <= 3e-6


@pytest.mark.parametrize("option", ["plain", "k3", "kept_full"])
def test_autocast_is_kept_out(option: str) -> None:
    case = Case(18, option=option)
    for impl in ("auto", "reference"):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        expected, *grads = case.run(impl=impl)
        with torch.autocast("cpu", torch.bfloat16):
            assert (hidden @ weight.T).dtype == torch.bfloat16
            out, (_, lse) = case.loss(hidden, weight, impl=impl), case.logprobs(hidden, weight, impl=impl)
        assert torch.equal(out.logprobs, expected.logprobs) and torch.equal(out.loss, expected.loss)
        assert lse.dtype == torch.float32
        assert all(map(torch.equal, torch.autograd.grad(out.loss, (hidden, weight)), grads))


@chunked
@pytest.mark.parametrize("option", ["k3", "full", "top_k", "by_step"])
def test_compiles_whole(option: str) -> None:
    case = Case(19, option=option)
    expected = case.run(upstream=3.0)
    calls: list[int] = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        calls.append(1)
        return make_boxed_func(graph.forward)

    arguments = case.arguments(torch.float32)  # in advance: torch.compile cannot trace the packing of options

    def run(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = linear_policy_loss(hidden, weight, **arguments)
        return 3.0 * out.loss, out.logprobs, case.logprobs(hidden, weight)[0].sum()

    backend = aot_autograd(fw_compiler=counting, bw_compiler=counting)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    scaled, logprobs, _ = torch.compile(run, fullgraph=True, backend=backend)(hidden, weight)
    scaled.backward()
    assert len(calls) == 2 and torch.equal(logprobs, expected[0].logprobs)
    assert torch.equal(grad_of(hidden), expected[1]) and torch.equal(grad_of(weight), expected[2])


@chunked
@pytest.mark.parametrize("option", ["plain", "top_k"])
def test_opcheck(option: str) -> None:
    case = Case(20, 9, 5, 11, option)
    t, hidden, weight = case.tables, case.hidden.requires_grad_(), case.weight.requires_grad_()
    names = ("labels", "step_advantages", "step_ends", "cu_seqlens", "weights", "old_logprobs", "ref_logprobs")
    tables = [t[name] for name in names]
    top_k = case.options.get("top_k", 0)
    name = srpo_kernels.implementations(torch.empty(0, 1))[0]
    for flags in ((True, True), (True, False), (False, True)):
        factors = [x.detach().requires_grad_(flag) for x, flag in zip((hidden, weight), flags, strict=True)]
        rest = (None, None, None, LossOptions(0.2, 0.3, 0.1, "k3", 0.9).packed, top_k, 4, False, *flags, name)
        torch.library.opcheck(torch.ops.srpo.linear_policy_loss.default, (*factors, *tables, *rest))
        torch.library.opcheck(torch.ops.srpo.linear_token_logprobs.default, (*factors, t["labels"], None, 0.9, top_k, 4, name))


@pytest.mark.parametrize("option", ["plain", "full"])
def test_activation_checkpointing(option: str) -> None:
    case = Case(21, option=option)
    matrix = torch.randn(37, 37, generator=torch.Generator().manual_seed(0))

    def run(checkpointed: bool) -> tuple[Tensor, ...]:
        inner, weight = matrix.clone().requires_grad_(), case.weight.clone().requires_grad_()

        def block(x: Tensor, w: Tensor) -> Tensor:
            hidden = torch.tanh(x @ inner)
            return case.loss(hidden, w).loss + case.logprobs(hidden, w)[1].mean()

        loss: Any = checkpoint(block, case.hidden, weight, use_reentrant=False) if checkpointed else block(case.hidden, weight)
        return loss, *torch.autograd.grad(loss, (inner, weight))

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(83, 36)}, r"hidden \(83, 36\) and weight \(211, 37\) do not fit"),
        ({"hidden": torch.ones(82, 37)}, r"labels \(83,\) do not fit"),
        ({"weight": torch.ones(37)}, "do not fit: give .T, H. and .V, H."),
        ({"weight": torch.ones(211, 37, dtype=torch.bfloat16)}, "bring both to one floating-point dtype"),
        ({"weight": torch.ones(211, 37, device="meta")}, "bring all to one device"),
        ({"chunk_rows": 0}, "chunk_rows is 0: give at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"kept_ids": torch.ones(3, 2)}, "kept_ids has shape"),
        ({"top_k": -3}, "top_k is -3"),
        ({"ratio_over": "response"}, "token, step, sequence"),
        ({"weights": torch.ones(3)}, "weights has shape"),
        ({"step_ends": torch.ones(2, 3)}, r"step_ends \(2, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 1, 2, 3, 4])}, "set its last entry to T"),
        ({"clip_eps_high": -0.1}, "must not be negative"),
        ({"dual_clip": 0.9}, "above 1"),
        ({"kl_estimator": "k4"}, "k1, k2, k3, full"),
        ({"kl_coef": 0.1, "ref_logprobs": None}, "give ref_logprobs, or set kl_coef to 0"),
        ({"kl_coef": 0.1, "kl_estimator": "full"}, "give ref_hidden and ref_weight, or set kl_coef to 0"),
        ({"kl_estimator": "full", "ref_hidden": torch.ones(83, 37)}, "give ref_weight, too"),
        ({"kl_estimator": "full", "ref_weight": torch.ones(211, 37)}, "give ref_hidden, too"),
        (
            {"kl_estimator": "full", "ref_hidden": torch.ones(83, 9), "ref_weight": torch.ones(9, 8)},
            "ref_weight .9, 8. do not fit",
        ),
        ({"kl_estimator": "full", "ref_hidden": torch.ones(83, 9), "ref_weight": torch.ones(9, 9)}, "ref_weight has 9 rows"),
        ({"impl": "abacus"}, "linear_policy_loss has no implementation 'abacus'"),
    ],
)
def test_bad_input_says_what_to_do(change: dict[str, Any], message: str) -> None:
    case = Case(22)
    case.loss(case.hidden, case.weight)
    with pytest.raises(ValueError, match=message):
        case.loss(**{"hidden": case.hidden, "weight": case.weight, **change})


def test_the_reference_may_have_another_hidden_size_and_dtype() -> None:
    case = Case(23, option="full", grid=True)
    wider: dict[str, Any] = {"ref_hidden": torch.nn.functional.pad(case.tables["ref_hidden"], (0, 5)).bfloat16()}
    wider["ref_weight"] = torch.nn.functional.pad(case.tables["ref_weight"], (0, 5)).bfloat16()
    assert same(case.run(**wider), case.run())


@pytest.mark.parametrize("seed", range(20))
def test_compact_keeps_rows_in_their_steps(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    num_rows = int(torch.randint(30, (), generator=gen))
    cuts = torch.randint(num_rows + 1, (4,), generator=gen).sort().values
    cu_seqlens = torch.cat([torch.tensor([0]), cuts, torch.tensor([num_rows])]).int()
    step_ends = torch.randint(12, (5, 3), generator=gen).sort(1).values.int()
    keep = torch.rand(num_rows, generator=gen) < 0.6
    rows = keep.nonzero()[:, 0]
    fewer, ends = compact(keep, cu_seqlens, step_ends)
    assert fewer.dtype == ends.dtype == torch.int32 and fewer[-1] == rows.shape[0]
    new, old = step_of_row(fewer, ends, torch.arange(rows.shape[0])), step_of_row(cu_seqlens, step_ends, rows)
    assert torch.equal(new[0], old[0]) and torch.equal(new[1], old[1])


@pytest.mark.parametrize("seed", range(20))
def test_move_up(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    num_rows = int(torch.randint(60, (), generator=gen))
    before = torch.randn(num_rows, 3, generator=gen)
    alive = torch.rand(num_rows, generator=gen) < torch.rand((), generator=gen)
    after = before.clone()
    order = linear_chunks.move_up(after, alive)
    assert torch.equal(after[: order.shape[0]], before[order])
    assert torch.equal(order.sort().values, alive.nonzero()[:, 0])
