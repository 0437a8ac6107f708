"""Advantages of reasoning steps: SRPO (Algorithm 1 lines 10-13), GRPO (Eq. 4), REINFORCE and RLOO. PPO's are in `gae`.

All functions take the rollouts of one optimizer step from *all ranks*, in any form that `torch.as_tensor` accepts; they compute
in float64 and return float32 (`step_returns`: float64). The advantages are A_i(t) of Eq. 6 and A_i of Eq. 2; the ratio (Eq. 3),
the clipping and the KL term are in `srpo_kernels.reference.policy_loss`. Shapes: N rollouts, J reasoning steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

ArrayLike = torch.Tensor | np.ndarray | Sequence
Scale = Literal["std", "none"]  # std: divide (reward - baseline) by its standard deviation; none: do not (Dr. GRPO)

_MIN_STD = 1e-8  # far above the std that float64 rounding gives equal rewards, far below that of rewards that differ
_DUST = 1e-12  # a centered value of at most this fraction of the largest value is rounding of the mean, and counts as 0


def step_returns(step_rewards: ArrayLike, gamma: float) -> torch.Tensor:
    """Algorithm 1 line 12, [N, J] float64: sum over k >= j of gamma^(k-j) r_k, the discounted rewards from step j to the last.

    step_rewards [N, J]; gamma in [0, 1]. Raises ValueError for another gamma, another shape, or a reward that is not finite.
    """
    rewards = torch.as_tensor(step_rewards, dtype=torch.float64)
    if rewards.ndim != 2:
        raise ValueError(f"step_rewards has shape {tuple(rewards.shape)}: give one reward per rollout and step, [N, J]")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}: set it to a number from 0 to 1")
    _check_finite(rewards)
    step = torch.arange(rewards.shape[1])
    ahead = step[:, None] - step  # [k, j] = k - j
    return rewards @ (gamma ** ahead.clamp(min=0).double()).tril()  # line 12: A_ij = sum_{k=j}^J gamma^(k-j) r_ik


def srpo_advantages(
    step_rewards: ArrayLike,
    groups: ArrayLike,
    step_lengths: ArrayLike,
    *,
    gamma: float,
    normalize: Literal["batch", "group", "group_step", "none"],
    clip: float,
    scale: Scale = "std",
) -> torch.Tensor:
    """Algorithm 1 lines 10-13 as step-level advantages [N, J] float32: returns, normalized, then clipped to +-clip (0: no clip).

    step_rewards [N, J]; groups [N] ints, equal for rollouts of one prompt, in any order; step_lengths [N, J] tokens of each step.

    normalize:
      batch: (return - mean) / (std + 1e-8), mean and Bessel-corrected std over every response *token* of the batch; a token
        has the return of its step. Before the clip, advantages sum to zero over tokens.
      group: mean and std + 1e-6 (Eq. 4) over all returns of a group, rollouts x steps; the length of a step does not count.
      group_step: the same per step. Returns fall with j, so batch and group favour early steps; group_step does not.
      none: the returns themselves, as Algorithm 1 is printed; with rewards >= 0 no advantage is negative.
    scale "none" omits the division by the std, of the batch or of the group (Dr. GRPO).
    Returns that share a mean and are all equal get advantages of exactly 0.

    Paper: 5.1.5 has "batch normalization is applied" and "clipped at a magnitude of 2"; Algorithm 1 has no baseline. Hence the
    defaults of `AdvantageConfig`: batch and 2.
    Raises ValueError as `step_returns` does, for shapes that do not fit, or for a group of one rollout under a group baseline.
    """
    # The loop over tokens (lines 10, 11 and 13) is `srpo_kernels.step_of_row`: a token of step j reads column j.
    returns = step_returns(step_rewards, gamma)
    group_index = _group_index(groups, len(returns))
    if normalize == "batch":
        lengths = torch.as_tensor(step_lengths, dtype=torch.float64)
        if lengths.shape != returns.shape:
            raise ValueError(f"step_lengths has shape {tuple(lengths.shape)}: give that of step_rewards, {tuple(returns.shape)}")
        advantages = _whiten_tokens(returns, lengths, scale)
    elif normalize == "group":
        _check_group_sizes(group_index, normalize)
        flat = _standardize_groups(returns.reshape(-1, 1), group_index.repeat_interleave(returns.shape[1]), scale)
        advantages = flat.reshape(returns.shape)
    elif normalize == "group_step":
        _check_group_sizes(group_index, normalize)
        advantages = _standardize_groups(returns, group_index, scale)
    elif normalize == "none":
        advantages = returns
    else:
        raise ValueError(f"normalize {normalize!r} is unknown: give one of batch, group, group_step, none")
    return clip_advantages(advantages, clip).float()


def grpo_advantages(
    rewards: ArrayLike, groups: ArrayLike, num_steps: int, *, clip: float = 0.0, scale: Scale = "std"
) -> torch.Tensor:
    """Eq. 4 as [N, num_steps] float32 with equal columns: (R_i - mean of its group) / (std of its group + 1e-6).

    rewards [N]; groups [N] ints; clip and scale as in `srpo_advantages`. A group whose rewards are equal gets exactly 0.
    Paper: Eq. 4 gives no value of delta and does not say which std; here 1e-6 and the Bessel-corrected sample std, as is common.
    Raises ValueError for shapes that do not fit, a reward that is not finite, or a group of one rollout.
    """
    values = _totals(rewards)
    group_index = _group_index(groups, len(values))
    _check_group_sizes(group_index, "grpo")
    return _columns(_standardize_groups(values[:, None], group_index, scale), num_steps, clip)


def rloo_advantages(rewards: ArrayLike, groups: ArrayLike, num_steps: int, *, clip: float = 0.0) -> torch.Tensor:
    """REINFORCE leave-one-out, [N, num_steps] float32 with equal columns: R_i - mean of the other rollouts of its group.

    Ahmadian et al., "Back to Basics": the mean of the other rollouts does not depend on response i, so the baseline is unbiased.
    Never divided by a std. Arguments and errors as in `grpo_advantages`.
    """
    values = _totals(rewards)
    group_index = _group_index(groups, len(values))
    _check_group_sizes(group_index, "rloo")
    size = group_index.bincount().double()[group_index, None]
    return _columns(_standardize_groups(values[:, None], group_index, "none") * size / (size - 1), num_steps, clip)


def reinforce_advantages(
    rewards: ArrayLike, lengths: ArrayLike, num_steps: int, *, clip: float = 0.0, scale: Scale = "std"
) -> torch.Tensor:
    """REINFORCE with a batch baseline, [N, num_steps] float32 with equal columns: (R_i - mean) / (std + 1e-8).

    rewards [N], totals of the rollouts; lengths [N] response tokens. Mean and std are over the response tokens of the batch, as
    in `srpo_advantages` with normalize "batch"; only the return of a token differs: R_i here, that of its step there.
    Raises ValueError for shapes that do not fit or a reward that is not finite.
    """
    values, counts = _totals(rewards), torch.as_tensor(lengths, dtype=torch.float64)
    if counts.shape != values.shape:
        raise ValueError(f"lengths has shape {tuple(counts.shape)}: give that of rewards, {tuple(values.shape)}")
    return _columns(_whiten_tokens(values, counts, scale)[:, None], num_steps, clip)


def _totals(rewards: ArrayLike) -> torch.Tensor:
    """One finite reward per rollout, [N] float64."""
    values = torch.as_tensor(rewards, dtype=torch.float64)
    if values.ndim != 1:
        raise ValueError(f"rewards has shape {tuple(values.shape)}: give one reward per rollout, [N]")
    _check_finite(values)
    return values


def _columns(advantages: torch.Tensor, num_steps: int, clip: float) -> torch.Tensor:
    """[N, 1] clipped and repeated for every step: in Eq. 2 all tokens of o_i have the same A_i."""
    return clip_advantages(advantages, clip).expand(-1, num_steps).float().contiguous()


def _whiten_tokens(values: torch.Tensor, lengths: torch.Tensor, scale: Scale) -> torch.Tensor:
    """(values - mean) / (std + 1e-8), mean and std over tokens: each value counts `lengths` times."""
    total = lengths.sum()
    mean = (lengths * values).sum() / total.clamp(min=1)
    variance = (lengths * (values - mean).square()).sum() / (total - 1).clamp(min=1)
    return _standardize(_without_dust(values - mean, values), variance.sqrt(), 1e-8, scale)


def _standardize_groups(values: torch.Tensor, group_index: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Eq. 4 for each column of `values` [N, C]: minus the mean of the group, divided by its sample std + 1e-6."""
    counts = group_index.bincount()[:, None]
    zeros = values.new_zeros(len(counts), values.shape[1])
    mean = zeros.index_add(0, group_index, values) / counts
    centered = _without_dust(values - mean[group_index], values)  # Eq. 4, numerator: R_i - mean({R_j})
    variance = zeros.index_add(0, group_index, centered.square()) / (counts - 1).clamp(min=1)
    return _standardize(centered, variance.sqrt()[group_index], 1e-6, scale)  # Eq. 4, denominator: std({R_j}) + delta


