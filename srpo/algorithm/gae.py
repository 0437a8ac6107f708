"""Token-level advantages of PPO, the contrast of Figure 3: rewards on tokens, GAE, and the clipped loss of the critic.

All sequences are packed rows end to end, each row a response token, without prompts (`Batch.rows()`). Shapes: R rows, N
sequences, J reasoning steps.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from srpo.algorithm.advantages import Scale

Placement = Literal["step_ends", "end"]


def token_rewards(step_rewards: torch.Tensor, step_ends: torch.Tensor, cu_seqlens: torch.Tensor, at: Placement) -> torch.Tensor:
    """Reward of every token, [R] float64; over the tokens of a sequence they add up to its step rewards.

    step_rewards, step_ends [N, J] (exclusive, from the first row of the sequence); cu_seqlens [N+1].
    step_ends: the reward of a step stands on its last token; that of a step without tokens on the token before it, or on the
    first. end: all of it stands on the last token, as a reward model's does in RLHF. A sequence without rows gets nothing.
    """
    if at not in ("step_ends", "end"):
        raise ValueError(f"rewards at {at!r}: give step_ends or end")
    edges = cu_seqlens.to(torch.int64)
    last = edges[1:, None] - 1  # [N, 1]
    rows = (edges[:-1, None] + step_ends.to(torch.int64) - 1).maximum(edges[:-1, None]).minimum(last)
    rows = rows if at == "step_ends" else last.expand_as(rows)
    there = (edges[1:] > edges[:-1])[:, None].expand_as(rows)
    made = torch.zeros(int(edges[-1]), dtype=torch.float64, device=step_rewards.device)
    return made.index_add(0, rows[there], step_rewards.double()[there])


class Gae(NamedTuple):
    """What `gae` returns."""

    advantages: torch.Tensor  # [R] float64
    returns: torch.Tensor  # [R] float64, advantages + values: what the critic is trained on


def gae(rewards: torch.Tensor, values: torch.Tensor, cu_seqlens: torch.Tensor, *, gamma: float, gae_lambda: float) -> Gae:
    """Generalized advantage estimates (Schulman et al.): A_t = delta_t + gamma * lambda * A_{t+1} within each sequence, where
    delta_t = r_t + gamma * V_{t+1} - V_t, V_t being the value of the state in which token t is chosen.

    rewards, values [R]; cu_seqlens [N+1]. What follows the last token is worth 0, also where the response was cut for its length:
    it will not be continued. lambda 1 gives discounted returns less the value, lambda 0 one-step differences.
    Raises ValueError for a gamma or lambda outside [0, 1], or shapes that do not fit.
    """
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: give a number from 0 to 1")
    edges = cu_seqlens.to(torch.int64)
    if rewards.shape != values.shape or rewards.ndim != 1 or int(edges[-1]) != len(rewards):
        shapes = f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)} and cu_seqlens up to {int(edges[-1])}"
        raise ValueError(f"{shapes} do not fit: give one reward and one value per row")
    lengths = edges.diff()
    num, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
    sequence = torch.arange(num, device=rewards.device).repeat_interleave(lengths)
    position = torch.arange(len(rewards), device=rewards.device) - edges[:-1][sequence]
    # One column per position, so that all sequences are scanned together; beyond the end of one everything is 0.
    reward_table, value_table = (
        torch.zeros(num, longest + 1, dtype=torch.float64, device=rewards.device).index_put((sequence, position), x.double())
        for x in (rewards, values)
    )
    advantage = torch.zeros(num, dtype=torch.float64, device=rewards.device)
    advantages = torch.zeros_like(reward_table)
    for t in range(longest - 1, -1, -1):
        delta = reward_table[:, t] + gamma * value_table[:, t + 1] - value_table[:, t]
        advantage = delta + gamma * gae_lambda * advantage
        advantages[:, t] = advantage
    made = advantages[sequence, position]
    return Gae(made, made + values.double())


def whiten(advantages: torch.Tensor, mean: float, std: float, *, scale: Scale, clip: float) -> torch.Tensor:
    """(advantages - mean) / (std + 1e-8), clipped to +-clip (0: not clipped); scale "none" does not divide. Any shape.

    Mean and std are those of all tokens of the optimizer step. Exactly 0 where nothing varies.
    """
    if not std > 1e-8:
        return torch.zeros_like(advantages)
    made = (advantages - mean) / (std + 1e-8 if scale == "std" else 1.0)
    return made.clamp(-clip, clip) if clip else made


class ValueLoss(NamedTuple):
    """What `value_loss` returns."""

    loss: torch.Tensor  # [] differentiable in `values`
    num_clipped: torch.Tensor  # [] rows whose clipped error is the larger one, so that they have no gradient


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip: float, num_tokens: int
) -> ValueLoss:
    """Half the squared error of the critic, summed over rows and divided by `num_tokens`, those of the whole optimizer step.

    values, old_values (before this step's first update), returns [R]. With clip c > 0 it is the larger of the errors of V and of
    V_old + clamp(V - V_old, -c, c): a value is not pulled further than c in one optimizer step's updates. 0: not clipped.
    """
    error = (values - returns).square()
    if not clip:
        return ValueLoss(error.sum() / (2 * num_tokens), torch.zeros((), dtype=torch.int64, device=values.device))
    moved = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    cut = ((values - old_values).abs() > clip) & (moved > error)
    return ValueLoss(torch.maximum(error, moved).sum() / (2 * num_tokens), cut.sum())
