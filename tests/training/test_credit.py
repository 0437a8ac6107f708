from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from srpo.algorithm.advantages import grpo_advantages, reinforce_advantages, rloo_advantages, srpo_advantages
from srpo.algorithm.losses import sequence_weights
from srpo.core.batch import Rollout
from srpo.core.config.train import AdvantageConfig, LossConfig, SamplerConfig
from srpo.core.metrics import check_key
from srpo.core.step_presets import PAPER
from srpo.training.credit import Credit, assign_credit, group_scores, rollout_metrics, training_groups, verified_rewards

SCHEMA = PAPER
RIGHT = (0.2, 0.2, 0.2, 0.2, 1.0)
WRONG = (0.0,) * 5
WIDE = SamplerConfig(difficulty_low=-1.0, difficulty_high=2.0)


def rollout(
    group: int,
    rewards: Sequence[float],
    lengths: Sequence[int] = (3, 3, 3, 3, 3),
    sources: Sequence[str] = ("judge", "judge", "gold", "gold", "gold"),
    finish: str = "stop",
) -> Rollout:
    ends = tuple(int(end) for end in np.cumsum(lengths))
    tokens = (5,) * ends[-1]
    return Rollout(
        example_id=f"e{group}",
        group=group,
        prompt_ids=(1, 2),
        response_ids=tokens,
        sampling_logprobs=(-1.0,) * ends[-1],
        step_ends=ends,
        answers=tuple("x" if n else None for n in lengths),
        text="",
        finish=finish,
        policy_version=0,
        step_rewards=tuple(rewards),
        reward_sources=tuple(sources),
    )


def drawn(seed: int, num_groups: int = 5, group_size: int = 4) -> list[Rollout]:
    """Random rollouts, group by group; about a quarter of the groups earn nothing."""
    rng = random.Random(seed)
    rollouts = []
    for group in range(num_groups):
        chance = rng.choice((0.0, 0.3, 0.6, 0.8))
        for _ in range(group_size):
            rewards = [r * (rng.random() < chance) for r in RIGHT]
            rollouts.append(rollout(group, rewards, [rng.randint(1, 7) for _ in RIGHT]))
    return rollouts


def credit(
    rollouts: Sequence[Rollout], sampler: SamplerConfig = WIDE, loss: LossConfig | None = None, **advantage: Any
) -> Credit:
    return assign_credit(rollouts, SCHEMA, AdvantageConfig(**advantage), loss or LossConfig(), sampler)


