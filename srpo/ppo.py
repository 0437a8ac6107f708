"""What `advantage.method = "ppo"` adds to the loop of `srpo.train`: the critic, its optimizer, its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from srpo.batch import Batch
from srpo.config import Config
from srpo.optim import learning_rate, make_optimizer, set_learning_rate
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.critic import Critic, update_critic, with_token_advantages
from srpo.policy.loading import load_to_shard
from srpo.policy.parallel import Parallel
from srpo.policy.token_advantages import TokenBatch


@dataclass(frozen=True)
class Ppo:
    """The critic of a run, beside its policy."""

    cfg: Config
    critic: Critic
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, cfg: Config, parallel: Parallel) -> Ppo | None:
        """As configured; None where the method has no critic. Raises ValueError where critic.path holds no model."""
        if cfg.advantage.method != "ppo":
            return None
        backbone = load_to_shard(cfg.critic.path or cfg.policy.path, parallel, experts=cfg.policy.experts)
        critic = Critic(backbone, activation_checkpointing=cfg.policy.activation_checkpointing)
        critic = parallel.shard(critic, dtype=cfg.policy.dtype)
        return cls(cfg, critic, make_optimizer(critic.parameters(), cfg.critic.optimizer))

    def advantages(self, batches: Sequence[Batch], parallel: Parallel) -> tuple[list[TokenBatch], dict[str, float]]:
        """(the batches with token-level advantages in place of the step rewards, metrics)."""
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
        """The critic's optimizer steps on a rollout batch; metrics."""
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

    def save(self, step: int, parallel: Parallel) -> None:
        """Write the critic's checkpoint of this step. To be called before the policy's, of which there is then none without it;
        one more is kept than of the policy's, so that a kill between the two leaves the one that the run goes on from."""
        keep = self.cfg.train.keep_checkpoints + 1
        save_checkpoint(self._root, step, self.critic, self.optimizer, {}, parallel, keep)

    def load(self, step: int, parallel: Parallel) -> None:
        """Load the critic that belongs to the policy's checkpoint of this step."""
        load_checkpoint(self._root / f"step_{step:06d}", self.critic, self.optimizer, parallel)
