"""Checks of arguments: each error names the argument and says what to give instead."""

from __future__ import annotations

import torch


def check_logits(logits: torch.Tensor, labels: torch.Tensor, top_k: int | None, kept_ids: torch.Tensor | None) -> None:
    """Raises ValueError if logits and labels do not fit, or if the filter is invalid."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: give [T, V] and [T]")
    if not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype}: give fp32, bf16, fp16 or fp64")
    check_filter(labels, top_k, kept_ids)


def check_filter(labels: torch.Tensor, top_k: int | None, kept_ids: torch.Tensor | None) -> None:
    """Raises ValueError if the size or the shape of the top-k filter is invalid."""
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k is {top_k}: give the number of ids that the sampler keeps, or None if it keeps all")
    if kept_ids is not None and (kept_ids.ndim != 2 or kept_ids.shape[0] != labels.shape[0]):
        raise ValueError(f"kept_ids has shape {tuple(kept_ids.shape)}: give [T, K] with T = {labels.shape[0]}")


def check_rows(labels: torch.Tensor, **rows: torch.Tensor | None) -> None:
    """Raises ValueError if a tensor of per-row values does not have the labels' shape."""
    for name, values in rows.items():
        if values is not None and values.shape != labels.shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}: give one value per row, {tuple(labels.shape)}")


def check_segments(num_rows: int, step_advantages: torch.Tensor, step_ends: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """Raises ValueError if the tables of sequences and steps do not fit each other or the number of rows."""
    num_sequences = cu_seqlens.numel() - 1
    if step_ends.ndim != 2 or step_ends.shape != step_advantages.shape or step_ends.shape[1] == 0:
        shapes = f"step_ends {tuple(step_ends.shape)} and step_advantages {tuple(step_advantages.shape)}"
        raise ValueError(f"{shapes} do not fit: give both as [N, J] with J at least 1")
    if cu_seqlens.ndim != 1 or num_sequences != step_ends.shape[0]:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: give [N+1] with N = {step_ends.shape[0]}")
    if num_sequences == 0 and num_rows:
        raise ValueError(f"cu_seqlens has no sequence for {num_rows} rows: give [N+1] entries from 0 to T")
    looked_at = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()  # reading a GPU tensor would synchronize
    if looked_at and int(cu_seqlens[0]) != 0:
        raise ValueError(f"cu_seqlens starts at {int(cu_seqlens[0])}: set its first entry to 0")
    if looked_at and int(cu_seqlens[-1]) != num_rows:
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])} but there are {num_rows} rows: set its last entry to T")
