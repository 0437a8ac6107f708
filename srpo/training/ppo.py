"""The critic of `advantage.method = "ppo"`: token-level advantages from its values, its updates and its checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from srpo.algorithm.advantages import Scale, clip_advantages
from srpo.algorithm.gae import Placement, gae, token_rewards, value_loss, whiten
from srpo.core.batch import IGNORE, Batch
from srpo.core.config.train import Config
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.critic import Critic
from srpo.policy.loading import load_to_shard
from srpo.policy.parallel import Parallel
from srpo.training.optim import learning_rate, make_optimizer, set_learning_rate
from srpo.training.token_advantages import TokenBatch
from srpo.training.update import level, optimizer_step


@dataclass(frozen=True)
class Ppo:
    """The critic of a run and its optimizer."""

    cfg: Config
    critic: Critic
    optimizer: torch.optim.Optimizer

    @classmethod
    def from_config(cls, cfg: Config, parallel: Parallel) -> Ppo | None:
        """The critic as configured; None if advantage.method is not "ppo". Raises UserError if critic.path holds no model."""
        if cfg.advantage.method != "ppo":
            return None
        backbone = load_to_shard(cfg.critic.path or cfg.policy.path, parallel, cfg.policy)
        critic = Critic(backbone, activation_checkpointing=cfg.policy.activation_checkpointing)
        critic = parallel.shard(critic, dtype=cfg.policy.dtype)
        return cls(cfg, critic, make_optimizer(critic.parameters(), cfg.critic.optimizer))

    def advantages(self, batches: Sequence[Batch], parallel: Parallel) -> tuple[list[TokenBatch], dict[str, float]]:
        """`with_token_advantages` with the settings of the run. Collective."""
        critic, advantage = self.cfg.critic, self.cfg.advantage
        return with_token_advantages(
            batches,
            self.critic,
            parallel,
            rewards=critic.rewards,
            gamma=critic.gamma,
            gae_lambda=critic.gae_lambda,
            scale=advantage.scale,
            clip=advantage.clip,
        )

    def update(self, batches: Sequence[TokenBatch], step: int, parallel: Parallel) -> dict[str, float]:
        """Metrics of the critic's optimizer steps on the batches of optimizer step `step`. Collective."""
        cfg = self.cfg.critic
        lr = learning_rate(cfg.optimizer, step, self.cfg.num_steps)
        set_learning_rate(self.optimizer, lr)
        metrics = update_critic(
            self.critic,
            self.optimizer,
            batches,
            parallel,
            value_clip=cfg.value_clip,
            num_updates=cfg.num_updates,
            grad_clip=cfg.optimizer.grad_clip,
            dump=Path(self.cfg.run_dir) / "non_finite_critic.pt",
            info={"step": step},
        )
        return metrics | {"critic/lr": lr}

    @property
    def _root(self) -> Path:
        return Path(self.cfg.run_dir) / "critic"

    def save(self, step: int, parallel: Parallel, protected: Collection[int] = ()) -> None:
        """Write the critic's checkpoint of this step. Collective.

        Call before saving the policy, so that no policy checkpoint lacks its critic. One more checkpoint is kept
        than of the policy: after a kill between the two saves, the critic of the last complete policy checkpoint still exists.
        protected: as in `save_checkpoint`.
        """
        keep = self.cfg.train.keep_checkpoints + 1
        save_checkpoint(self._root, step, self.critic, self.optimizer, {}, parallel, keep, protected=protected)

    def load(self, step: int, parallel: Parallel, checkpoint: Path) -> None:
        """Load the critic that belongs to the policy's checkpoint of this step. Collective."""
        load_checkpoint(self._root / f"step_{step:06d}", self.critic, self.optimizer, parallel, checkpoint)


