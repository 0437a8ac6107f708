"""The interface of every rollout engine: the protocol `Engine`, its input `SamplingParams`, its output `Sample`."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import nn

from srpo.core.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled: from softmax(logits / temperature), restricted to its `top_k` most likely tokens (5.1.5)."""

    max_new_tokens: int = 512
    temperature: float = 0.99
    top_k: int = 100  # 0: no filter
    group_size: int = 16  # G, responses per prompt
    stop_ids: tuple[int, ...] = ()  # the stop token is part of the response
    greedy: bool = False  # take the most likely token; log-probabilities are still those of the filtered distribution
    ignore_eos: bool = False  # generate exactly max_new_tokens tokens, for benchmarks
    support: bool = False  # report the ids that the top-k filter kept for each token
    routing: bool = False  # report the experts that each token was routed to

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"rollout.max_new_tokens is {self.max_new_tokens}: set it to 1 or more")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"rollout.temperature is {self.temperature}: set it above 0, or sample with greedy=True")
        if self.top_k < 0:
            raise UserError(f"rollout.top_k is {self.top_k}: set it to 0 (no filter) or more")
        if self.group_size < 1:
            raise UserError(f"rollout.group_size is {self.group_size}: set it to 1 or more")
        if self.support and not self.top_k:
            raise UserError(
                "rollout.support is 'replay' and rollout.top_k is 0: without a filter every token has the same support. Set "
                "rollout.top_k above 0, or rollout.support to 'recompute'"
            )


@dataclass(frozen=True)
class Sample:
    """One response. `sampling_logprobs` are in nats, under the distribution that was sampled: after temperature and top-k."""

    prompt_index: int
    response_ids: tuple[int, ...]  # [L]
    sampling_logprobs: tuple[float, ...]  # [L]
    finish: str  # stop | length
    policy_version: int = field(default=-1, compare=False)  # version of the weights that sampled it
    # [L, K] int32: ids that the top-k filter kept for each token, padded with -1; None unless requested
    support: np.ndarray | None = field(default=None, compare=False, repr=False)
    # [P + L - 1, layers, K] int16: experts of prompt and response except the last token, -1 if unknown; None unless requested
    routed: np.ndarray | None = field(default=None, compare=False, repr=False)


Groups = Generator[tuple[int, list[Sample]], None, None]  # (prompt index, its group_size samples)


def in_order(groups: Iterable[tuple[int, list[Sample]]]) -> list[Sample]:
    """All samples of a stream, sorted by prompt index."""
    by_prompt = dict(groups)
    return [sample for i in sorted(by_prompt) for sample in by_prompt[i]]


class Engine(Protocol):
    """Samples responses from its own copy of the policy. `policy_version` is the version that the last weight sync was given."""

    policy_version: int

    @property
    def max_context(self) -> int:
        """Longest prompt plus response, in tokens."""
        ...

    def stream(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int] | None = None
    ) -> Groups:
        """Yields (prompt index, its `params.group_size` samples) as groups finish. Same arguments and weights, same samples.

        numbers: each prompt's number among the prompts of all ranks (default: 0, 1, 2, ...). The samples of a prompt depend on
        (seed, its number) and not on the other prompts, so they are the same for any number of ranks.
        If the generator is closed early, unfinished responses are dropped and the engine can be used again. Call no other method
        of the engine before the generator has ended.
        Raises UserError, on the call itself, for an empty prompt or one that does not fit into the context with its response.
        """
        ...

    def generate(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int] | None = None
    ) -> list[Sample]:
        """All samples of `stream`, sorted by prompt index."""
        ...

    def sync_weights(self, policy: nn.Module, version: int) -> None:
        """pi_old <- pi_theta (Algorithm 1). Every rank of a sharded policy calls it. Raises UserError if models differ."""
        ...

    def sleep(self) -> None:
        """Release the engine's memory while the trainer updates; the next `sync_weights` takes it again."""
        ...

    def stats(self) -> dict[str, float]:
        """num_tokens, generate_s and tokens_per_s of the last `stream` or `generate`; sync_s of the last `sync_weights`."""
        ...

    def close(self) -> None:
        """Free all resources; the engine cannot be used afterwards."""
        ...


def check_prompts(
    prompts: Sequence[Sequence[int]], params: SamplingParams, max_context: int, names: Sequence[str] | None = None
) -> None:
    """Raise UserError for an empty prompt or one that leaves no room for its response. `names`: the examples in the message."""
    for i, prompt in enumerate(prompts):
        name = f"the prompt of {names[i]}" if names else f"prompt {i}"
        if not prompt:
            raise UserError(f"{name} is empty: a prompt needs at least one token, see data.prompt")
        if len(prompt) + params.max_new_tokens > max_context:
            raise UserError(
                f"{name} has {len(prompt)} tokens, which with rollout.max_new_tokens ({params.max_new_tokens}) is more than the "
                f"context of {max_context}: lower rollout.max_new_tokens, shorten data.prompt, or raise policy.max_context"
            )
