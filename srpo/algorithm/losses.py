"""Denominators of the losses as weights per token (Eq. 2, Eq. 6, SFT), and the DPO loss.

Shapes: N sequences, P preference pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import logsigmoid

ArrayLike = torch.Tensor | np.ndarray | Sequence


def sequence_weights(
    response_lengths: ArrayLike,
    groups: ArrayLike,
    *,
    denominator: Literal["sequence_mean", "token_mean", "constant"],
    max_length: int = 0,
) -> torch.Tensor:
    """Weight of every response token of each sequence, [N] float32: the sum of weight * term is Eq. 6 averaged over groups.

    response_lengths [N] tokens; groups [N] ints, equal for rollouts of one prompt. Both are of ALL sequences of the optimizer
    step over all ranks: decided once, so that neither packing nor micro-batches nor ranks can change the loss.

    sequence_mean: 1/num_groups * 1/G_i * 1/|o_i| with G_i the size of the sequence's group. token_mean: 1 / all tokens
    (DAPO). constant: 1/num_groups * 1/G_i * 1/max_length, `max_length` being the longest response that can be sampled, so that a
    long wrong response is not let off by its own length (Dr. GRPO).
    A sequence without tokens has weight 0 but counts in its G_i. But for "constant", weights times lengths sum to 1 where no
    sequence is empty.
    Paper: Eq. 6 is for one prompt and does not say how prompts are combined; their mean.
    Raises ValueError where lengths and groups do not fit, a length is negative, or "constant" has no max_length.
    """
    lengths = torch.as_tensor(response_lengths, dtype=torch.float64)
    group_ids = torch.as_tensor(groups, dtype=torch.int64)
    if lengths.ndim != 1 or group_ids.shape != lengths.shape:
        shapes = f"response_lengths {tuple(lengths.shape)} and groups {tuple(group_ids.shape)}"
        raise ValueError(f"{shapes} do not fit: give one length and one group per sequence, [N]")
    if bool((lengths < 0).any()):
        raise ValueError("response_lengths has a negative entry: a length counts tokens")
    if denominator == "sequence_mean":
        _, group_index, sizes = group_ids.unique(return_inverse=True, return_counts=True)
        denominators = len(sizes) * sizes[group_index] * lengths
    elif denominator == "token_mean":
        denominators = lengths.sum().expand(lengths.shape)
    elif denominator == "constant":
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}: denominator constant needs rollout.max_new_tokens, 1 or more")
        _, group_index, sizes = group_ids.unique(return_inverse=True, return_counts=True)
        denominators = (len(sizes) * sizes[group_index] * max_length).double()
    else:
        raise ValueError(f"denominator {denominator!r} is unknown: give sequence_mean, token_mean or constant")
    return torch.where(lengths > 0, 1 / denominators, 0.0).float()


def sft_weights(
    response_lengths: ArrayLike, *, denominator: Literal["sequence_mean", "token_mean"] = "token_mean"
) -> torch.Tensor:
    """Weight of every response token of each sequence, [N] float32: the SFT loss is -sum of weight * logprob.

    token_mean: the mean over all tokens of the optimizer step; sequence_mean: the mean over sequences of their token means.
    """
    return sequence_weights(response_lengths, range(len(response_lengths)), denominator=denominator)


class DpoLoss(NamedTuple):
    """What `dpo_loss` returns."""

    loss: torch.Tensor  # [] differentiable
    metrics: dict[str, torch.Tensor]  # [] each, detached, already divided by num_pairs: add them over micro-batches


def dpo_loss(
    chosen_logprobs: torch.Tensor,
    rejected_logprobs: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    num_pairs: int | None = None,
    label_smoothing: float = 0.0,
) -> DpoLoss:
    """DPO: the mean over pairs of -log sigmoid(margin), where margin is chosen_reward - rejected_reward of beta * log(pi / ref).

    label_smoothing e takes a label for wrong with that probability: -(1 - e) log sigmoid(margin) - e log sigmoid(-margin).
    All four [P]: summed log-probabilities of whole responses under the policy and under the reference. `num_pairs` is the number
    of pairs of the optimizer step over all micro-batches and ranks (None: P). Metrics: means of chosen_reward, rejected_reward,
    margin, and accuracy, the share of pairs with a positive margin.
    Raises ValueError where beta is not positive, label_smoothing lies outside [0, 0.5), or the shapes differ.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: it must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: half of the labels or more cannot be wrong; give 0 to below 0.5")
    shapes = {tuple(t.shape) for t in (chosen_logprobs, rejected_logprobs, ref_chosen, ref_rejected)}
    if len(shapes) > 1 or chosen_logprobs.ndim != 1:
        raise ValueError(f"log-probabilities have shapes {sorted(shapes)}: give four tensors [P]")
    count = len(chosen_logprobs) if num_pairs is None else num_pairs
    chosen_reward = beta * (chosen_logprobs - ref_chosen)
    rejected_reward = beta * (rejected_logprobs - ref_rejected)
    margin = chosen_reward - rejected_reward
    metrics = {
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": margin,
        "accuracy": (margin > 0).to(margin.dtype),
    }
    losses = (label_smoothing - 1) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return DpoLoss(losses.sum() / count, {name: value.detach().sum() / count for name, value in metrics.items()})