@torch.no_grad()
def with_token_advantages(
    batches: Sequence[Batch],
    critic: nn.Module,
    parallel: Parallel,
    *,
    rewards: Placement,
    gamma: float,
    gae_lambda: float,
    scale: Scale,
    clip: float,
) -> tuple[list[TokenBatch], dict[str, float]]:
    """(the batches with token-level advantages, returns and values; the `advantage/*` and `critic/*` metrics of all ranks).

    batches: this rank's, on its device, with step rewards in `step_advantages`. Advantages come from `gae`, are whitened over the
    response tokens of all ranks' batches, and clipped to +-clip (0: no bound). Collective.
    """
    token_columns = []  # per batch: (rows, advantages, returns, values), each [R]
    for batch in level(batches, parallel):
        index, rows = batch.rows()
        values = critic(batch).double()
        rewards_of_tokens = token_rewards(rows.step_advantages, rows.step_ends, rows.cu_seqlens, rewards)
        advantages, returns = gae(rewards_of_tokens, values, rows.cu_seqlens, gamma=gamma, gae_lambda=gae_lambda)
        token_columns.append((index, advantages, returns, values))
    token_columns = token_columns[: len(batches)]  # without the empty batches of `level`
    no_rows = torch.zeros(0, dtype=torch.float64, device=parallel.device)
    per_column = list(zip(*token_columns, strict=True))[1:] or ((), (), ())
    advantages, returns, values = (torch.cat([no_rows, *column]) for column in per_column)
    mean, std = _moments(advantages, parallel)
    unclipped = whiten(advantages, mean, std, scale=scale, clip=0.0)
    whitened = clip_advantages(unclipped, clip)
    num_tokens = _total(torch.ones_like(values), parallel)
    returns_std, residual_std = _moments(returns, parallel)[1], _moments(returns - values, parallel)[1]
    totals = {
        "advantage/abs_mean": _total(whitened.abs(), parallel),
        "advantage/clip_frac": _total((whitened != unclipped).double(), parallel),
        "critic/value": _total(values, parallel),
    }
    metrics = {key: total / num_tokens for key, total in totals.items()} if num_tokens else {}
    if returns_std:
        metrics["critic/explained_var"] = 1 - (residual_std / returns_std) ** 2
    parts = whitened.split([len(index) for index, *_ in token_columns])
    filled = [
        TokenBatch(**vars(batch), **{name: batch.scatter(x.float(), index) for name, x in columns.items()})
        for batch, index, columns in (
            (batch, index, {"advantages": part, "returns": returns, "values": values})
            for batch, (index, _, returns, values), part in zip(batches, token_columns, parts, strict=True)
        )
    ]
    return filled, metrics


def _total(values: torch.Tensor, parallel: Parallel) -> float:
    """Sum over the tokens of all ranks."""
    return float(parallel.all_reduce_sum(values.sum()))


def _moments(values: torch.Tensor, parallel: Parallel) -> tuple[float, float]:
    """(mean, Bessel-corrected std) over the tokens of all ranks."""
    count = _total(torch.ones_like(values), parallel)
    mean = _total(values, parallel) / max(count, 1.0)
    return mean, (_total((values - mean).square(), parallel) / max(count - 1, 1.0)) ** 0.5


def update_critic(
    critic: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[TokenBatch],
    parallel: Parallel,
    *,
    value_clip: float,
    num_updates: int,
    grad_clip: float,
    dump: Path,
    info: dict[str, Any] | None = None,
) -> dict[str, float]:
    """The `critic/*` metrics of the last of `num_updates` optimizer steps on the clipped value loss.

    The loss is the mean over the response tokens of all ranks' batches. Raises NonFiniteError, as
    `srpo.training.update.optimizer_step`. Collective.
    """
    counts = [torch.zeros((), device=parallel.device), *((batch.labels != IGNORE).sum() for batch in batches)]
    num_tokens = int(parallel.all_reduce_sum(torch.stack([count.double() for count in counts]).sum()))
    num_clipped = torch.zeros((), dtype=torch.float64, device=parallel.device)

    def loss_of(batch: Batch) -> torch.Tensor:
        values, (_, rows) = critic(batch), batch.rows()
        if not isinstance(rows, TokenBatch):  # an empty batch, added by `level`
            return values.sum()
        out = value_loss(values, rows.values, rows.returns, clip=value_clip, num_tokens=max(num_tokens, 1))
        num_clipped.add_(out.num_clipped)
        return out.loss

    metrics: dict[str, float] = {}
    for _ in range(num_updates):
        num_clipped.zero_()
        result = optimizer_step(critic, optimizer, batches, loss_of, parallel, grad_clip=grad_clip, dump=dump, info=info)
        metrics = {"critic/loss": result.loss, "critic/grad_norm": result.grad_norm}
        num_bounded = float(parallel.all_reduce_sum(num_clipped))
        metrics |= {"critic/clip_frac": num_bounded / num_tokens} if num_tokens else {}
    return metrics
