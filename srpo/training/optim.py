"""The optimizer and its learning rate: what SFT and reinforcement share."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from srpo.core.config.train import OptimizerConfig


def make_optimizer(parameters: Iterable[torch.nn.Parameter], cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters (also FSDP2's shards)."""
    return torch.optim.AdamW(parameters, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)


def learning_rate(cfg: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step 0 <= step < num_steps: a linear warm-up, then constant, or down to min_lr_frac of lr."""
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    if cfg.schedule == "constant":
        return cfg.lr * warmup
    done = step / max(num_steps - 1, 1)
    fall = 1 - done if cfg.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return cfg.lr * warmup * (cfg.min_lr_frac + (1 - cfg.min_lr_frac) * fall)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
