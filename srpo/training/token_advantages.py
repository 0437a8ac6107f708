"""Advantages that differ by token (PPO), carried to a loss that knows them by reasoning step.

Letters: T packed rows, R labelled rows, N sequences, J reasoning steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from srpo_kernels import step_of_row

from srpo.core.batch import Batch


@dataclass(frozen=True, kw_only=True)
class TokenBatch(Batch):
    """A batch with what the critic has made of it; its `step_advantages` are not read. 0 in all three where ignored."""

    advantages: torch.Tensor  # [T] fp32
    returns: torch.Tensor  # [T] fp32, what the critic is trained on
    values: torch.Tensor  # [T] fp32, of the critic before this optimizer step's first update


@dataclass(frozen=True)
class Tables:
    """The tables of `srpo_kernels.policy_loss`."""

    step_advantages: torch.Tensor  # [N, J]
    step_ends: torch.Tensor  # [N, J] int32
    cu_seqlens: torch.Tensor  # [N+1] int32


def loss_tables(rows: Batch) -> Tables:
    """The tables for rows of `Batch.rows()`. Those of a `TokenBatch` take each row for a sequence of its own, which lies in the
    step that the row belongs to: step ends 0 before it, 1 from it on.

    So a token has an advantage of its own, and the sums by reasoning step stay those of the reasoning steps. Exact for whatever
    looks at one token at a time, which a ratio over sequences or steps does not.
    """
    if not isinstance(rows, TokenBatch):
        return Tables(rows.step_advantages, rows.step_ends, rows.cu_seqlens)
    num_rows, num_steps = len(rows.labels), rows.step_ends.shape[1]
    index = torch.arange(num_rows + 1, device=rows.labels.device)
    _, step = step_of_row(rows.cu_seqlens, rows.step_ends, index[:-1])
    ends = (torch.arange(num_steps, device=step.device) >= step[:, None]).int()
    return Tables(rows.advantages[:, None].expand(-1, num_steps).contiguous(), ends, index.int())
