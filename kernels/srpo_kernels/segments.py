"""Shared by every implementation of the ops: the reasoning step that a row belongs to, and the types of inputs and results.

Shapes: T packed rows, R labelled rows, N sequences, J reasoning steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

IGNORE = -100  # label of a row that is never read


def step_of_row(cu_seqlens: torch.Tensor, step_ends: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequence [R], step [R]) of the given packed rows, both int64. Algorithm 1, line 11: the step that a token belongs to.

    cu_seqlens [N+1]; step_ends [N, J] exclusive ends counted from the first row of the sequence, nondecreasing (an empty step has
    the end of the step before it); rows [R] int64 indices below cu_seqlens[-1]. Rows past the last end belong to the last step.
    """
    starts = cu_seqlens.to(torch.int64)
    sequence = torch.searchsorted(starts, rows, right=True) - 1  # right: an empty sequence owns no row
    position = rows - starts[sequence]
    step = (position[:, None] >= step_ends[sequence]).sum(1)  # Algorithm 1, line 11
    return sequence, step.clamp(max=step_ends.shape[1] - 1)


def compact(keep: torch.Tensor, cu_seqlens: torch.Tensor, step_ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cu_seqlens [N+1], step_ends [N, J]), both int32, recounted over the rows that `keep` [T] bool marks, as if the other rows
    had never been packed.

    Arguments as in `step_of_row`. A kept row stays in its sequence and its step; ends past the end of a sequence become that end.
    """
    kept_before = torch.nn.functional.pad(keep.to(torch.int64).cumsum(0), (1, 0))  # [T+1] number of kept rows before each row
    edges = cu_seqlens.to(torch.int64)
    ends = (edges[:-1, None] + step_ends.to(torch.int64)).minimum(edges[1:, None])
    return kept_before[edges].int(), (kept_before[ends] - kept_before[edges[:-1]][:, None]).int()


def old_of_segments(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor,
    step_ends: torch.Tensor | None,
) -> torch.Tensor:
    """Old log-probabilities [T] that give each labelled row the mean log ratio of its sequence, or of its step in the sequence.
    The row's gradient stays that of its own token (GSPO in its token form).

    logprobs, old_logprobs, labels [T]; step_ends [N, J] as in `step_of_row`; None: whole sequences.
    """
    values, counted = logprobs - old_logprobs, labels != IGNORE
    num_steps = 1 if step_ends is None else step_ends.shape[1]
    ends = cu_seqlens.new_zeros(cu_seqlens.numel() - 1, 1) if step_ends is None else step_ends
    sequence, step = step_of_row(cu_seqlens, ends, torch.arange(values.shape[0], device=values.device))
    segment = sequence * num_steps + step
    sums = values.new_zeros(2, ends.shape[0] * num_steps, dtype=torch.float64)
    sums = sums.index_add(1, segment, torch.stack([values.where(counted, 0), counted.to(values.dtype)]).double())
    return logprobs - (sums[0] / sums[1].clamp(min=1))[segment].to(values.dtype)


def scatter(values: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Values [R, ...] of the given packed rows [R] among all rows, [num_rows, ...]; 0 in the other rows. Differentiable."""
    if rows.shape[0] == num_rows:
        return values
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy(0, rows, values)


class Tables(NamedTuple):
    """The tensors of `srpo_kernels.policy_loss` besides the logits, with the shapes given there."""

    labels: torch.Tensor
    step_advantages: torch.Tensor
    step_ends: torch.Tensor
    cu_seqlens: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None  # at most one of ref_logprobs and ref_logits: the one that the estimator of the KL uses
    kept_ids: torch.Tensor | None
    ref_logits: torch.Tensor | None


@dataclass(frozen=True)
class StepStats:
    """Sums over the labelled rows of each reasoning step, each [J] float64: add them over micro-batches and ranks, then divide.

    Plain sums over tokens, without `weights` and without gradient.
    """

    num_tokens: torch.Tensor  # labelled rows
    num_clipped: torch.Tensor  # labelled rows whose ratio the clip or the dual clip bounds; under "ppo" they have no gradient
    num_outside_support: torch.Tensor  # labelled rows whose label is not in the top-k filter's support
    sum_ratio: torch.Tensor  # pi / pi_old
    sum_kl: torch.Tensor  # the chosen estimator of KL(pi || pi_ref), nats; 0 without a reference
    sum_entropy: torch.Tensor  # nats, of the (filtered) distribution that ratios are taken on

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats.unstack(self.stack() + other.stack())

    def stack(self) -> torch.Tensor:
        """All sums as one tensor [6, J], fields in order: a single all-reduce adds them over ranks."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    @staticmethod
    def unstack(sums: torch.Tensor) -> StepStats:
        """The inverse of `stack`."""
        return StepStats(*sums)

    @staticmethod
    def zeros(num_steps: int, device: torch.device | str = "cpu") -> StepStats:
        """All sums 0: the start of a sum over micro-batches."""
        return StepStats.unstack(torch.zeros(len(fields(StepStats)), num_steps, dtype=torch.float64, device=device))

    @staticmethod
    def sum_rows(step: torch.Tensor, num_steps: int, **rows: torch.Tensor) -> StepStats:
        """Sums by step of per-row values: step [R], and one [R] tensor for each field but `num_tokens`."""
        rows["num_tokens"] = torch.ones_like(step)
        values = torch.stack([rows[field.name].detach().double() for field in fields(StepStats)])  # [6, R]
        return StepStats.unstack(values.new_zeros(len(values), num_steps).index_add(1, step, values))


class PolicyLoss(NamedTuple):
    """Result of `policy_loss`."""

    loss: torch.Tensor  # [] fp32 (fp64 for fp64 logits), differentiable
    logprobs: torch.Tensor  # [T] of the labels, same dtype, detached; 0 for ignored rows
    stats: StepStats
