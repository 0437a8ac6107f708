"""A model's output for the labelled rows of a batch, with the operations that losses need: as logits, or as hidden states and the
head's weight, from which logits are computed for one chunk of rows at a time.

Letters: R labelled rows, H hidden, V vocabulary, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from srpo_kernels import (
    PolicyLoss,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
    topk_support,
)
from srpo_kernels.linear_chunks import default_rows
from torch import nn

from srpo.core.batch import Batch
from srpo.policy.model import Start

X = TypeVar("X")


@dataclass(frozen=True)
class Logits:
    """Logits of the labelled rows."""

    logits: torch.Tensor  # [R, V]

    @torch.no_grad()
    def support(self, top_k: int) -> torch.Tensor:
        """Ids of the top-k filter's support, [R, min(top_k, V)] int64; see `srpo_kernels.topk_support`."""
        return topk_support(self.logits, top_k)

    @torch.no_grad()
    def num_hits(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of labels [R] whose logit is the row's largest, [] int64."""
        return (self.logits.argmax(-1) == labels).sum()

    def logprobs(self, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """Log-probabilities of the labels, [R] fp32, differentiable. options: as for `srpo_kernels.token_logprobs`."""
        return token_logprobs(self.logits, labels, **options)[0]

    def loss(self, *tables: torch.Tensor | None, reference: Logits | None = None, **arguments: Any) -> PolicyLoss:
        """See `srpo_kernels.policy_loss`, which may overwrite the logits with their gradient. reference: for the exact KL."""
        ref_logits = None if reference is None else reference.logits
        return policy_loss(self.logits, *tables, ref_logits=ref_logits, **arguments)  # pyright: ignore[reportArgumentType]

    def kept(self) -> Logits:
        """An output that stays valid after the model's forward."""
        return self


@dataclass(frozen=True)
class Hidden:
    """Hidden states of the labelled rows, and the head's weight. Has the methods of `Logits`; all logits never exist at once."""

    hidden: torch.Tensor  # [R, H]
    weight: torch.Tensor  # [V, H]

    @torch.no_grad()
    def support(self, top_k: int) -> torch.Tensor:
        """As `Logits.support`, of logits in the dtype of the hidden states. Costs one more product with the head. A loss that is
        given only `top_k` finds the ids itself, of fp32 logits."""
        return torch.cat([topk_support(logits, top_k) for logits in self._chunks()])

    @torch.no_grad()
    def num_hits(self, labels: torch.Tensor) -> torch.Tensor:
        """As `Logits.num_hits`. Costs one more product with the head."""
        best = [logits.argmax(-1) for logits in self._chunks()]
        return (torch.cat([labels[:0], *best]) == labels).sum()

    def _chunks(self) -> Iterator[torch.Tensor]:
        """The logits of one chunk of rows at a time."""
        for rows in self.hidden.split(default_rows(self.weight.shape[0], self.weight.device, 1)):
            yield nn.functional.linear(rows, self.weight)

    def logprobs(self, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """As `Logits.logprobs`."""
        return linear_token_logprobs(self.hidden, self.weight, labels, **options)[0]

    def loss(self, *tables: torch.Tensor | None, reference: Hidden | None = None, **arguments: Any) -> PolicyLoss:
        """See `srpo_kernels.linear_policy_loss`. reference: for the exact KL."""
        if reference is not None:
            arguments |= {"ref_hidden": reference.hidden, "ref_weight": reference.weight}
        return linear_policy_loss(self.hidden, self.weight, *tables, **arguments)  # pyright: ignore[reportArgumentType]

    def kept(self) -> Hidden:
        """A copy of the weight, because FSDP2 frees the gathered one after the forward."""
        return Hidden(self.hidden, self.weight.clone())


def of_outputs(model: nn.Module | Start, batch: Batch, inputs: Literal["logits", "hidden"], ask: Callable[[Any], X]) -> X:
    """The result of `ask` on the model's `Logits` or `Hidden`. With inputs "hidden", `ask` runs inside `Policy.forward` (as its
    `through`), while FSDP has the head's weight gathered."""
    if inputs == "logits":
        return ask(Logits(model(batch)))
    return model(batch, through=lambda hidden, weight: ask(Hidden(hidden, weight)))