def _without_dust(centered: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`centered`, exactly 0 if a value equals its mean up to rounding: such a token counts nowhere as clipped."""
    return torch.where(centered.abs() > _DUST * values.abs().max(), centered, 0.0) if values.numel() else centered


def _standardize(centered: torch.Tensor, std: torch.Tensor, delta: float, scale: Scale) -> torch.Tensor:
    if scale not in ("std", "none"):
        raise ValueError(f"scale {scale!r} is unknown: give std or none")
    return torch.where(std > _MIN_STD, centered / (std + delta) if scale == "std" else centered, 0.0)


def _group_index(groups: ArrayLike, num_rollouts: int) -> torch.Tensor:
    """Group numbers from 0, in the order of the ids, [N] int64."""
    ids = torch.as_tensor(groups, dtype=torch.int64)
    if ids.shape != (num_rollouts,):
        raise ValueError(f"groups has shape {tuple(ids.shape)}: give one group per rollout, ({num_rollouts},)")
    return ids.unique(return_inverse=True)[1]


def clip_advantages(advantages: torch.Tensor, clip: float) -> torch.Tensor:
    """Advantages bounded to +-clip (0: no clip), in their own dtype. Raises ValueError for a negative clip."""
    if clip < 0:
        raise ValueError(f"clip is {clip}: set it to a bound above 0, or to 0 for no clip")
    return advantages.clamp(-clip, clip) if clip else advantages


def _check_group_sizes(group_index: torch.Tensor, method: str) -> None:
    if bool((group_index.bincount() == 1).any()):
        raise ValueError(
            f"a group of one rollout has no {method} baseline: raise rollout.group_size to 2 or more, "
            'or set advantage.method to "srpo" with advantage.normalize "batch"'
        )


def _check_finite(rewards: torch.Tensor) -> None:
    bad = (~rewards.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"reward {bad[0].tolist()} is {rewards[tuple(bad[0])].item()}: a judge must return finite rewards")
