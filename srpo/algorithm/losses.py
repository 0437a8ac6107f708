"""Denominators of the losses as a weight per token (1/G 1/|o_i| of Eq. 2 and Eq. 6, and SFT), and the DPO loss.

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
    """Weight of each response token of a sequence, [N] float32: sum of weight * term is Eq. 6 (or Eq. 2) averaged over groups.

    response_lengths [N] tokens; groups [N] ints, equal for rollouts of one prompt. Both cover ALL sequences of the optimizer
    step on all ranks, so that packing, micro-batches and the number of ranks cannot change the loss.

    denominator:
      sequence_mean: 1/num_groups * 1/G_i * 1/|o_i|, Eq. 6 as printed; G_i is the size of the sequence's group.
      token_mean: 1 / number of tokens of all sequences (DAPO).
      constant: 1/num_groups * 1/G_i * 1/max_length (Dr. GRPO). `max_length` is the longest response that can be sampled: a long
        wrong response is then penalized in full, not divided by its own length.
    A sequence without tokens has weight 0 but counts in its G_i. If no sequence is empty, weights times lengths sum to 1, except
    for "constant".
    Paper: Eq. 6 is for one prompt and does not say how prompts are combined; here by their mean.
    Raises ValueError if lengths and groups do not fit, a length is negative, or "constant" has no max_length.
    """
    lengths = torch.as_tensor(response_lengths, dtype=torch.float64)
    group_ids = torch.as_tensor(groups, dtype=torch.int64)
    if lengths.ndim != 1 or group_ids.shape != lengths.shape:
        shapes = f"response_lengths {tuple(lengths.shape)} and groups {tuple(group_ids.shape)}"
        raise ValueError(f"{shapes} do not fit: give one length and one group per sequence, [N]")
    if bool((lengths < 0).any()):
        raise ValueError("response_lengths has a negative entry: give the number of tokens, 0 or more")
    if denominator == "sequence_mean":
        _, group_index, sizes = group_ids.unique(return_inverse=True, return_counts=True)
        denominators = len(sizes) * sizes[group_index] * lengths  # Eq. 6: G |o_i|, times the number of prompts
    elif denominator == "token_mean":
        denominators = lengths.sum().expand(lengths.shape)  # DAPO: sum_i |o_i| over all prompts, in place of G |o_i|
    elif denominator == "constant":
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}: denominator constant needs rollout.max_new_tokens, 1 or more")
        _, group_index, sizes = group_ids.unique(return_inverse=True, return_counts=True)
        denominators = (len(sizes) * sizes[group_index] * max_length).double()  # Dr. GRPO: G times a constant, for |o_i|
    else:
        raise ValueError(f"denominator {denominator!r} is unknown: give sequence_mean, token_mean or constant")
    return torch.where(lengths > 0, 1 / denominators, 0.0).float()


def sft_weights(
    response_lengths: ArrayLike, *, denominator: Literal["sequence_mean", "token_mean"] = "token_mean"
) -> torch.Tensor:
    """Weight of each response token of a sequence, [N] float32: the SFT loss is -sum of weight * logprob.

    token_mean: mean over all tokens of the optimizer step. sequence_mean: mean over sequences of each one's token mean.
    """
    return sequence_weights(response_lengths, range(len(response_lengths)), denominator=denominator)


def last_step_factors(response_lengths: ArrayLike, num_last: ArrayLike, weight: float) -> torch.Tensor:
    """Factors [N, 2] on the weights of the tokens before the last step of a response, and of those in it: 1 to `weight`, scaled
    so that the weights of the response keep their sum.

    response_lengths, num_last [N]: tokens of the response and of its last step. If one of the two parts is empty, both factors
    are 1.
    """
    lengths = torch.as_tensor(response_lengths, dtype=torch.float64)
    last = torch.as_tensor(num_last, dtype=torch.float64)
    scale = lengths / (lengths - last + weight * last)
    both = ((last > 0) & (last < lengths))[:, None]
    return torch.where(both, torch.stack([scale, weight * scale], 1), 1.0).float()


class DpoLoss(NamedTuple):
    """Result of `dpo_loss`."""

    loss: torch.Tensor  # [] differentiable
    sums: dict[str, torch.Tensor]  # [] fp64 each, detached: sums over the pairs, whose means are the metrics


def dpo_loss(
    chosen_logprobs: torch.Tensor,
    rejected_logprobs: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    num_pairs: int | None = None,
    label_smoothing: float = 0.0,
) -> DpoLoss:
    """DPO: mean over pairs of -log sigmoid(margin), margin = chosen_reward - rejected_reward, reward = beta * log(pi / pi_ref).

    The four tensors [P] are log-probabilities of responses, summed over tokens, under the policy and under the reference.
    label_smoothing e is the assumed share of wrong labels: -(1 - e) log sigmoid(margin) - e log sigmoid(-margin).
    num_pairs counts the pairs of the optimizer step over all micro-batches and ranks (None: P). Sums: of chosen_reward,
    rejected_reward, margin, and accuracy, 1 for a pair with a positive margin.
    Raises ValueError if beta is not positive, label_smoothing lies outside [0, 0.5), or the shapes differ.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: set it above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: set it to 0 or more and below 0.5")
    shapes = {tuple(t.shape) for t in (chosen_logprobs, rejected_logprobs, ref_chosen, ref_rejected)}
    if len(shapes) > 1 or chosen_logprobs.ndim != 1:
        raise ValueError(f"log-probabilities have shapes {sorted(shapes)}: give four tensors [P]")
    count = len(chosen_logprobs) if num_pairs is None else num_pairs
    chosen_reward = beta * (chosen_logprobs - ref_chosen)
    rejected_reward = beta * (rejected_logprobs - ref_rejected)
    margin = chosen_reward - rejected_reward
    values = {
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": margin,
        "accuracy": (margin > 0).to(margin.dtype),
    }
    losses = (label_smoothing - 1) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return DpoLoss(losses.sum() / count, {name: value.detach().double().sum() for name, value in values.items()})
