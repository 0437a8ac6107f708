"""Returns and advantages: worked examples by hand, and the same numbers by another road in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from srpo.algorithm.advantages import grpo_advantages, srpo_advantages, step_returns

PAPER_REWARDS = [0.2, 0.2, 0.2, 0.2, 1.0]  # Appendix B: all five steps right


def random_case(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "step_rewards": PAPER_REWARDS * rng.integers(0, 2, (12, 5)),
        "groups": rng.permutation(np.repeat([3, 7, 40], 4)),  # any numbers, in any order
        "step_lengths": rng.integers(0, 6, (12, 5)),
    }


@pytest.mark.parametrize(
    ("rewards", "gamma", "returns"),
    [
        (PAPER_REWARDS, 1.0, [1.8, 1.6, 1.4, 1.2, 1.0]),
        (PAPER_REWARDS, 0.5, [0.4375, 0.475, 0.55, 0.7, 1.0]),  # .2 + .1 + .05 + .025 + .0625; .2 + .1 + .05 + .125; ...
        (PAPER_REWARDS, 0.0, PAPER_REWARDS),
        ([0.2, 0.0, 0.0, 0.2, 0.0], 1.0, [0.4, 0.2, 0.2, 0.2, 0.0]),
        ([0.7], 0.3, [0.7]),
    ],
)
def test_returns_by_hand(rewards: list[float], gamma: float, returns: list[float]) -> None:
    out = step_returns([rewards, [0.0] * len(rewards)], gamma)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.tensor([returns, [0.0] * len(rewards)]))


def test_returns_are_the_recursion() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(4, 6))
    expected = np.zeros((4, 7))
    for j in reversed(range(6)):
        expected[:, j] = rewards[:, j] + 0.9 * expected[:, j + 1]
    np.testing.assert_allclose(step_returns(rewards, 0.9).numpy(), expected[:, :6], rtol=1e-6)


def test_eq4_by_hand() -> None:
    # mean .5, squares .25 * 4 over 3: std = sqrt(1/3); (1 - .5) / std = .8660
    out = grpo_advantages([1, 0, 5, 0, 5, 1, 5], [0, 0, 1, 0, 1, 0, 1], num_steps=3)
    assert out.dtype == torch.float32 and out.shape == (7, 3)
    expected = [0.8660254, -0.8660254, 0.0, -0.8660254, 0.0, 0.8660254, 0.0]
    torch.testing.assert_close(out, torch.tensor(expected)[:, None].expand(-1, 3), rtol=2e-6, atol=0)
    assert not out[[2, 4, 6]].any()  # a group that agrees: exactly zero


def test_eq4_clip() -> None:
    assert grpo_advantages([1] + [0] * 15, [0] * 16, 1).max() == pytest.approx(3.75, rel=1e-5)  # (15/16) / (1/4)
    assert grpo_advantages([1] + [0] * 15, [0] * 16, 1, clip=2.0).max() == 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_batch_is_whitening_over_tokens(seed: int, gamma: float) -> None:
    x = random_case(seed)
    out = srpo_advantages(**x, gamma=gamma, normalize="batch", clip=0.0).double().numpy().ravel()
    lengths = x["step_lengths"].ravel()
    returns = step_returns(x["step_rewards"], gamma).double().numpy().ravel()
    tokens = np.repeat(returns, lengths)  # one entry per token
    np.testing.assert_allclose(out, (returns - tokens.mean()) / tokens.std(ddof=1), rtol=1e-5, atol=1e-6)
    advantages = np.repeat(out, lengths)
    assert abs(advantages.mean()) < 1e-6 and advantages.std(ddof=1) == pytest.approx(1, rel=1e-5)


def test_batch_by_hand() -> None:
    # tokens 1, 1, 1, 0: mean .75, var (3 * .0625 + .5625) / 3 = .25
    out = srpo_advantages([[1.0], [0.0]], [0, 1], [[3], [1]], gamma=1.0, normalize="batch", clip=0.0)
    torch.testing.assert_close(out, torch.tensor([[0.5], [-1.5]]))


@pytest.mark.parametrize("seed", range(5))
def test_group_baselines(seed: int) -> None:
    x = random_case(seed)
    returns = step_returns(x["step_rewards"], 1.0).double().numpy()
    group = srpo_advantages(**x, gamma=1.0, normalize="group", clip=0.0).numpy()
    group_step = srpo_advantages(**x, gamma=1.0, normalize="group_step", clip=0.0).numpy()
    for name in np.unique(x["groups"]):
        rows = x["groups"] == name
        own = returns[rows]
        np.testing.assert_allclose(group[rows], (own - own.mean()) / (own.std(ddof=1) + 1e-6), rtol=1e-4, atol=1e-5)
        expected = (own - own.mean(0)) / (own.std(0, ddof=1) + 1e-6)
        np.testing.assert_allclose(group_step[rows], expected, rtol=1e-4, atol=1e-5)


def test_group_step_of_one_step_is_eq4() -> None:
    rewards, groups = [0.0, 1.0, 1.0, 0.5], [0, 0, 1, 1]
    srpo = srpo_advantages([[r] for r in rewards], groups, [[1]] * 4, gamma=1.0, normalize="group_step", clip=0.0)
    assert torch.equal(srpo, grpo_advantages(rewards, groups, 1))


def test_none_is_algorithm_1_and_clip_bounds() -> None:
    x = random_case(1)
    out = srpo_advantages(**x, gamma=1.0, normalize="none", clip=0.0)
    assert torch.equal(out, step_returns(x["step_rewards"], 1.0))
    clipped = srpo_advantages(**x, gamma=1.0, normalize="none", clip=0.5)
    assert torch.equal(clipped, out.clamp(max=0.5)) and clipped.max() == 0.5
    negative = srpo_advantages(-x["step_rewards"], x["groups"], x["step_lengths"], gamma=1.0, normalize="none", clip=0.5)
    assert torch.equal(negative, -clipped)


@pytest.mark.parametrize("normalize", ["batch", "group", "group_step"])
def test_the_scale_of_rewards_does_not_matter(normalize: Any) -> None:
    x = random_case(2)
    out = srpo_advantages(**x, gamma=1.0, normalize=normalize, clip=0.0)
    small = srpo_advantages(**{**x, "step_rewards": x["step_rewards"] / 1000}, gamma=1.0, normalize=normalize, clip=0.0)
    assert out.abs().max() > 1
    torch.testing.assert_close(small, out, rtol=1e-2, atol=0)  # 1e-6 beside a std of a thousandth


@pytest.mark.parametrize("normalize", ["batch", "group", "group_step"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3])
def test_no_variance_is_exactly_zero(normalize: Any, reward: float) -> None:
    rewards = [[0.0, reward]] * 7  # both returns are the reward
    out = srpo_advantages(rewards, [0] * 3 + [1] * 4, [[3, 2]] * 7, gamma=1.0, normalize=normalize, clip=2.0)
    assert torch.equal(out, torch.zeros(7, 2))


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_batch_of_hardly_any_token(num_tokens: int) -> None:
    assert not srpo_advantages([[1.0]], [0], [[num_tokens]], gamma=1.0, normalize="batch", clip=2.0).any()


@pytest.mark.parametrize("normalize", ["batch", "group", "group_step", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_order_of_rollouts_and_names_of_groups_do_not_matter(normalize: Any, seed: int) -> None:
    x = random_case(seed)
    options: dict[str, Any] = {"gamma": 0.9, "normalize": normalize, "clip": 2.0}
    order = np.random.default_rng(seed).permutation(12)
    moved = {k: torch.as_tensor(v[order]) for k, v in x.items()}  # tensors do as well as arrays
    moved["groups"] = 100 - moved["groups"]
    torch.testing.assert_close(srpo_advantages(**moved, **options), srpo_advantages(**x, **options)[order])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_returns([[1.0]], 1.1), "gamma is 1.1"),
        (lambda: step_returns([1.0], 1.0), r"\[N, J\]"),
        (lambda: step_returns([[0.2, 1.0], [0.2, float("nan")]], 1.0), r"reward \[1, 1\] is nan"),
        (lambda: grpo_advantages([0.0, float("inf")], [0, 0], 5), r"reward \[1\] is inf"),
        (lambda: grpo_advantages([[0.0]], [0], 5), r"\[N\]"),
        (lambda: grpo_advantages([0.0, 1.0, 1.0], [0, 0, 1], 5), "raise rollout.group_size to 2"),
        (lambda: srpo_advantages([[1.0]], [0], [[1]], gamma=1.0, normalize="group", clip=2.0), "raise rollout.group_size to 2"),
        (lambda: srpo_advantages([[1.0]], [0], [[1]], gamma=1.0, normalize="group_step", clip=2.0), "no group_step baseline"),
        (lambda: srpo_advantages([[1.0]], [0, 1], [[1]], gamma=1.0, normalize="batch", clip=2.0), "one group per rollout"),
        (lambda: srpo_advantages([[1.0]], [0], [[1, 2]], gamma=1.0, normalize="batch", clip=2.0), "step_lengths has shape"),
        (lambda: srpo_advantages([[1.0]], [0], [[1]], gamma=1.0, normalize="batch", clip=-1.0), "clip is -1"),
        (lambda: srpo_advantages([[1.0]], [0], [[1]], gamma=1.0, normalize="bach", clip=2.0), "batch, group, group_step, none"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_says_what_to_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
