"""Returns and advantages: examples by hand, and the same numbers computed independently in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from srpo.algorithm.advantages import grpo_advantages, reinforce_advantages, rloo_advantages, srpo_advantages, step_returns

PAPER_REWARDS = [0.2, 0.2, 0.2, 0.2, 1.0]  # Appendix B: all five steps right


def random_case(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "step_rewards": PAPER_REWARDS * rng.integers(0, 2, (12, 5)),
        "groups": rng.permutation(np.repeat([3, 7, 40], 4)),  # any ids, in any order
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
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, torch.tensor([returns, [0.0] * len(rewards)], dtype=torch.float64))


def test_returns_are_the_recursion() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(4, 6))
    expected = np.zeros((4, 7))
    for j in reversed(range(6)):
        expected[:, j] = rewards[:, j] + 0.9 * expected[:, j + 1]
    np.testing.assert_allclose(step_returns(rewards, 0.9).numpy(), expected[:, :6], rtol=1e-12, atol=1e-12)


def test_eq4_by_hand() -> None:
    # mean .5, squares .25 * 4 over 3: std = sqrt(1/3); (1 - .5) / std = .8660
    out = grpo_advantages([1, 0, 5, 0, 5, 1, 5], [0, 0, 1, 0, 1, 0, 1], num_steps=3)
    assert out.dtype == torch.float32 and out.shape == (7, 3)
    expected = [0.8660254, -0.8660254, 0.0, -0.8660254, 0.0, 0.8660254, 0.0]
    torch.testing.assert_close(out, torch.tensor(expected)[:, None].expand(-1, 3), rtol=2e-6, atol=0)
    assert not out[[2, 4, 6]].any()  # a group with equal rewards: exactly zero


def test_eq4_clip() -> None:
    assert grpo_advantages([1] + [0] * 15, [0] * 16, 1).max() == pytest.approx(3.75, rel=1e-5)  # (15/16) / (1/4)
    assert grpo_advantages([1] + [0] * 15, [0] * 16, 1, clip=2.0).max() == 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_batch_is_whitening_over_tokens(seed: int, gamma: float) -> None:
    x = random_case(seed)
    out = srpo_advantages(**x, gamma=gamma, normalize="batch", clip=0.0).double().numpy().ravel()
    lengths = x["step_lengths"].ravel()
    returns = step_returns(x["step_rewards"], gamma).numpy().ravel()
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
    returns = step_returns(x["step_rewards"], 1.0).numpy()
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
    assert torch.equal(out, step_returns(x["step_rewards"], 1.0).float())
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
    torch.testing.assert_close(small, out, rtol=1e-2, atol=0)  # delta 1e-6 against a std of 1e-3


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
    moved = {k: torch.as_tensor(v[order]) for k, v in x.items()}  # tensors are accepted like arrays
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


# ---- REINFORCE, RLOO, Dr. GRPO -------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand() -> None:
    # group 7: 3 - mean(0, 6) = 0, 0 - mean(3, 6) = -4.5, 6 - mean(3, 0) = 4.5; group 1: 2 - 5, 5 - 2
    out = rloo_advantages([3, 2, 0, 6, 5], [7, 1, 7, 7, 1], 2)
    assert out.tolist() == [[0, 0], [-3, -3], [-4.5, -4.5], [4.5, 4.5], [3, 3]]
    assert rloo_advantages([3, 2, 0, 6, 5], [7, 1, 7, 7, 1], 1, clip=4.0)[:, 0].tolist() == [0, -3, -4, 4, 3]


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_is_the_others_mean(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    rewards = torch.randn(13, generator=gen, dtype=torch.float64).tolist()
    groups = [0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 1, 2, 0]
    got = rloo_advantages(rewards, groups, 1)[:, 0].tolist()
    for i, value in enumerate(got):
        others = [rewards[k] for k in range(13) if groups[k] == groups[i] and k != i]
        assert value == pytest.approx(rewards[i] - sum(others) / len(others), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_reinforce_has_the_batch_s_tokens_for_a_baseline(scale: Any) -> None:
    rewards, lengths = [1.8, 0.0, 0.4, 1.0], [3, 1, 5, 2]
    tokens = [r for r, n in zip(rewards, lengths, strict=True) for _ in range(n)]
    mean = sum(tokens) / len(tokens)
    std = (sum((x - mean) ** 2 for x in tokens) / (len(tokens) - 1)) ** 0.5 if scale == "std" else 1.0
    got = reinforce_advantages(rewards, lengths, 3, scale=scale)
    assert torch.equal(got, got[:, :1].expand(-1, 3))
    assert got[:, 0].tolist() == pytest.approx([(r - mean) / std for r in rewards], rel=1e-6)
    assert not reinforce_advantages([0.7] * 3, [4, 4, 4], 2, scale=scale).any()
    assert reinforce_advantages([1.0, 0.0], [1, 1], 1, clip=0.1).abs().max() == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalize", ["batch", "group", "group_step", "none"])
def test_without_a_scale_only_the_mean_goes(seed: int, normalize: Any) -> None:
    """Dr. GRPO: with scale "none" every normalization subtracts the mean of its scope (batch, group, or step of a group)."""
    gen = torch.Generator().manual_seed(seed)
    rewards = torch.rand(8, 3, generator=gen, dtype=torch.float64)
    lengths = torch.randint(1, 9, (8, 3), generator=gen)
    groups = [0, 1] * 4
    got = srpo_advantages(rewards, groups, lengths, gamma=0.5, normalize=normalize, clip=0.0, scale="none").double()
    returns = torch.stack(
        [rewards[:, 0] + rewards[:, 1] / 2 + rewards[:, 2] / 4, rewards[:, 1] + rewards[:, 2] / 2, rewards[:, 2]], 1
    )
    shift = returns - got
    scopes: dict[str, list[Any]] = {
        "batch": [(slice(None), slice(None))],
        "group": [(slice(g, None, 2), slice(None)) for g in (0, 1)],
        "group_step": [(slice(g, None, 2), j) for g in (0, 1) for j in range(3)],
        "none": [(slice(None), slice(None))],
    }
    for scope in scopes[normalize]:
        weight = lengths[scope].double() if normalize == "batch" else torch.ones_like(returns[scope])
        mean = 0.0 if normalize == "none" else float((returns[scope] * weight).sum() / weight.sum())
        torch.testing.assert_close(shift[scope], torch.full_like(shift[scope], mean), rtol=0, atol=1e-6)


def test_dr_grpo_by_hand() -> None:
    got = grpo_advantages([1, 0, 0, 1, 1], [0, 0, 0, 1, 1], 2, scale="none")
    torch.testing.assert_close(got[:, 0], torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, 0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rloo_advantages([1.0, 2.0], [0, 1], 1), "no rloo baseline: raise rollout.group_size"),
        (lambda: rloo_advantages([[1.0]], [0], 1), "one reward per rollout"),
        (lambda: reinforce_advantages([1.0, 2.0], [1], 1), "lengths has shape"),
        (lambda: reinforce_advantages([float("nan")], [1], 1), "finite rewards"),
        (lambda: grpo_advantages([1.0, 0.0], [0, 0], 1, scale="var"), "scale 'var' is unknown"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_of_the_baselines(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [0.1, 0.7, 1.1, 123.4])
def test_a_reward_equal_to_the_mean_has_advantage_zero(value: float) -> None:
    """In floating point the mean of a, a + d, a - d is seldom a: what is left is rounding, and counts nowhere."""
    rewards = [value, value + 0.3, value - 0.3]
    groups, lengths = [0, 0, 0], [[5]] * 3
    for scale in ("std", "none"):
        assert grpo_advantages(rewards, groups, 1, scale=scale)[0] == 0
        assert rloo_advantages(rewards, groups, 1)[0] == 0
        assert reinforce_advantages(rewards, [5, 5, 5], 1, scale=scale)[0] == 0
        for normalize in ("batch", "group", "group_step"):
            returns = [[reward] for reward in rewards]
            out = srpo_advantages(returns, groups, lengths, gamma=1.0, normalize=normalize, clip=2.0, scale=scale)
            assert out[0] == 0 and out[1] > 0 > out[2]
