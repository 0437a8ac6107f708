"""Prefetches batches one step off-policy (rollout.off_policy_steps 1): samples the next optimizer step's batch during an update.

The sampling thread uses the engine and the judge, but takes part in no collective: those belong to the main thread. So does the
engine before `start` and after `take` or `wait`, for weight syncs, refill rounds and evaluation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from srpo.core.batch import Rollout
from srpo.data.curriculum import Curriculum
from srpo.data.examples import Example
from srpo.training.stream import Stopped

# (examples, optimizer step, event that stops it) -> this rank's scored rollouts
Sample = Callable[[Sequence[Example], int, threading.Event], list[Rollout]]


@dataclass(frozen=True)
class _Pending:
    examples: list[Example]
    rollouts: Future[list[Rollout]]
    before: Mapping[str, Any]  # the sampler's state before the examples were drawn


class Prefetch:
    """Samples at most one batch in advance. Leaving its `with` block stops that batch and waits for its thread."""

    def __init__(self, sampler: Curriculum, sample: Sample) -> None:
        self._sampler, self._sample = sampler, sample
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._stop = threading.Event()
        self._pending: _Pending | None = None

    def start(self, num_prompts: int, step: int) -> None:
        """Draw the batch of optimizer step `step` and start sampling it, with the engine's current weights."""
        assert self._pending is None, "one batch at a time"
        before = self._sampler.state_dict()
        examples = self._sampler.next(num_prompts)
        self._pending = _Pending(examples, self._pool.submit(self._sample, examples, step, self._stop), before)

    def take(self) -> tuple[list[Example], list[Rollout]] | None:
        """Wait for the batch and return (examples of all ranks, this rank's scored rollouts); None if none was started.

        Raises any error of sampling or scoring.
        """
        pending, self._pending = self._pending, None
        return None if pending is None else (pending.examples, pending.rollouts.result())

    def wait(self) -> None:
        """Wait until the engine is free. Raises like `take`."""
        if self._pending is not None:
            self._pending.rollouts.result()

    def drop(self) -> None:
        """Stop the batch and undo its draw: it belongs to a curriculum stage that has ended."""
        if self._pending is not None:
            self._end()
            self._sampler.load_state_dict({**self._sampler.state_dict(), "rates": self._pending.before["rates"]})
            self._pending = None

    def sampler_state(self) -> dict[str, Any]:
        """The sampler's state for a checkpoint, as if the batch had not been drawn: a resumed run draws its prompts again."""
        state: dict[str, Any] = dict(self._sampler.state_dict())
        if self._pending is not None:
            state |= {key: self._pending.before[key] for key in ("rates", "sampler")}
        return state

    def _end(self) -> None:
        """Stop sampling and wait for the thread's work to end."""
        if self._pending is not None:
            self._stop.set()
            with suppress(Stopped):
                self._pending.rollouts.result()
            self._stop.clear()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
