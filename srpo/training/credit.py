"""Credit assignment: which groups train (4.2.1), advantages (Algorithm 1, lines 10-13; Eq. 4), and the weights of Eq. 6.

Credit is assigned over the rollouts of *all* ranks at once, from a few numbers per rollout; each rank then takes its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from srpo.algorithm.advantages import clip_advantages, grpo_advantages, reinforce_advantages, rloo_advantages, srpo_advantages
from srpo.algorithm.losses import sequence_weights
from srpo.core.batch import Rollout
from srpo.core.config.train import AdvantageConfig, LossConfig, SamplerConfig
from srpo.core.steps import StepSchema
from srpo.data.sampler import in_window
from srpo.rewards.audit import asked_counts


@dataclass(frozen=True)
class Credit:
    """The result of `assign_credit`. Row i belongs to rollout i."""

    advantages: torch.Tensor  # [N, J] fp32, 0 for a rollout that does not train. With method "ppo": step rewards for its critic
    weights: torch.Tensor  # [N] fp32, weight of each token of a response, 0 for a rollout that does not train
    trains: np.ndarray  # [N] bool: the rollout's group trains, and loss.overlong does not mask the rollout
    group_scores: dict[int, float]  # group -> difficulty score in 0..1
    num_in_window: int  # number of groups that train
    clipped: torch.Tensor  # [N, J] bool: advantage.clip has bounded the advantage. With method "ppo": none
    num_masked: int | None = None  # number of responses in these groups that are masked; None unless loss.overlong is "mask"


def group_scores(rollouts: Sequence[Rollout], schema: StepSchema, score: str) -> dict[int, float]:
    """Group -> difficulty score in 0..1: mean over its rollouts of total reward / maximum ("total") or verdict reward / its
    maximum ("final").

    A step that is skipped for an example (source "skip") adds nothing to the maximum. A rollout with only skipped steps scores 0.
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


def training_groups(
    rollouts: Sequence[Rollout], schema: StepSchema, method: str, sampler: SamplerConfig
) -> tuple[dict[int, float], set[int]]:
    """(`group_scores`, the groups that train): a group trains if its score lies in the difficulty window (4.2.1).

    With `sampler.refill` its rollouts must also differ in the rewards that `method` reads: those of the steps, or one scalar.
    Further prompts replace the other groups.
    """
    scores = group_scores(rollouts, schema, sampler.difficulty_score)
    within = in_window(list(scores.values()), sampler.difficulty_low, sampler.difficulty_high)
    inside = {group for group, keep in zip(scores, within, strict=True) if keep}
    if not (sampler.refill and rollouts):
        return scores, inside
    rewards = np.array([_rewards(r) for r in rollouts])
    scalars = {"grpo": rewards[:, -1], "grpo_star": verified_rewards(rollouts)}
    scalars |= dict.fromkeys(("grpo_step_sum", "rloo", "reinforce"), rewards.sum(1))
    earned: dict[int, set[tuple[float, ...]]] = {}
    for rollout, row in zip(rollouts, scalars.get(method, rewards).reshape(len(rollouts), -1).tolist(), strict=True):
        earned.setdefault(rollout.group, set()).add(tuple(row))
    return scores, {group for group in inside if len(earned[group]) > 1}


def assign_credit(
    rollouts: Sequence[Rollout],
    schema: StepSchema,
    advantage: AdvantageConfig,
    loss: LossConfig,
    sampler: SamplerConfig,
    max_new_tokens: int = 0,
) -> Credit:
    """Advantages (Algorithm 1, lines 10-13; Eq. 4) and weights of all rollouts of an optimizer step.

    Both are 0 for groups that do not train (`training_groups`). A response that loss.overlong masks counts in the baseline and
    the size of its group, but does not train. Only loss.denominator "constant" reads `max_new_tokens`.
    """
    scores, inside = training_groups(rollouts, schema, advantage.method, sampler)
    trains = np.array([r.group in inside for r in rollouts])
    advantages = torch.zeros(len(rollouts), schema.num_steps)
    clipped = torch.zeros(len(rollouts), schema.num_steps, dtype=torch.bool)
    weights = torch.zeros(len(rollouts))
    if trains.any():
        chosen = [r for r, keep in zip(rollouts, trains, strict=True) if keep]
        rewards = np.array([_rewards(r) for r in chosen])
        groups = np.array([r.group for r in chosen])
        cut = np.array([loss.overlong == "mask" and r.finish == "length" for r in chosen])
        index = torch.from_numpy(np.flatnonzero(trains))
        unclipped = _advantages(chosen, rewards, groups, schema, advantage)  # Algorithm 1, lines 10-13, or Eq. 4
        bounded = clip_advantages(unclipped, 0.0 if advantage.method == "ppo" else advantage.clip)
        advantages[index], clipped[index] = bounded, bounded != unclipped
        lengths = np.array([len(r.response_ids) for r in chosen])
        weights[index] = sequence_weights(
            np.where(cut, 0, lengths), groups, denominator=loss.denominator, max_length=max_new_tokens
        )
        masked = index[torch.from_numpy(cut)]
        advantages[masked] = weights[masked] = 0.0
        trains[masked.numpy()] = False
    num_masked = int(sum(r.group in inside for r in rollouts) - trains.sum()) if loss.overlong == "mask" else None
    return Credit(advantages, weights, trains, scores, len(inside), clipped, num_masked)


