"""Rows by hand: on and next to the edges of the clip, ratios that would overflow, and memory that is not zero initially."""

from __future__ import annotations

import math
from typing import Any

import loss_cases as cases
import pytest
import torch
from loss_cases import policy_loss
from srpo_kernels import PolicyLoss, cpu

IMPLS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(cpu.why_not(torch.zeros(1, 2)) is not None, reason="no C++ kernels here")),
]


def rows_of_two(
    impl: str, log_ratios: list[float], advantages: list[float], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[PolicyLoss, list[float]]:
    """(result, gradient of the labels' logits) of rows with two equal logits; each row is a reasoning step."""
    num_rows = len(log_ratios)
    logits = torch.zeros(num_rows, 2, dtype=dtype, requires_grad=True)
    tables = (torch.tensor([advantages]), torch.arange(1, num_rows + 1)[None], torch.tensor([0, num_rows]), torch.ones(num_rows))
    old = -math.log(2) - torch.tensor(log_ratios)
    options = {"kl_coef": 0.0, "kl_estimator": "k3", "temperature": 1.0, **options}
    out = policy_loss(logits, torch.zeros(num_rows, dtype=torch.long), *tables, old, **options, impl=impl)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert torch.equal(gradient[:, 0], -gradient[:, 1])
    return out, gradient[:, 0].tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_on_and_beside_the_edges_of_clipping(impl: str) -> None:
    """Log ratios around those of 1.5 and 0.75, by 1e-6; ratio 1 on an edge; ratios beyond e^20."""
    log_ratios = [math.log(edge) + side for edge in (1.5, 0.75) for side in (-1e-6, 1e-6)] + [0.0, 0.0, 25.0, 25.0]
    advantages = [1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0]

    def run(low: float, high: float, **options: Any) -> tuple[PolicyLoss, list[float]]:
        return rows_of_two(impl, log_ratios, advantages, clip_eps_low=low, clip_eps_high=high, **options)

    out, gradient = run(0.25, 0.5)
    assert out.stats.num_clipped.tolist() == [0, 1, 1, 0, 0, 0, 0, 1]
    assert out.stats.sum_ratio.tolist() == pytest.approx([min(math.exp(x), math.exp(20)) for x in log_ratios], rel=1e-5)
    assert gradient == pytest.approx([-0.75, 0, 0, 0.375, -0.5, 0.5, 0, 0], rel=1e-5)
    assert out.loss.item() == pytest.approx(-1.5 - 1.5 + 0.75 + 0.75 - 1 + 1 + math.exp(20) - 1.5, rel=1e-5)
    out, gradient = run(0.0, 0.0)
    assert out.stats.num_clipped.tolist() == [1, 1, 1, 1, 0, 0, 0, 1] and gradient[4:6] == pytest.approx([-0.5, 0.5])
    out, gradient = run(0.25, 0.5, dual_clip=3.0)
    assert out.stats.num_clipped.tolist() == [0, 1, 1, 0, 0, 0, 1, 1] and gradient[6] == 0
    assert out.loss.item() == pytest.approx(-1.5 - 1.5 + 0.75 + 0.75 - 1 + 1 + 3 - 1.5, abs=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_no_log_ratio_overflows(kl_estimator: str, impl: str) -> None:
    log_ratios = [1e3, -1e3, 1e9, -1e9] * 2
    options = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "kl_estimator": kl_estimator, "kl_coef": 1.0}
    ref = -math.log(2) - torch.tensor(log_ratios)
    out, gradient = rows_of_two(impl, log_ratios, [1.0] * 4 + [-1.0] * 4, ref_logprobs=ref, **options)
    assert out.loss.isfinite() and out.stats.stack().isfinite().all() and torch.tensor(gradient).square().sum().isfinite()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["k3", "full", "kept", "on_policy"])
def test_whatever_was_in_memory_before(name: str, impl: str) -> None:
    case = cases.draw(cases.a_seed(), 40, 300, torch.bfloat16, name)
    out, grad = case.measured(impl)
    torch.use_deterministic_algorithms(True)  # fills what is allocated and not written with NaN
    try:
        assert torch.empty(3).isnan().all()
        again, poisoned = case.measured(impl)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grad, poisoned) and torch.equal(out.logprobs, again.logprobs) and torch.equal(out.loss, again.loss)
    assert torch.equal(out.stats.stack(), again.stats.stack())
