"""PPO's critic: a value head on its own copy of the policy's backbone, what it says of a batch, and its optimizer steps.

Letters: T packed rows, R labelled rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from srpo.algorithm.advantages import Scale
from srpo.algorithm.gae import Placement, gae, token_rewards, value_loss, whiten
from srpo.batch import IGNORE, Batch
from srpo.policy.model import hidden_states
from srpo.policy.parallel import Parallel
from srpo.policy.token_advantages import TokenBatch
from srpo.policy.update import level, optimizer_step


class Critic(nn.Module):
    """V of every state in which a response token is chosen. Starts as 0 everywhere: the first advantages are plain returns.

    The head is a part of the transformers model, so that sharding and checkpoints find it there.
    """

    def __init__(self, model: PreTrainedModel, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        backbone = model.base_model  # without the language model's head
        assert isinstance(backbone, PreTrainedModel)
        self.model = backbone
        self.model.value_head = nn.Linear(model.config.get_text_config().hidden_size, 1)
        self._head().weight.data.zero_()
        self._head().bias.data.zero_()
        if activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.train()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Values [R] fp32 of the rows of `batch.rows()`. A row has read everything before the token that it predicts."""
        hidden = hidden_states(self.model, batch)[batch.labels != IGNORE]
        return self._head()(hidden)[:, 0].float()

    def _head(self) -> nn.Linear:
        head = self.model.value_head
        assert isinstance(head, nn.Linear)
        return head


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

    batches: this rank's, on its device, with the step rewards in `step_advantages`. Advantages are those of `gae`, whitened over
    the response tokens of the whole optimizer step and clipped to +-clip (0: not). Collective.
    """
    made = []
    for batch in level(batches, parallel):
        index, rows = batch.rows()
        values = critic(batch).double()
        given = token_rewards(rows.step_advantages, rows.step_ends, rows.cu_seqlens, rewards)
        advantages, returns = gae(given, values, rows.cu_seqlens, gamma=gamma, gae_lambda=gae_lambda)
        made.append((index, advantages, returns, values))
    made = made[: len(batches)]
    none = torch.zeros(0, dtype=torch.float64, device=parallel.device)
    advantages, returns, values = (torch.cat([none, *column]) for column in list(zip(*made, strict=True))[1:] or ((), (), ()))
    mean, std = _moments(advantages, parallel)
    whitened = whiten(advantages, mean, std, scale=scale, clip=clip)
    num_tokens = max(_total(torch.ones_like(values), parallel), 1.0)
    spread, left = _moments(returns, parallel)[1], _moments(returns - values, parallel)[1]
    metrics = {
        "advantage/abs_mean": _total(whitened.abs(), parallel) / num_tokens,
        "advantage/clip_frac": _total((whitened.abs() >= clip).double(), parallel) / num_tokens if clip else 0.0,
        "critic/value": _total(values, parallel) / num_tokens,
        "critic/explained_var": 1 - (left / spread) ** 2 if spread else 0.0,
    }
    parts = whitened.split([len(index) for index, *_ in made])
    filled = [
        TokenBatch(**vars(batch), **{name: _spread(x, index, batch) for name, x in columns.items()})
        for batch, index, columns in (
            (batch, index, {"advantages": part, "returns": returns, "values": values})
            for batch, (index, _, returns, values), part in zip(batches, made, parts, strict=True)
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


def _spread(rows: torch.Tensor, index: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Values of the labelled rows [R] put back among all rows, [T] fp32."""
    return rows.new_zeros(batch.labels.shape[0]).index_copy(0, index, rows).float()


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
    """`num_updates` optimizer steps on the clipped value loss, the mean over all tokens of the batches of all ranks; returns the
    `critic/*` metrics of the last one. Raises NonFiniteError, see `srpo.policy.update.optimizer_step`. Collective.
    """
    counts = [torch.zeros((), device=parallel.device), *((batch.labels != IGNORE).sum() for batch in batches)]
    num_tokens = max(int(parallel.all_reduce_sum(torch.stack([count.double() for count in counts]).sum())), 1)
    num_clipped = torch.zeros((), dtype=torch.float64, device=parallel.device)

    def loss_of(batch: Batch) -> torch.Tensor:
        values, (_, rows) = critic(batch), batch.rows()
        if not isinstance(rows, TokenBatch):  # an empty one of `level`
            return values.sum()
        out = value_loss(values, rows.values, rows.returns, clip=value_clip, num_tokens=num_tokens)
        num_clipped.add_(out.num_clipped)
        return out.loss

    metrics: dict[str, float] = {}
    for _ in range(num_updates):
        num_clipped.zero_()
        result = optimizer_step(critic, optimizer, batches, loss_of, parallel, grad_clip=grad_clip, dump=dump, info=info)
        clip_frac = float(parallel.all_reduce_sum(num_clipped)) / num_tokens
        metrics = {"critic/loss": result.loss, "critic/grad_norm": result.grad_norm, "critic/clip_frac": clip_frac}
    return metrics