def columns(rollouts: Sequence[Rollout]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rewards [N, J], groups [N], lengths [N, J])"""
    rewards = np.array([r.step_rewards for r in rollouts])
    return rewards, np.array([r.group for r in rollouts]), np.array([r.step_lengths for r in rollouts])


def test_scores_of_groups() -> None:
    rollouts = [rollout(4, RIGHT), rollout(4, WRONG), rollout(2, (0.2, 0.2, 0.2, 0, 0)), rollout(2, (0, 0, 0, 0, 1.0))]
    assert group_scores(rollouts, SCHEMA, "total") == pytest.approx({4: 0.5, 2: (0.6 + 1.0) / 2 / 1.8})
    assert group_scores(rollouts, SCHEMA, "final") == {4: 0.5, 2: 0.5}


def test_steps_that_nobody_grades_do_not_make_a_group_harder() -> None:
    """Pairs that people have judged have a label for the verdict and none for the other steps."""
    skipped = ("skip", "skip", "skip", "skip", "gold")
    rollouts = [rollout(0, (0, 0, 0, 0, 1.0), sources=skipped), rollout(1, WRONG, sources=skipped)]
    assert group_scores(rollouts, SCHEMA, "total") == {0: 1.0, 1: 0.0}
    ungraded = [rollout(0, WRONG, sources=("skip",) * 5)]
    assert group_scores(ungraded, SCHEMA, "total") == group_scores(ungraded, SCHEMA, "final") == {0: 0.0}


def test_the_worked_example() -> None:
    """All five steps right and gamma 1: returns 1.8, 1.6, 1.4, 1.2, 1.0; without a baseline they are the advantages."""
    got = credit([rollout(0, RIGHT), rollout(0, WRONG)], normalize="none", clip=0.0)
    assert got.advantages.tolist() == [pytest.approx([1.8, 1.6, 1.4, 1.2, 1.0]), [0.0] * 5]
    assert got.weights.tolist() == pytest.approx([1 / 2 / 15] * 2)
    assert got.group_scores == {0: 0.5} and got.num_in_window == 1 and got.trains.tolist() == [True, True]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalize", ["batch", "group", "group_step", "none"])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_srpo_is_algorithm_1_on_the_groups_in_the_window(seed: int, normalize: Any, gamma: float) -> None:
    rollouts = drawn(seed)
    got = credit(rollouts, SamplerConfig(difficulty_low=0.01, difficulty_high=0.9), normalize=normalize, gamma=gamma)
    scores = group_scores(rollouts, SCHEMA, "total")
    inside = [r for r in rollouts if 0.01 < scores[r.group] < 0.9]
    assert inside
    rewards, groups, lengths = columns(inside)
    trains = torch.from_numpy(got.trains)
    want = srpo_advantages(rewards, groups, lengths, gamma=gamma, normalize=normalize, clip=2.0)
    assert torch.equal(got.advantages[trains], want)
    assert torch.equal(got.weights[trains], sequence_weights(lengths.sum(1), groups, denominator="sequence_mean"))
    assert not got.advantages[~trains].any() and not got.weights[~trains].any()
    assert got.num_in_window == len(set(groups))


@pytest.mark.parametrize(("method", "column"), [("grpo", slice(4, 5)), ("grpo_step_sum", slice(0, 5))])
def test_grpo_has_one_advantage_per_response(method: Any, column: slice) -> None:
    rollouts = drawn(3)
    rewards, groups, _ = columns(rollouts)
    got = credit(rollouts, method=method, clip=0.0).advantages
    assert torch.equal(got, grpo_advantages(rewards[:, column].sum(1), groups, 5))
    assert torch.equal(got, got[:, :1].expand(-1, 5)) and got.any()
    assert credit(rollouts, method=method, clip=0.5).advantages.abs().max() == 0.5


def test_the_window_is_strict_and_reads_the_chosen_score() -> None:
    rollouts = [rollout(0, RIGHT), rollout(0, WRONG), rollout(1, (0, 0, 0, 0, 1.0)), rollout(1, (0, 0, 0, 0, 1.0))]
    assert credit(rollouts, SamplerConfig(difficulty_low=0.5, difficulty_high=0.9)).trains.tolist() == [False, False, True, True]
    final = SamplerConfig(difficulty_low=0.4, difficulty_high=1.0, difficulty_score="final")
    assert credit(rollouts, final).trains.tolist() == [True, True, False, False]


def test_nothing_in_the_window_trains_nothing() -> None:
    got = credit(drawn(0), SamplerConfig(difficulty_low=0.95, difficulty_high=0.99))
    assert got.num_in_window == 0 and not got.trains.any() and not got.weights.any() and not got.advantages.any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["srpo", "grpo"])
def test_order_of_the_rollouts_does_not_matter(seed: int, method: Any) -> None:
    """The number of ranks changes the order of the rollouts, because prompts are dealt to ranks."""
    rollouts = drawn(seed)
    order = random.Random(seed).sample(range(len(rollouts)), len(rollouts))
    straight, shuffled = credit(rollouts, method=method), credit([rollouts[i] for i in order], method=method)
    assert torch.allclose(shuffled.advantages, straight.advantages[order], atol=1e-6)
    assert torch.allclose(shuffled.weights, straight.weights[order], rtol=1e-6)
    assert shuffled.group_scores == pytest.approx(straight.group_scores)


@pytest.mark.parametrize("denominator", ["sequence_mean", "token_mean"])
def test_weights_over_tokens_sum_to_one(denominator: Any) -> None:
    rollouts = drawn(5)
    got = credit(rollouts, SamplerConfig(), LossConfig(denominator=denominator))
    lengths = torch.tensor([len(r.response_ids) for r in rollouts])
    assert float((got.weights.double() * lengths).sum()) == pytest.approx(1.0, rel=1e-6)


def test_a_group_of_one_has_no_group_baseline() -> None:
    with pytest.raises(ValueError, match=r"rollout\.group_size"):
        credit([rollout(0, RIGHT), rollout(1, WRONG)], method="grpo")


def test_metrics_by_hand() -> None:
    rollouts = [
        rollout(0, RIGHT, (2, 2, 2, 2, 2)),
        rollout(0, WRONG, (0, 1, 1, 1, 1), ("missing", "no_verdict", "gold", "gold", "gold"), finish="length"),
        rollout(1, WRONG, (3, 3, 3, 3, 3)),
        rollout(1, WRONG, (3, 3, 3, 3, 3)),
    ]
    got = credit(rollouts, SamplerConfig(), normalize="none", clip=1.5)
    metrics = rollout_metrics(rollouts, SCHEMA, got)
    for key in metrics:
        check_key(key)
    assert metrics["reward/total"] == pytest.approx(1.8 / 4)
    assert metrics["reward/total_std"] == pytest.approx(np.std([1.8, 0, 0, 0]))
    assert metrics["reward/step/verdict"] == 0.25 and metrics["reward/step/item"] == pytest.approx(0.05)
    assert metrics["reward/missing_frac"] == pytest.approx(1 / 7)
    # Group 0 trains: 10 tokens of returns 1.8, 1.6, 1.4, 1.2, 1.0 clipped to 1.5, and 4 tokens of 0.
    assert metrics["advantage/abs_mean"] == pytest.approx(2 * (1.5 + 1.5 + 1.4 + 1.2 + 1.0) / 14)
    assert metrics["advantage/clip_frac"] == pytest.approx(4 / 14)
    assert metrics["rollout/parse_rate"] == 0.75 and metrics["rollout/truncated_frac"] == 0.25
    assert metrics["rollout/response_length"] == 11 and metrics["rollout/response_length/query_intent"] == 2
    assert metrics["rollout/prompt_length"] == 2 and metrics["rollout/num_responses"] == 4
    assert (metrics["rollout/num_groups"], metrics["rollout/num_groups_in_window"]) == (2, 1)
    assert metrics["rollout/group_score"] == 0.25


def test_metrics_of_a_step_without_training_are_numbers() -> None:
    rollouts = [replace(r, reward_sources=("gold",) * 5) for r in (rollout(0, WRONG), rollout(0, WRONG))]
    metrics = rollout_metrics(rollouts, SCHEMA, credit(rollouts, SamplerConfig()))
    assert all(np.isfinite(value) for value in metrics.values())
    assert not {"advantage/abs_mean", "advantage/clip_frac", "reward/missing_frac"} & metrics.keys()


@pytest.mark.parametrize("method", ["srpo", "grpo", "grpo_star", "grpo_step_sum", "rloo", "reinforce"])
@pytest.mark.parametrize("clip", [0.7, 0.9, 1.4, 1.9])  # numbers that fp32 cannot hold
def test_clip_frac_counts_what_was_clipped(method: Any, clip: float) -> None:
    for seed in range(5):
        rollouts = drawn(seed)
        tokens = np.array([r.step_lengths for r in rollouts])
        got, free = (credit(rollouts, method=method, clip=c) for c in (clip, 0.0))
        beyond = free.advantages.double().abs().numpy() > clip
        want = (tokens * beyond)[got.trains].sum() / tokens[got.trains].sum()
        assert rollout_metrics(rollouts, SCHEMA, got)["advantage/clip_frac"] == pytest.approx(want)
        assert rollout_metrics(rollouts, SCHEMA, free)["advantage/clip_frac"] == 0


def test_an_advantage_at_the_clip_is_not_clipped() -> None:
    rollouts = [rollout(0, (0, 0, 0, 0, 1.0)), rollout(0, WRONG)]
    for clip, want in ((0.5, 0.0), (0.4999, 1.0)):  # both advantages are +-0.5
        got = credit(rollouts, method="grpo", scale="none", clip=clip)
        assert rollout_metrics(rollouts, SCHEMA, got)["advantage/clip_frac"] == want


@pytest.mark.parametrize(
    ("method", "want"),
    [
        ("srpo", {0, 1, 2}),  # any step differs
        ("ppo", {0, 1, 2}),
        ("grpo", {0}),  # the verdict differs
        ("grpo_star", {0, 1}),  # the verdict or a step that a label has graded differs
        ("grpo_step_sum", {0, 1}),  # the sum of the rewards differs
        ("rloo", {0, 1}),
        ("reinforce", {0, 1}),
    ],
)
def test_with_refill_a_group_trains_that_differs_in_what_the_method_reads(method: str, want: set[int]) -> None:
    groups = [
        [(0.2, 0.2, 0.2, 0.2, 1.0), (0.2, 0.2, 0.2, 0.2, 0.0)],
        [(0.2, 0.2, 0.2, 0.2, 0.0), (0.2, 0.2, 0.0, 0.2, 0.0)],
        [(0.2, 0.0, 0.2, 0.2, 0.0), (0.0, 0.2, 0.2, 0.2, 0.0)],  # equal sums from different steps
        [(0.2, 0.0, 0.2, 0.2, 0.0), (0.2, 0.0, 0.2, 0.2, 0.0)],
        [RIGHT, RIGHT],  # outside the window
    ]
    rollouts = [rollout(group, rewards) for group, rows in enumerate(groups) for rewards in rows]
    plain, refilled = SamplerConfig(), SamplerConfig(refill=1)
    assert training_groups(rollouts, SCHEMA, method, plain)[1] == {0, 1, 2, 3}
    scores, inside = training_groups(rollouts, SCHEMA, method, refilled)
    assert inside == want and scores == group_scores(rollouts, SCHEMA, "total")
    assert training_groups([], SCHEMA, method, refilled) == ({}, set())


def test_with_refill_equal_groups_get_no_weight() -> None:
    rollouts = [rollout(0, (0.2, 0, 0.2, 0.2, 0))] * 2 + [rollout(1, RIGHT), rollout(1, WRONG)]
    got = assign_credit(rollouts, SCHEMA, AdvantageConfig(), LossConfig(), SamplerConfig(refill=1))
    assert got.num_in_window == 1 and got.trains.tolist() == [False, False, True, True] and not got.weights[:2].any()


# ---- the baselines -------------------------------------------------------------------------------------------------------------


def test_grpo_star_counts_what_labels_and_rules_have_verified() -> None:
    rollouts = [
        rollout(0, RIGHT),  # S3, S4 gold: 0.2 + 0.2 + 1
        rollout(0, RIGHT, sources=("judge", "rule", "judge", "gold", "gold")),  # S2 (rule), S4 (gold), verdict
        rollout(0, RIGHT, sources=("gold", "judge", "no_verdict", "judge", "judge")),  # S1 (gold), verdict of any source
        rollout(0, WRONG),
    ]
    assert verified_rewards(rollouts).tolist() == pytest.approx([1.4, 1.4, 1.2, 0.0])
    got = credit(rollouts, method="grpo_star", clip=0.0).advantages
    assert torch.equal(got, grpo_advantages([1.4, 1.4, 1.2, 0.0], [0] * 4, 5))


@pytest.mark.parametrize("scale", ["std", "none"])
def test_returns_against_the_batch_and_against_the_others(scale: Any) -> None:
    rollouts = drawn(4)
    rewards, groups, lengths = columns(rollouts)
    total = rewards.sum(1)
    want = reinforce_advantages(total, lengths.sum(1), 5, clip=2.0, scale=scale)
    assert torch.equal(credit(rollouts, method="reinforce", scale=scale).advantages, want) and want.any()
    assert torch.equal(credit(rollouts, method="rloo", scale=scale).advantages, rloo_advantages(total, groups, 5, clip=2.0))
    assert torch.equal(credit(rollouts, method="ppo", scale=scale).advantages, torch.from_numpy(rewards).float())


def test_a_masked_response_counts_in_the_baseline_alone() -> None:
    rollouts = [rollout(0, RIGHT, finish="length"), rollout(0, RIGHT, (1, 1, 1, 1, 1)), rollout(0, WRONG), rollout(1, WRONG)]
    advantage, loss = AdvantageConfig("grpo", clip=0.0), LossConfig(overlong="mask", denominator="token_mean")
    got = assign_credit(rollouts[:3], SCHEMA, advantage, loss, WIDE)
    assert got.trains.tolist() == [False, True, True] and got.num_masked == 1 and got.num_in_window == 1
    assert torch.equal(got.advantages[1:], grpo_advantages([1.0, 1.0, 0.0], [0, 0, 0], 5)[1:]) and not got.advantages[0].any()
    assert got.weights.tolist() == pytest.approx([0, 1 / 20, 1 / 20])
    assert rollout_metrics(rollouts[:3], SCHEMA, got)["rollout/num_masked"] == 1
    kept = assign_credit(rollouts[:3], SCHEMA, advantage, replace(loss, overlong="train"), WIDE)
    assert kept.trains.all() and kept.num_masked is None
    assert "rollout/num_masked" not in rollout_metrics(rollouts[:3], SCHEMA, kept)
    outside = SamplerConfig(difficulty_low=0.1, difficulty_high=0.9)  # responses outside the window do not count as masked
    far = assign_credit([*rollouts, rollout(1, WRONG, finish="length")], SCHEMA, advantage, loss, outside)
    assert far.num_masked == 1 and far.trains.tolist() == [False, True, True, False, False]


def test_a_constant_denominator_is_the_longest_response_that_could_be() -> None:
    rollouts = [rollout(0, RIGHT), rollout(0, WRONG, (1, 1, 1, 1, 1))]
    got = assign_credit(rollouts, SCHEMA, AdvantageConfig("grpo"), LossConfig(denominator="constant"), WIDE, 40)
    assert got.weights.tolist() == pytest.approx([1 / 80] * 2)
    with pytest.raises(ValueError, match=r"rollout\.max_new_tokens"):
        assign_credit(rollouts, SCHEMA, AdvantageConfig("grpo"), LossConfig(denominator="constant"), WIDE)