def _advantages(
    rollouts: Sequence[Rollout], rewards: np.ndarray, groups: np.ndarray, schema: StepSchema, cfg: AdvantageConfig
) -> torch.Tensor:
    """Advantages [N, J] by `advantage.method`, before advantage.clip; rewards [N, J], groups [N]."""
    num_steps, scale = schema.num_steps, cfg.scale
    lengths = np.array([r.step_lengths for r in rollouts])
    if cfg.method == "srpo":  # Algorithm 1, lines 10-13
        return srpo_advantages(rewards, groups, lengths, gamma=cfg.gamma, normalize=cfg.normalize, clip=0.0, scale=scale)
    if cfg.method == "ppo":
        return torch.from_numpy(rewards).float()  # step rewards: training/ppo.py makes token advantages with the critic
    if cfg.method == "reinforce":
        return reinforce_advantages(rewards.sum(1), lengths.sum(1), num_steps, scale=scale)
    if cfg.method == "rloo":
        return rloo_advantages(rewards.sum(1), groups, num_steps)
    # Eq. 4 on the verdict's reward, on that plus verified steps (5.1.4), or on the sum of step rewards (Table 3, "+ Step Reward")
    scalar = {"grpo": rewards[:, -1], "grpo_star": verified_rewards(rollouts), "grpo_step_sum": rewards.sum(1)}[cfg.method]
    return grpo_advantages(scalar, groups, num_steps, scale=scale)


def verified_rewards(rollouts: Sequence[Rollout]) -> np.ndarray:
    """The verdict's reward plus the rewards of earlier steps that a label or a rule has graded, [N].

    Paper: 5.1.4, GRPO* adds "stepwise verification rewards for Steps 3 and 4", the steps that have labels (Eq. 5). A step whose
    label is missing, so that the judge has graded it, adds nothing here.
    """
    return np.array(
        [
            sum(r for r, source in zip(_rewards(x)[:-1], x.reward_sources or (), strict=False) if source in ("gold", "rule"))
            + _rewards(x)[-1]
            for x in rollouts
        ]
    )


def rollout_metrics(rollouts: Sequence[Rollout], schema: StepSchema, credit: Credit) -> dict[str, float]:
    """The `reward/*`, `advantage/*` and `rollout/*` metrics of an optimizer step, over the rollouts of all ranks.

    Without a token that trains `advantage/*` has no keys, without a step left to the judge `reward/missing_frac` has none.
    """
    rewards = np.array([_rewards(r) for r in rollouts])
    lengths = np.array([r.step_lengths for r in rollouts])
    num_asked, num_missing = asked_counts(rollouts, schema).tolist()
    tokens = lengths * credit.trains[:, None]
    num_tokens = int(tokens.sum())
    metrics = {
        "reward/total": rewards.sum(1).mean(),
        "reward/total_std": rewards.sum(1).std(),
        "rollout/parse_rate": np.mean([None not in r.answers for r in rollouts]),
        "rollout/truncated_frac": np.mean([r.finish == "length" for r in rollouts]),
        "rollout/response_length": lengths.sum(1).mean(),
        "rollout/prompt_length": np.mean([len(r.prompt_ids) for r in rollouts]),
        "rollout/num_responses": len(rollouts),
        "rollout/num_groups": len(credit.group_scores),
        "rollout/num_groups_in_window": credit.num_in_window,
        "rollout/group_score": np.mean(list(credit.group_scores.values())),
    }
    if num_asked:
        metrics["reward/missing_frac"] = num_missing / num_asked
    if num_tokens:
        metrics["advantage/abs_mean"] = (tokens * credit.advantages.abs().double().numpy()).sum() / num_tokens
        metrics["advantage/clip_frac"] = tokens[credit.clipped.numpy()].sum() / num_tokens
    if credit.num_masked is not None:
        metrics["rollout/num_masked"] = credit.num_masked
    for j, spec in enumerate(schema.specs):
        metrics[f"reward/step/{spec.name}"] = rewards[:, j].mean()
        metrics[f"rollout/response_length/{spec.name}"] = lengths[:, j].mean()
    return {key: float(value) for key, value in metrics.items()}


def _rewards(rollout: Rollout) -> tuple[float, ...]:
    assert rollout.step_rewards is not None, "rollouts are scored before they get credit"
    return rollout.step_rewards
