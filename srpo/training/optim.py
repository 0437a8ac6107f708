"""The optimizer and its learning rate, for supervised training and reinforcement learning."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.autograd.graph import increment_version

from srpo.core.config.train import OptimizerConfig


def make_optimizer(parameters: Iterable[torch.nn.Parameter], cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that train, which FSDP2 may have sharded; an adapter's base is frozen.

    One kernel reads and writes each value once.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True)
    # The kernel does not count its writes as others do, and `srpo.policy.bf16_copies` goes by the count.
    optimizer.register_step_post_hook(lambda *_: increment_version(trained))
    return optimizer


def learning_rate(cfg: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step`, 0 <= step < num_steps: linear warm-up times the schedule.

    The schedules "linear" and "cosine" decay from lr to min_lr_frac * lr at the last step.
    """
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    if cfg.schedule == "constant":
        return cfg.lr * warmup
    done = step / max(num_steps - 1, 1)
    fall = 1 - done if cfg.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return cfg.lr * warmup * (cfg.min_lr_frac + (1 - cfg.min_lr_frac) * fall)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next optimizer steps."""
    for group in optimizer.param_groups:
        group["lr"] = lr
