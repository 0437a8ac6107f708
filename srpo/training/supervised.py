"""The training loop that SFT, DPO and the scalar reward model share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from srpo.core.batch import Batch
from srpo.core.config.train import OptimizerConfig, PolicyConfig
from srpo.core.metrics import MetricsLogger
from srpo.core.progress import Progress
from srpo.core.run_dir import Inputs, claim_run_dir
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.checkpoint_folders import latest_checkpoint
from srpo.policy.parallel import Parallel
from srpo.training.changes import SUPERVISED
from srpo.training.checks import loss_impl
from srpo.training.optim import learning_rate, make_optimizer, set_learning_rate
from srpo.training.resume import check_impl, check_resume
from srpo.training.update import optimizer_step

Metrics = dict[str, float]


class FitConfig(Protocol):
    """The settings that `fit` reads."""

    @property
    def run_dir(self) -> str: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def policy(self) -> PolicyConfig: ...


def fit(
    model: nn.Module,
    cfg: FitConfig,
    parallel: Parallel,
    *,
    title: str,
    inputs: Inputs,
    batches_of: Callable[[int], Sequence[Batch]],
    loss_of: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]],
    metrics_of: Callable[[list[float]], tuple[Metrics, float]],
) -> None:
    """Train the (sharded) model for `cfg.num_steps` optimizer steps, from the last checkpoint of the run folder if it has one.

    batches_of(step): this rank's micro-batches.
    loss_of(batch): the loss, and a vector of float64 sums, which are added up over micro-batches and ranks.
    metrics_of(sums): metrics of the step besides loss, gradient norm and learning rate; and the accuracy for the progress bar.
    inputs: data and models by their contents.

    Raises UserError if the run folder was started with other inputs or settings (`claim_run_dir`). Collective.
    """
    run_dir, main = Path(cfg.run_dir), parallel.is_main
    claim_run_dir(run_dir, cfg, main, SUPERVISED.allowed, inputs, SUPERVISED.contents)
    optimizer, done = make_optimizer(model.parameters(), cfg.optimizer), 0
    impl = loss_impl("auto", parallel.device, getattr(torch, cfg.policy.dtype))
    if (checkpoint := latest_checkpoint(run_dir / "checkpoints")) is not None:
        extra = load_checkpoint(checkpoint, model, optimizer, parallel)
        check_impl(extra.get("impl"), impl)
        done = extra["step"]
    parallel.on_main(lambda: check_resume(cfg, checkpoint, done, SUPERVISED))
    logger = MetricsLogger(run_dir, resume_step=done or None) if main else None
    sums: list[torch.Tensor] = []

    def counted(batch: Batch) -> torch.Tensor:
        loss, counts = loss_of(batch)
        sums.append(counts)
        return loss

    with Progress(title, cfg.num_steps, start=done, enabled=main) as bar:
        for step in range(done, cfg.num_steps):
            lr = learning_rate(cfg.optimizer, step, cfg.num_steps)
            set_learning_rate(optimizer, lr)
            sums.clear()
            result = optimizer_step(
                model,
                optimizer,
                batches_of(step),
                counted,
                parallel,
                grad_clip=cfg.optimizer.grad_clip,
                dump=run_dir / "non_finite.pt",
                info={"step": step},
            )
            metrics, right = metrics_of(parallel.all_reduce_sum(torch.stack(sums).sum(0)).tolist())
            if logger is not None:
                common = {"train/loss": result.loss, "train/grad_norm": result.grad_norm, "train/lr": lr}
                logger.log(step + 1, common | metrics)
            bar.advance(1, loss=result.loss, right=right)
            if (step + 1) % cfg.checkpoint_every == 0 or step + 1 == cfg.num_steps:
                logs = None if logger is None else logger.sync()
                extra = {"step": step + 1, "impl": impl}
                save_checkpoint(run_dir / "checkpoints", step + 1, model, optimizer, extra, parallel, keep=1, logs=logs)
    if logger is not None:
        logger.close()


def batch_indices(num_pairs: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of the pairs of optimizer step `step`. Each epoch is shuffled by (seed, epoch), so any step is computed alone."""
    positions = (divmod(position, num_pairs) for position in range(step * batch_size, (step + 1) * batch_size))
    return [_epoch_order(num_pairs, seed, epoch)[offset] for epoch, offset in positions]


@lru_cache(maxsize=4)
def _epoch_order(num_pairs: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_pairs))
    random.Random(f"sft|{seed}|{epoch}").shuffle(order)
    return order
