"""Token-level advantages: examples by hand, and loops over the formulas."""

from __future__ import annotations

import random
from typing import Any

import pytest
import strict_clamp
import torch

from srpo.algorithm.gae import gae, token_rewards, value_loss, whiten


def edges(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_gae_by_hand() -> None:
    # gamma 1/2, lambda 1/2. First sequence: rewards 0 0 8, values 2 4 6. From the end: A_3 = 8 - 6 = 2,
    # A_2 = 0 + 6/2 - 4 + 2/4 = -1/2, A_1 = 0 + 4/2 - 2 - 1/8 = -1/8. Second: A = 1 - 3 = -2.
    out = gae(torch.tensor([0.0, 0.0, 8.0, 1.0]), torch.tensor([2.0, 4.0, 6.0, 3.0]), edges([3, 0, 1]), gamma=0.5, gae_lambda=0.5)
    assert out.advantages.tolist() == [-0.125, -0.5, 2.0, -2.0]
    assert out.returns.tolist() == [1.875, 3.5, 8.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_gae_is_its_sum_of_td_errors(seed: int) -> None:
    """Equation 16 of Schulman et al.: A_t = sum over l of (gamma lambda)^l delta_{t+l}."""
    rng = random.Random(seed)
    lengths = [rng.randint(0, 9) for _ in range(rng.randint(1, 6))]
    gamma, lam = rng.choice([0.0, 0.7, 1.0]), rng.choice([0.0, 0.9, 1.0])
    rewards, values = torch.randn(2, sum(lengths), generator=torch.Generator().manual_seed(seed)).double()
    out = gae(rewards, values, edges(lengths), gamma=gamma, gae_lambda=lam)
    first = 0
    for length in lengths:
        r, v = rewards[first : first + length].tolist(), [*values[first : first + length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            want = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert float(out.advantages[first + t]) == pytest.approx(want, abs=1e-12)
            assert float(out.returns[first + t]) == pytest.approx(want + v[t], abs=1e-12)
        first += length


def test_lambda_one_without_values_is_the_reward_to_go() -> None:
    rewards = torch.tensor([1.0, 0.0, 2.0, 4.0])
    out = gae(rewards, torch.zeros(4), edges([3, 1]), gamma=1.0, gae_lambda=1.0)
    assert out.advantages.tolist() == out.returns.tolist() == [3.0, 2.0, 2.0, 4.0]


def test_rewards_stand_where_steps_end() -> None:
    # Sequences of 4, 0 and 2 tokens; steps of 2, 0, 2 and of 0, 2, 0 tokens. The reward of an empty step is on the token before
    # it, or on the first.
    rewards = torch.tensor([[1.0, 2.0, 4.0], [9.0, 9.0, 9.0], [8.0, 16.0, 32.0]])
    ends = torch.tensor([[2, 2, 4], [0, 0, 0], [0, 2, 2]])
    assert token_rewards(rewards, ends, edges([4, 0, 2]), "step_ends").tolist() == [0, 3, 0, 4, 8, 48]
    assert token_rewards(rewards, ends, edges([4, 0, 2]), "end").tolist() == [0, 0, 0, 7, 0, 56]


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_value_loss_is_the_formula_and_adds_up(clip: float) -> None:
    gen = torch.Generator().manual_seed(3)
    values, old, returns = (torch.randn(40, generator=gen, dtype=torch.float64) for _ in range(3))
    values = (old + 0.3 * (values - old)).requires_grad_()
    out = value_loss(values, old, returns, clip=clip, num_tokens=40)
    terms, grads, num_clipped = [], [], 0
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        held = min(max(v, o - clip), o + clip) if clip else v
        terms.append(max((v - r) ** 2, (held - r) ** 2) / 2)
        cut = held != v and (held - r) ** 2 > (v - r) ** 2
        num_clipped += cut
        grads.append(0.0 if cut else (v - r) / 40)
    assert out.loss.item() == pytest.approx(sum(terms) / 40) and int(out.num_clipped) == num_clipped
    assert (num_clipped > 3) == bool(clip)
    torch.testing.assert_close(torch.autograd.grad(out.loss, values)[0], torch.tensor(grads, dtype=torch.float64))
    parts = [value_loss(values[s], old[s], returns[s], clip=clip, num_tokens=40).loss for s in (slice(0, 7), slice(7, 40))]
    torch.testing.assert_close(parts[0] + parts[1], out.loss)


def test_whitening_and_its_edges() -> None:
    values = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    mean, std = float(values.mean()), float(values.std())
    whitened = whiten(values, mean, std, scale="std", clip=0.0)
    assert float(whitened.mean()) == pytest.approx(0) and float(whitened.std()) == pytest.approx(1)
    assert whiten(values, mean, std, scale="none", clip=2.5).tolist() == [-2.0, -1.0, 2.5]
    assert whiten(torch.ones(3), 1.0, 0.0, scale="none", clip=1.0).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gamma": 1.1, "gae_lambda": 1.0}, "gamma is 1.1"), ({"gamma": 1.0, "gae_lambda": -0.1}, "gae_lambda is -0.1")],
)
def test_bad_discounts_say_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gae(torch.zeros(2), torch.zeros(2), edges([2]), **options)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one reward and one value per row"):
        gae(torch.zeros(2), torch.zeros(2), edges([3]), gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match="step_ends or end"):
        token_rewards(torch.zeros(1, 1), torch.ones(1, 1), edges([1]), "start")  # type: ignore[arg-type]


def test_a_value_exactly_on_the_bound_of_its_change_keeps_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    strict_clamp.patch(monkeypatch)
    values = torch.tensor([0.5, -0.5, 0.75], requires_grad=True)  # the last is beyond the bound, where the cut error is larger
    out = value_loss(values, torch.zeros(3), torch.tensor([2.0, 2.0, 2.0]), clip=0.5, num_tokens=1)
    assert torch.autograd.grad(out.loss, values)[0].tolist() == [-1.5, -2.5, 0.0] and out.num_clipped == 1
