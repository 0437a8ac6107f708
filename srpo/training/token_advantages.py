"""Advantages per token (PPO) for a loss that takes advantages per reasoning step.

Letters: T packed rows, R labelled rows, N sequences, J reasoning steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from srpo_kernels import step_of_row

from srpo.core.batch import Batch


@dataclass(frozen=True, kw_only=True)
class TokenBatch(Batch):
    """A batch with the critic's results, all 0 for ignored rows. Its `step_advantages` are not used."""

    advantages: torch.Tensor  # [T] fp32
    returns: torch.Tensor  # [T] fp32, the critic's training targets
    values: torch.Tensor  # [T] fp32, the critic's values before this optimizer step's first update


@dataclass(frozen=True)
class Tables:
    """Arguments of `srpo_kernels.policy_loss`."""

    step_advantages: torch.Tensor  # [N, J]
    step_ends: torch.Tensor  # [N, J] int32
    cu_seqlens: torch.Tensor  # [N+1] int32


def loss_tables(rows: Batch) -> Tables:
    """The tables for rows of `Batch.rows()`. For a `TokenBatch` each row becomes a sequence of its own that lies in the row's
    reasoning step: its step ends are 0 before that step and 1 from it on.

    This gives every token its own advantage and keeps the sums by reasoning step unchanged. It is exact for computations on one
    token at a time, but not for a ratio over sequences or steps.
    """
    if not isinstance(rows, TokenBatch):
        return Tables(rows.step_advantages, rows.step_ends, rows.cu_seqlens)
    num_rows, num_steps = len(rows.labels), rows.step_ends.shape[1]
    index = torch.arange(num_rows + 1, device=rows.labels.device)
    _, step = step_of_row(rows.cu_seqlens, rows.step_ends, index[:-1])
    ends = (torch.arange(num_steps, device=step.device) >= step[:, None]).int()
    return Tables(rows.advantages[:, None].expand(-1, num_steps).contiguous(), ends, index.int())
