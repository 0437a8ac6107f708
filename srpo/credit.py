"""From step rewards to what the loss needs: which groups train (4.2.1), advantages (Algorithm 1, Eq. 4), the weights of Eq. 6.

Decided over the rollouts of *all* ranks at once, from a table of a few numbers per rollout; each rank then takes its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from srpo.algorithm.advantages import grpo_advantages, srpo_advantages
from srpo.algorithm.losses import sequence_weights
from srpo.batch import Rollout
from srpo.config import AdvantageConfig, LossConfig, SamplerConfig
from srpo.data.sampler import in_window
from srpo.steps import StepSchema


@dataclass(frozen=True)
class Credit:
    """Rows are the rollouts in the order given."""

    advantages: torch.Tensor  # [N, J] fp32, 0 where the rollout does not train
    weights: torch.Tensor  # [N] fp32, 0 where it does not
    trains: np.ndarray  # [N] bool: its group lies in the difficulty window
    group_scores: dict[int, float]  # group -> difficulty score in 0..1
    num_in_window: int  # groups that train


def group_scores(rollouts: Sequence[Rollout], schema: StepSchema, score: str) -> dict[int, float]:
    """Group -> mean over its rollouts of total reward / the maximum ("total"), or of verdict reward / its maximum ("final").

    Steps that the schema skips for an example count neither as reward nor towards the maximum. In 0..1; 0 where nothing counts.
    """
    values: dict[int, list[float]] = {}
    for rollout in rollouts:
        rewards, sources = _rewards(rollout), rollout.reward_sources
        assert sources is not None
        steps = slice(None) if score == "total" else slice(-1, None)
        graded = zip(schema.specs[steps], sources[steps], strict=True)
        maximum = sum(spec.reward for spec, source in graded if source != "skip")
        value = sum(rewards[steps]) / maximum if maximum else 0.0
        values.setdefault(rollout.group, []).append(value)
    return {group: float(np.mean(v)) for group, v in values.items()}


def assign_credit(
    rollouts: Sequence[Rollout],
    schema: StepSchema,
    advantage: AdvantageConfig,
    loss: LossConfig,
    sampler: SamplerConfig,
) -> Credit:
    """Advantages and weights of all rollouts of an optimizer step; groups outside of the window get neither."""
    scores = group_scores(rollouts, schema, sampler.difficulty_score)
    within = in_window(list(scores.values()), sampler.difficulty_low, sampler.difficulty_high)
    inside = {group for group, keep in zip(scores, within, strict=True) if keep}
    trains = np.array([r.group in inside for r in rollouts])
    advantages = torch.zeros(len(rollouts), schema.num_steps)
    weights = torch.zeros(len(rollouts))
    if trains.any():
        chosen = [r for r, keep in zip(rollouts, trains, strict=True) if keep]
        rewards = np.array([_rewards(r) for r in chosen])
        groups = np.array([r.group for r in chosen])
        if advantage.method == "srpo":
            lengths = np.array([r.step_lengths for r in chosen])
            made = srpo_advantages(
                rewards, groups, lengths, gamma=advantage.gamma, normalize=advantage.normalize, clip=advantage.clip
            )
        else:  # Eq. 4 on the verdict alone, or on the sum of step rewards (Table 3, "+ Step Reward")
            scalar = rewards[:, -1] if advantage.method == "grpo" else rewards.sum(1)
            made = grpo_advantages(scalar, groups, schema.num_steps, clip=advantage.clip)
        index = torch.from_numpy(np.flatnonzero(trains))
        advantages[index] = made
        lengths = np.array([len(r.response_ids) for r in chosen])
        weights[index] = sequence_weights(lengths, groups, denominator=loss.denominator)
    return Credit(advantages, weights, trains, scores, len(inside))


def rollout_metrics(rollouts: Sequence[Rollout], schema: StepSchema, credit: Credit, max_clip: float) -> dict[str, float]:
    """The `reward/*`, `advantage/*` and `rollout/*` metrics of an optimizer step, over the rollouts of all ranks."""
    rewards = np.array([_rewards(r) for r in rollouts])
    lengths = np.array([r.step_lengths for r in rollouts])
    judged = [s for r in rollouts for s in (r.reward_sources or ()) if s in ("judge", "no_verdict")]
    tokens = lengths * credit.trains[:, None]
    magnitude = credit.advantages.abs().double().numpy()
    total = max(int(tokens.sum()), 1)
    metrics = {
        "reward/total": rewards.sum(1).mean(),
        "reward/total_std": rewards.sum(1).std(),
        "reward/missing_frac": judged.count("no_verdict") / len(judged) if judged else 0.0,
        "advantage/abs_mean": (tokens * magnitude).sum() / total,
        "advantage/clip_frac": tokens[magnitude >= max_clip].sum() / total if max_clip else 0.0,
        "rollout/parse_rate": np.mean([None not in r.answers for r in rollouts]),
        "rollout/truncated_frac": np.mean([r.finish == "length" for r in rollouts]),
        "rollout/response_length": lengths.sum(1).mean(),
        "rollout/prompt_length": np.mean([len(r.prompt_ids) for r in rollouts]),
        "rollout/num_responses": len(rollouts),
        "rollout/num_groups": len(credit.group_scores),
        "rollout/num_groups_in_window": credit.num_in_window,
        "rollout/group_score": np.mean(list(credit.group_scores.values())),
    }
    for j, spec in enumerate(schema.specs):
        metrics[f"reward/step/{spec.name}"] = rewards[:, j].mean()
        metrics[f"rollout/response_length/{spec.name}"] = lengths[:, j].mean()
    return {key: float(value) for key, value in metrics.items()}


def _rewards(rollout: Rollout) -> tuple[float, ...]:
    assert rollout.step_rewards is not None, "rollouts are scored before they get credit"
    return rollout.step_rewards
