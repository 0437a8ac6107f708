"""The ops as torch operators: autograd, in place, torch.compile, activation checkpointing, and the ratio over segments."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import loss_cases as cases
import pytest
import torch
from srpo_kernels import LossOptions, cpu, operators, policy_loss, token_logprobs
from torch.utils.checkpoint import checkpoint

LOGITS = torch.zeros(1, 2)
pytestmark = pytest.mark.skipif(cpu.why_not(LOGITS) is not None, reason="no C++ kernels on this machine")


def flat(case: Any, *, with_grad: bool = True) -> tuple[Any, ...]:
    """Arguments of `torch.ops.srpo.policy_loss` after the logits."""
    tables = ("labels", "step_advantages", "step_ends", "cu_seqlens", "weights", "old_logprobs", "ref_logprobs", "kept_ids")
    options = LossOptions(**case.options).packed
    return (*(case.tables[name] for name in (*tables, "ref_logits")), options, with_grad, "cpu")


@pytest.mark.parametrize("name", ["k3", "full", "kept"])
def test_registered_as_torch_wants_it(name: str) -> None:
    case = cases.draw(0, 20, 50, torch.float32, name, nan=False)
    for logits in (case.logits, case.logits.clone().requires_grad_()):
        torch.library.opcheck(operators.policy_loss, (logits, *flat(case, with_grad=logits.requires_grad)))
        args = (case.tables["labels"], case.tables["kept_ids"], 0.7, "cpu")
        torch.library.opcheck(operators.token_logprobs, (logits, *args))
    in_place = (*flat(case)[:-2], "cpu")
    torch.library.opcheck(operators.policy_loss_, (case.logits.clone(), *in_place))


def test_compiled_as_one_graph() -> None:
    """Against the reference in fp64, by autograd."""
    case = cases.draw(1, 20, 50, torch.float32, "k3", nan=False)
    labels, hidden, weight = case.tables["labels"], torch.randn(20, 16), torch.randn(50, 16)
    now = token_logprobs(hidden @ weight.T, labels, temperature=0.99, impl="reference")[0]
    old, case.tables["ref_logprobs"] = now + 0.3 * torch.randn(2, 20)
    case.tables["old_logprobs"] = cases.off_the_edges(old, now, case.options)

    options = LossOptions(**case.options)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, impl: str = "cpu") -> torch.Tensor:
        logits = hidden @ weight.T
        nll = -token_logprobs(logits, labels, temperature=0.8, impl=impl)[0].mean()
        return policy_loss(logits, **case.tables, options=options, impl=impl).loss + nll

    def gradients(function: Any, dtype: torch.dtype, **impl: str) -> tuple[torch.Tensor, ...]:
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        out = function(*inputs, **impl)
        return out.detach(), *torch.autograd.grad(out, inputs)

    compiled = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), torch.float32)
    for got, expected in zip(compiled, gradients(loss, torch.float64, impl="reference"), strict=True):
        assert cases.relative(got, expected, 1.0) <= 1e-5


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("k3", {"in_place": True}),
        ("k3", {"ratio_over": "sequence"}),
        ("kept_full", {"ratio_over": "step"}),
        ("cispo", {"top_k": 4}),
    ],
    ids=str,
)
def test_compiled_options_give_the_same_bits(name: str, more: dict[str, Any]) -> None:
    """With another number of tokens in each call."""
    weight = torch.randn(50, 16)
    cells = [cases.draw(seed, num_rows, 50, torch.float32, name, nan=False) for seed, num_rows in ((7, 20), (8, 33), (9, 47))]

    settings = cases.arguments({**cells[0].options, **more})

    def loss(hidden: torch.Tensor, case: Any) -> torch.Tensor:
        return -2.0 * policy_loss(hidden @ weight.T, **case.tables, **settings, impl="cpu").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for case in cells:
        hidden = torch.randn(len(case.logits), 16, requires_grad=True)
        (expected,) = torch.autograd.grad(loss(hidden, case), hidden)
        (got,) = torch.autograd.grad(compiled(hidden, case), hidden)
        assert expected.any() and torch.equal(got, expected)


def test_a_compiled_function_takes_other_options() -> None:
    """Without keeping those of the first call."""
    case = cases.draw(7, 20, 50, torch.float32, "k3", nan=False)
    options = LossOptions(**case.options)

    def loss(logits: torch.Tensor, options: LossOptions) -> torch.Tensor:
        return policy_loss(logits, **case.tables, options=options, impl="cpu").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for other in (options, replace(options, kl_coef=0.7), replace(options, clip_form="cispo"), options):
        assert torch.equal(compiled(case.logits, other), loss(case.logits, other))


def test_options_survive_packing_exactly() -> None:
    options = LossOptions(0.1 + 0.2, 1 / 3, 1e-300, "full", 0.99, dual_clip=3.0000000000000004, ratio_over="step")
    assert LossOptions.unpack(options.packed) == options == LossOptions(**asdict(options))
    with pytest.raises(ValueError, match="temperature is -1"):
        replace(options, temperature=-1.0)


def test_under_activation_checkpointing() -> None:
    case = cases.draw(2, 20, 50, torch.float32, "k3", nan=False)
    hidden = torch.randn(20, 16)
    weight = torch.randn(50, 16)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return case.run(hidden @ weight.T, "cpu").loss

    plain, recomputed = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss(plain).backward()
    checkpoint(loss, recomputed, use_reentrant=False).backward()  # pyright: ignore[reportOptionalMemberAccess]
    assert plain.grad is not None and recomputed.grad is not None and torch.equal(plain.grad, recomputed.grad)


def test_an_intermediate_result_is_overwritten_and_a_leaf_is_not() -> None:
    case = cases.draw(3, 20, 50, torch.float32, "k3", nan=False)
    leaf = case.logits.clone().requires_grad_()
    case.run(leaf, "cpu").loss.backward()
    assert torch.equal(leaf.detach(), case.logits)
    source = case.logits.clone().requires_grad_()
    logits = source * 1
    case.run(logits, "cpu").loss.backward()
    assert source.grad is not None and leaf.grad is not None and torch.equal(source.grad, leaf.grad)
    assert torch.equal(logits.detach(), leaf.grad)
    kept = source * 1
    case.run(kept, "cpu", in_place=False).loss.backward()
    assert torch.equal(kept.detach(), case.logits)
    with torch.no_grad():
        case.run(kept, "cpu")
    assert torch.equal(kept.detach(), case.logits), "overwritten without a gradient to write"


def test_overwriting_what_somebody_needs_is_an_error() -> None:
    case = cases.draw(4, 20, 50, torch.float32, "k3", nan=False)
    logits = case.logits.clone().requires_grad_().tanh()  # tanh needs its result for its backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.run(logits, "cpu").loss.backward()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
def test_the_gradient_of_what_comes_after(in_place: bool, factor: float) -> None:
    case = cases.draw(5, 20, 50, torch.float32, "k3", nan=False)
    x = case.logits.clone().requires_grad_()
    (factor * case.run(x * 1, "cpu", in_place=in_place).loss).backward()
    y = case.logits.clone().requires_grad_()
    (factor * case.run(y, "reference").loss).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("over", ["step", "sequence"])
def test_one_ratio_for_a_segment(over: str, impl: str) -> None:
    """Against the geometric mean over each segment's labelled rows, by a loop and autograd in fp64."""
    case = cases.draw(6, 60, 30, torch.float32 if impl == "cpu" else torch.float64, "plain", nan=False)
    labels, old, weights = case.tables["labels"], case.tables["old_logprobs"].double(), case.tables["weights"].double()
    logits = case.logits.double().clone().requires_grad_()
    logprobs = logits.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    starts, ends = case.tables["cu_seqlens"].tolist(), case.tables["step_ends"].tolist()
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(ends)):
        segments: dict[int, list[int]] = {}
        for t in range(starts[i], starts[i + 1]):
            j = min(sum(t - starts[i] >= end for end in ends[i]), len(ends[i]) - 1)
            if labels[t] >= 0:
                segments.setdefault(j if over == "step" else 0, []).append(t)
        for rows in segments.values():
            log_ratio = (logprobs[rows] - old[rows]).mean()
            for t in rows:
                j = min(sum(t - starts[i] >= end for end in ends[i]), len(ends[i]) - 1)
                advantage = case.tables["step_advantages"][i, j].double()
                token = (log_ratio.detach() + logprobs[t] - logprobs[t].detach()).exp()
                loss = loss - weights[t] * torch.minimum(token * advantage, token.clamp(0.8, 1.25) * advantage)
    (expected,) = torch.autograd.grad(loss, logits)
    x = case.logits.clone().requires_grad_()
    out = case.run(x, impl, ratio_over=over)
    out.loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-6)
