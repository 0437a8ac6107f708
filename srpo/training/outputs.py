"""What a model says of the labelled rows of a batch, and what the loss asks of it: as logits, or as hidden states and the head's
weight, of which logits are made for some rows at a time.

Letters: R labelled rows, H hidden, V vocabulary, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from srpo_kernels import PolicyLoss, linear_policy_loss, linear_token_logprobs, policy_loss, token_logprobs, topk_support
from srpo_kernels.linear_chunks import default_rows
from torch import nn

from srpo.core.batch import Batch

X = TypeVar("X")


@dataclass(frozen=True)
class Logits:
    """Of the rows that have a label."""

    logits: torch.Tensor  # [R, V]

    @torch.no_grad()
    def support(self, top_k: int) -> torch.Tensor:
        """[R, min(top_k, V)] int64, see `srpo_kernels.topk_support`."""
        return topk_support(self.logits, top_k)

    @torch.no_grad()
    def num_hits(self, labels: torch.Tensor) -> torch.Tensor:
        """[] int64: of the labels [R], those whose logit is the largest."""
        return (self.logits.argmax(-1) == labels).sum()

    def logprobs(self, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """[R] fp32, differentiable. options: those of `srpo_kernels.token_logprobs`."""
        return token_logprobs(self.logits, labels, **options)[0]

    def loss(self, *tables: torch.Tensor | None, reference: Logits | None, **options: Any) -> PolicyLoss:
        """See `srpo_kernels.policy_loss`; it may write the gradient over the logits. reference: of the exact KL."""
        return policy_loss(self.logits, *tables, ref_logits=None if reference is None else reference.logits, **options)  # pyright: ignore[reportArgumentType]

    def kept(self) -> Logits:
        """The same, to be used after the forward."""
        return self


@dataclass(frozen=True)
class Hidden:
    """The same from hidden states: its logits are never all there."""

    hidden: torch.Tensor  # [R, H]
    weight: torch.Tensor  # [V, H]

    @torch.no_grad()
    def support(self, top_k: int) -> torch.Tensor:
        """As of `Logits`. One more product with the head: a loss that is given `top_k` alone finds the ids on its way."""
        return torch.cat([topk_support(logits, top_k) for logits in self._chunks()])

    @torch.no_grad()
    def num_hits(self, labels: torch.Tensor) -> torch.Tensor:
        """As of `Logits`. One more product with the head."""
        found = [logits.argmax(-1) for logits in self._chunks()]
        return (torch.cat([labels[:0], *found]) == labels).sum()

    def _chunks(self) -> Iterator[torch.Tensor]:
        """The logits of some rows at a time."""
        for rows in self.hidden.split(default_rows(self.weight.shape[0], self.weight.device, 1)):
            yield nn.functional.linear(rows, self.weight)

    def logprobs(self, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """As of `Logits`."""
        return linear_token_logprobs(self.hidden, self.weight, labels, **options)[0]

    def loss(self, *tables: torch.Tensor | None, reference: Hidden | None, **options: Any) -> PolicyLoss:
        """See `srpo_kernels.linear_policy_loss`. reference: of the exact KL."""
        if reference is not None:
            options |= {"ref_hidden": reference.hidden, "ref_weight": reference.weight}
        return linear_policy_loss(self.hidden, self.weight, *tables, **options)  # pyright: ignore[reportArgumentType]

    def kept(self) -> Hidden:
        """The same with a copy of the weight: after the forward FSDP2 takes the whole one back."""
        return Hidden(self.hidden, self.weight.clone())


def of_outputs(model: nn.Module, batch: Batch, inputs: Literal["logits", "hidden"], ask: Callable[[Any], X]) -> X:
    """What `ask` returns of the model's `Logits`, or of its `Hidden`: then it is called within the forward of a
    `srpo.policy.model.Policy`, whose `through` it is."""
    if inputs == "logits":
        return ask(Logits(model(batch)))
    return model(batch, through=lambda hidden, weight: ask(Hidden(hidden, weight)))
