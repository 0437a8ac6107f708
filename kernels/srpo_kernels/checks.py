"""Checks of arguments: each error names the argument and says what to give instead."""

from __future__ import annotations

import torch

KL_ESTIMATORS = ("k1", "k2", "k3", "full")
CLIP_FORMS = ("ppo", "cispo")
RATIOS_OVER = ("token", "step", "sequence")


def check_logits(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float, top_k: int | None, kept_ids: torch.Tensor | None
) -> None:
    """Raises ValueError if logits and labels do not fit, or if a setting of the softmax is out of range."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: give [T, V] and [T]")
    if not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype}: give fp32, bf16, fp16 or fp64")
    check_softmax(labels, temperature, top_k, kept_ids)


def check_softmax(labels: torch.Tensor, temperature: float, top_k: int | None, kept_ids: torch.Tensor | None) -> None:
    """Raises ValueError if the temperature, or the size or shape of the filter, is invalid."""
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k is {top_k}: give the number of ids that the sampler keeps, or None where it keeps all")
    if kept_ids is not None and (kept_ids.ndim != 2 or kept_ids.shape[0] != labels.shape[0]):
        raise ValueError(f"kept_ids has shape {tuple(kept_ids.shape)}: give [T, K] with T = {labels.shape[0]}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")


def check_rows(labels: torch.Tensor, **rows: torch.Tensor | None) -> None:
    """Raises ValueError if a tensor of per-row values does not have the labels' shape."""
    for name, values in rows.items():
        if values is not None and values.shape != labels.shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}: give one value per row, {tuple(labels.shape)}")


def check_options(
    clip_eps_low: float, clip_eps_high: float, dual_clip: float | None, clip_form: str, kl_estimator: str, ratio_over: str
) -> None:
    """Raises ValueError if an option of the loss is out of range."""
    if not (clip_eps_low >= 0 and clip_eps_high >= 0):  # NaN fails, too
        raise ValueError(f"clip_eps_low {clip_eps_low} and clip_eps_high {clip_eps_high} must not be negative")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}: give a bound above 1, or None to switch it off")
    if clip_form not in CLIP_FORMS:
        raise ValueError(f"clip_form {clip_form!r} is unknown: give one of {', '.join(CLIP_FORMS)}")
    if clip_form != "ppo" and dual_clip is not None:
        raise ValueError(f"dual_clip bounds the surrogate of clip_form ppo, not {clip_form}: leave it at None")
    if ratio_over not in RATIOS_OVER:
        raise ValueError(f"ratio_over {ratio_over!r} is unknown: give one of {', '.join(RATIOS_OVER)}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator {kl_estimator!r} is unknown: give one of {', '.join(KL_ESTIMATORS)}")


def check_segments(num_rows: int, step_advantages: torch.Tensor, step_ends: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """Raises ValueError if the tables of sequences and steps do not fit each other or the number of rows."""
    num_sequences = cu_seqlens.numel() - 1
    if step_ends.ndim != 2 or step_ends.shape != step_advantages.shape or step_ends.shape[1] == 0:
        shapes = f"step_ends {tuple(step_ends.shape)} and step_advantages {tuple(step_advantages.shape)}"
        raise ValueError(f"{shapes} do not fit: give both as [N, J] with J at least 1")
    if cu_seqlens.ndim != 1 or num_sequences != step_ends.shape[0]:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: give [N+1] with N = {step_ends.shape[0]}")
    if num_sequences == 0 and num_rows:
        raise ValueError(f"there are {num_rows} rows and no sequence: give cu_seqlens [N+1] from 0 to T")
    looked_at = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()  # reading a GPU tensor would synchronize
    if looked_at and int(cu_seqlens[0]) != 0:
        raise ValueError(f"cu_seqlens starts at {int(cu_seqlens[0])}: its first entry is 0")
    if looked_at and int(cu_seqlens[-1]) != num_rows:
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])} but there are {num_rows} rows: its last entry is T")
