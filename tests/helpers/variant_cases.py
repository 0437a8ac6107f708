"""Random responses, updates and exact formulas for tests of the loss variants.

The policy is a table of logits, so that tests see the gradient of every logit. The exact formulas loop over responses in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small_world as small
import torch
from torch import nn

from srpo.core.batch import Batch, Rollout, pack
from srpo.core.config.train import Config
from srpo.core.step_presets import PAPER, PAPER_STEPS
from srpo.policy.parallel import Parallel
from srpo.training.credit import assign_credit
from srpo.training.update import Objective, update

SCHEMA = PAPER
NAMES = [spec.name for spec in PAPER_STEPS]
MAX_NEW, VOCAB, GROUPS, SIZE = 40, 7, 3, 4
ONE = Parallel(0, 1, 0, torch.device("cpu"))
ALL = {"difficulty_low": -1.0, "difficulty_high": 2.0}


class Table(nn.Module):
    """A policy of fixed logits, one row per labelled row of the batch; ignores the input ids."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.logits + 0  # not a leaf tensor, like the output of a model


@dataclass
class Drawn:
    """Random responses with the policy's logits and the old policy's log-probabilities."""

    rollouts: list[Rollout]
    logits: torch.Tensor  # [R, V] fp64
    old: list[torch.Tensor]  # one tensor [L] per response, fp64 with values that fp32 holds

    def logprobs(self, logits: torch.Tensor) -> list[torch.Tensor]:
        labels = torch.tensor([t for r in self.rollouts for t in r.response_ids])
        lengths = [len(r.response_ids) for r in self.rollouts]
        return list(logits.log_softmax(1).gather(1, labels[:, None])[:, 0].split(lengths))


def draw(seed: int) -> Drawn:
    """GROUPS x SIZE responses with random lengths, steps (some empty), rewards and finish; old log-probabilities have noise."""
    gen = torch.Generator().manual_seed(seed)
    rollouts = []
    for i in range(GROUPS * SIZE):
        ends = torch.randint(0, MAX_NEW, (4,), generator=gen).sort().values.tolist()
        ends.append(max(ends[-1], 1) + int(torch.randint(0, 5, (1,), generator=gen)))
        rewards = [s.reward * int(x) for s, x in zip(PAPER_STEPS, torch.randint(0, 2, (5,), generator=gen), strict=True)]
        sources = [("gold", "judge")[int(x)] for x in torch.randint(0, 2, (5,), generator=gen)]
        tokens = torch.randint(0, VOCAB, (ends[-1],), generator=gen).tolist()
        finish = "length" if torch.rand(1, generator=gen) < 0.3 else "stop"
        rollouts.append(
            Rollout("e", i // SIZE, (1, 2, 3), tuple(tokens), (-1.0,) * ends[-1], tuple(ends), ("x",) * 5, "", finish, 0,
                    step_rewards=tuple(rewards), reward_sources=tuple(sources))
        )  # fmt: skip
    num_rows = sum(len(r.response_ids) for r in rollouts)
    logits = torch.randn(num_rows, VOCAB, generator=gen, dtype=torch.float64)
    drawn = Drawn(rollouts, logits, [])
    drawn.old = [(x + 0.4 * torch.randn(len(x), generator=gen).double()).float().double() for x in drawn.logprobs(logits)]
    return drawn


def settings(**changes: Any) -> Config:
    changes = {
        "sampler": ALL,
        **changes,
        "rollout": {"ratio": "unfiltered", "top_k": 0, "temperature": 1.0, "max_new_tokens": MAX_NEW},
    }
    loss = {"num_updates": 2, "kl_coef": 0.0, "impl": "reference", **changes.pop("loss", {})}
    advantage = {"clip": 0.0, **changes.pop("advantage", {})}
    return small.changed(Config(), {**changes, "loss": loss, "advantage": advantage})


def packed(drawn: Drawn, cfg: Config) -> Batch:
    """One micro-batch of all responses; those that do not train are included with weight 0."""
    credit = assign_credit(drawn.rollouts, SCHEMA, cfg.advantage, cfg.loss, cfg.sampler, MAX_NEW)
    (batch,) = pack(drawn.rollouts, credit.advantages, credit.weights)
    old = torch.zeros(len(batch.labels)).index_copy(0, batch.rows()[0], torch.cat(drawn.old).float())
    return batch.with_(old_logprobs=old)


def stepped(batch: Batch, drawn: Drawn, cfg: Config, tmp_path: Path) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Return (loss, gradient of the logits, metrics) of one update."""
    table = Table(drawn.logits.clone())
    metrics = update(
        table,
        torch.optim.SGD(table.parameters(), lr=1.0),
        [batch],
        Objective.from_config(cfg.loss, cfg.rollout),
        ONE,
        step_names=NAMES,
        grad_clip=0.0,
        dump=tmp_path / "dump.pt",
    )
    return metrics["train/loss"], drawn.logits - table.logits.detach(), metrics


Terms = list[torch.Tensor]


def clipped(ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def ratios(drawn: Drawn, logprobs: Terms) -> Terms:
    return [(new - old).exp() for new, old in zip(logprobs, drawn.old, strict=True)]


def of_groups(drawn: Drawn, rewards: list[float], divide: bool = True) -> list[torch.Tensor]:
    """Advantages of Eq. 4 per response; without `divide` only its numerator."""
    out = []
    for rollout, reward in zip(drawn.rollouts, rewards, strict=True):
        group = torch.tensor([x for r, x in zip(drawn.rollouts, rewards, strict=True) if r.group == rollout.group]).double()
        advantage = (reward - group.mean()) / (group.std() + 1e-6 if divide else 1.0)
        out.append(advantage if float(group.std()) > 0 else torch.zeros((), dtype=torch.float64))
    return out


def verdicts(drawn: Drawn) -> list[float]:
    return [(r.step_rewards or (0.0,))[-1] for r in drawn.rollouts]


def totals(drawn: Drawn) -> list[float]:
    return [sum(r.step_rewards or ()) for r in drawn.rollouts]


def mean_of_means(terms: Terms) -> torch.Tensor:
    """1/P sum over prompts 1/G sum over responses 1/|o| sum over tokens."""
    return torch.stack([t.mean() for t in terms]).mean()


def spans(rollout: Rollout) -> list[slice]:
    return [slice(a, b) for a, b in zip((0, *rollout.step_ends[:-1]), rollout.step_ends, strict=True)]
