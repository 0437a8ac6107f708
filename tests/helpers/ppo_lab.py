"""On two ranks (policy_ranks.py): PPO's advantages, the critic's gradient and its checkpoint. Rank 0 writes the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import policy_lab as lab
import torch

from srpo.core.batch import Batch
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.critic import Critic
from srpo.policy.parallel import Parallel
from srpo.training.ppo import update_critic, with_token_advantages


def critic_of(parallel: Parallel, dtype: str = "float32") -> Critic:
    """A critic with a random head, the same on every rank."""
    critic = Critic(lab.tiny(3))
    torch.nn.init.normal_(critic._head().weight, generator=torch.Generator().manual_seed(0))
    return parallel.shard(critic, dtype=dtype)


def step(parts: Sequence[Batch], parallel: Parallel, dump: Path) -> dict[str, Any]:
    """One critic update: advantages of all ranks, the critic's unsharded gradient, and metrics."""
    critic = critic_of(parallel)
    recorder = lab.Recorder(critic)
    ready = [batch.to(parallel.device) for batch in parts]
    filled, metrics = with_token_advantages(
        ready, critic, parallel, rewards="step_ends", gamma=1.0, gae_lambda=0.9, scale="std", clip=1.5
    )
    metrics |= update_critic(critic, recorder, filled, parallel, value_clip=0.2, num_updates=1, grad_clip=0.0, dump=dump)
    advantages = [batch.advantages[batch.rows()[0]] for batch in filled]
    shares = parallel.all_gather_object(torch.cat([torch.zeros(0), *advantages]))
    return {"advantages": torch.cat(shares), "gradients": recorder.gradients, "metrics": metrics}


def main(out: Path, parallel: Parallel) -> None:
    saved: dict[str, Any] = {
        "uneven": step(lab.batches(7, 23, slice(0, 6) if parallel.is_main else slice(6, 8)), parallel, out / "dump.pt"),
        "idle": step(lab.batches(7, 40, slice(0, 8) if parallel.is_main else slice(0, 0)), parallel, out / "dump.pt"),
    }
    critic, other = critic_of(parallel), parallel.shard(Critic(lab.tiny(5)))
    optimizer, other_optimizer = (torch.optim.AdamW(c.parameters(), lr=1e-2) for c in (critic, other))
    same = []
    for i in range(2):
        for c, o in ((critic, optimizer), (other, other_optimizer))[: 1 + i]:
            parts = lab.batches(i, 20, slice(parallel.rank, None, 2))
            filled, _ = with_token_advantages(parts, c, parallel, rewards="end", gamma=1.0, gae_lambda=1.0, scale="std", clip=2.0)
            update_critic(c, o, filled, parallel, value_clip=0.2, num_updates=2, grad_clip=1.0, dump=out / "dump.pt")
        if not i:
            path = save_checkpoint(out / "critic", 1, critic, optimizer, {}, parallel)
            load_checkpoint(path, other, other_optimizer, parallel)
        same.append(lab.same_bits(lab.train_state(critic, optimizer), lab.train_state(other, other_optimizer)))
    saved["same"] = parallel.all_gather_object(same)
    if parallel.is_main:
        torch.save(saved, out / "saved.pt")
