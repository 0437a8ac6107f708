from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from srpo.core.config.train import OptimizerConfig
from srpo.training.optim import learning_rate, make_optimizer, set_learning_rate

NUM_STEPS = 21


def rates(**changes: object) -> list[float]:
    cfg = OptimizerConfig(**{"lr": 2.0, **changes})  # pyright: ignore[reportArgumentType]
    return [learning_rate(cfg, step, NUM_STEPS) for step in range(NUM_STEPS)]


def test_constant_is_the_paper_s_and_the_default() -> None:
    assert rates() == [2.0] * NUM_STEPS


def test_warmup_rises_to_the_full_rate_and_starts_above_zero() -> None:
    assert rates(warmup_steps=3) == [0.5, 1.0, 1.5] + [2.0] * (NUM_STEPS - 3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("least", [0.0, 0.25])
def test_decays_end_at_their_least_fraction(schedule: str, least: float) -> None:
    got = rates(schedule=schedule, min_lr_frac=least)
    assert got[0] == 2.0
    assert got[-1] == pytest.approx(2.0 * least, abs=1e-12)
    assert all(a > b for a, b in pairwise(got))
    assert got[NUM_STEPS // 2] == pytest.approx(1.0 * (1 + least))  # in the middle both have fallen half-way


def test_cosine_is_a_half_wave() -> None:
    for step, rate in enumerate(rates(schedule="cosine", min_lr_frac=0.0)):
        assert rate == pytest.approx(1 + math.cos(math.pi * step / (NUM_STEPS - 1)), abs=1e-12)


def test_decay_and_warmup_multiply() -> None:
    plain, warm = rates(schedule="linear"), rates(schedule="linear", warmup_steps=4)
    assert [b / a for a, b in zip(plain, warm, strict=True)][:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_a_run_of_one_step_has_a_rate() -> None:
    assert learning_rate(OptimizerConfig(lr=3.0, schedule="cosine"), 0, 1) == 3.0


def test_optimizer_is_adamw_with_the_settings() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer([weight], OptimizerConfig(lr=0.1, betas=(0.5, 0.8), weight_decay=0.01))
    set_learning_rate(optimizer, 0.2)
    weight.grad = torch.tensor([4.0, -0.5])
    optimizer.step()
    # The first step of AdamW: decay, then the sign of the gradient.
    want = torch.tensor([1.0, -2.0]) * (1 - 0.2 * 0.01) - 0.2 * torch.tensor([1.0, -1.0])
    assert torch.allclose(weight.detach(), want, atol=1e-6)
    assert optimizer.state[weight]["exp_avg"].tolist() == [2.0, -0.25]
