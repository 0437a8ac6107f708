"""Token-level advantages of PPO, which Figure 3 contrasts with SRPO's: token rewards, GAE, and the critic's clipped loss.

All sequences are packed end to end as rows: a row is a response token, prompts are left out (`Batch.rows()`). Shapes: R rows, N
sequences, J reasoning steps.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from srpo_kernels.reference import at_least, at_most

from srpo.algorithm.advantages import Scale

Placement = Literal["step_ends", "end"]


def token_rewards(step_rewards: torch.Tensor, step_ends: torch.Tensor, cu_seqlens: torch.Tensor, at: Placement) -> torch.Tensor:
    """Reward of every token, [R] float64; the tokens of a sequence sum to its step rewards r_i^{S_j} (Eq. 5).

    step_rewards, step_ends [N, J] (exclusive, from the first row of the sequence); cu_seqlens [N+1].
    at "step_ends": the last token of a step gets its reward; if the step has no tokens, the token before it, or the first one.
    at "end": the last token of the response gets the sum, as from a reward model in RLHF. Rewards of a sequence without rows are
    dropped. ValueError for another `at`.
    """
    if at not in ("step_ends", "end"):
        raise ValueError(f"rewards at {at!r}: give step_ends or end")
    edges = cu_seqlens.to(torch.int64)
    last = edges[1:, None] - 1  # [N, 1]
    rows = (edges[:-1, None] + step_ends.to(torch.int64) - 1).maximum(edges[:-1, None]).minimum(last)
    rows = rows if at == "step_ends" else last.expand_as(rows)
    has_rows = (edges[1:] > edges[:-1])[:, None].expand_as(rows)
    rewards = torch.zeros(int(edges[-1]), dtype=torch.float64, device=step_rewards.device)
    return rewards.index_add(0, rows[has_rows], step_rewards.double()[has_rows])


class Gae(NamedTuple):
    """Result of `gae`."""

    advantages: torch.Tensor  # [R] float64
    returns: torch.Tensor  # [R] float64, advantages + values: the critic's targets


def gae(rewards: torch.Tensor, values: torch.Tensor, cu_seqlens: torch.Tensor, *, gamma: float, gae_lambda: float) -> Gae:
    """Generalized advantage estimation (Schulman et al. 2016) within each sequence: A_t = delta_t + gamma * lambda * A_{t+1},
    delta_t = r_t + gamma * V_{t+1} - V_t, with V_t the value of the state in which token t is chosen.

    rewards, values [R]; cu_seqlens [N+1]. V is 0 after the last token, also if the response was cut at its maximum length, since
    it is not continued. lambda 1 gives discounted returns minus the value, lambda 0 one-step differences.
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
    # One column per position, so that one loop scans all sequences; rewards and values past the end of a sequence are 0.
    reward_table, value_table = (
        torch.zeros(num, longest + 1, dtype=torch.float64, device=rewards.device).index_put((sequence, position), x.double())
        for x in (rewards, values)
    )
    advantage = torch.zeros(num, dtype=torch.float64, device=rewards.device)
    advantages = torch.zeros_like(reward_table)
    for t in range(longest - 1, -1, -1):
        delta = reward_table[:, t] + gamma * value_table[:, t + 1] - value_table[:, t]  # r_t + gamma V_{t+1} - V_t
        advantage = delta + gamma * gae_lambda * advantage  # A_t = delta_t + gamma lambda A_{t+1}
        advantages[:, t] = advantage
    packed = advantages[sequence, position]
    return Gae(packed, packed + values.double())


def whiten(advantages: torch.Tensor, mean: float, std: float, *, scale: Scale, clip: float) -> torch.Tensor:
    """(advantages - mean) / (std + 1e-8), clipped to +-clip (0: no clip); scale "none" does not divide. Any shape.

    Mean and std are over all tokens of the optimizer step. All zeros if std is at most 1e-8.
    """
    if not std > 1e-8:
        return torch.zeros_like(advantages)
    whitened = (advantages - mean) / (std + 1e-8 if scale == "std" else 1.0)
    return whitened.clamp(-clip, clip) if clip else whitened


class ValueLoss(NamedTuple):
    """Result of `value_loss`."""

    loss: torch.Tensor  # [] differentiable in `values`
    num_clipped: torch.Tensor  # [] int64, rows whose clipped error is the larger one: their gradient is 0


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip: float, num_tokens: int
) -> ValueLoss:
    """Half the squared error of the critic, summed over rows and divided by `num_tokens`, the tokens of the optimizer step.

    values, old_values (before the first update of this optimizer step), returns [R]. clip c > 0 takes the larger error of V and
    of V_old + clamp(V - V_old, -c, c), so that the updates of one optimizer step pull no value further than c. 0: no clip.
    """
    error = (values - returns).square()
    if not clip:
        return ValueLoss(error.sum() / (2 * num_tokens), torch.zeros((), dtype=torch.int64, device=values.device))
    moved = (old_values + at_most(at_least(values - old_values, -clip), clip) - returns).square()
    cut = ((values - old_values).abs() > clip) & (moved > error)
    return ValueLoss(torch.maximum(error, moved).sum() / (2 * num_tokens), cut.sum())
