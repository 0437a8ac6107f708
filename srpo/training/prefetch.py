"""One step off-policy (rollout.off_policy_steps 1): the next optimizer step's batch is sampled while this one's is trained on.

The thread that samples speaks to the engine and to the judge, and to no other rank: collectives are the main thread's. So is the
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

# (examples, optimizer step, what tells it to stop) -> this rank's scored rollouts
Sample = Callable[[Sequence[Example], int, threading.Event], list[Rollout]]


@dataclass(frozen=True)
class _Pending:
    examples: list[Example]
    rollouts: Future[list[Rollout]]
    before: Mapping[str, Any]  # the sampler's state before they were drawn


class Ahead:
    """At most one batch that is sampled ahead. Leaving its `with` stops what is under way and waits for that."""

    def __init__(self, sampler: Curriculum, sample: Sample) -> None:
        self._sampler, self._sample = sampler, sample
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._stop = threading.Event()
        self._pending: _Pending | None = None

    def start(self, num_prompts: int, step: int) -> None:
        """Draw the batch of optimizer step `step` and begin to sample it, with the weights that the engine has."""
        assert self._pending is None, "one batch at a time"
        before = self._sampler.state_dict()
        examples = self._sampler.next(num_prompts)
        self._pending = _Pending(examples, self._pool.submit(self._sample, examples, step, self._stop), before)

    def take(self) -> tuple[list[Example], list[Rollout]] | None:
        """The batch (examples of all ranks, this rank's scored rollouts), waited for; None where none was started.

        Raises what sampling or scoring has raised.
        """
        pending, self._pending = self._pending, None
        return None if pending is None else (pending.examples, pending.rollouts.result())

    def wait(self) -> None:
        """Return when the engine is free. Raises like `take`."""
        if self._pending is not None:
            self._pending.rollouts.result()

    def drop(self) -> None:
        """Stop the batch and forget that it was drawn: it is of a curriculum stage that is over."""
        if self._pending is not None:
            self._end()
            self._sampler.load_state_dict({**self._sampler.state_dict(), "rates": self._pending.before["rates"]})
            self._pending = None

    def sampler_state(self) -> dict[str, Any]:
        """What a checkpoint holds of the sampler: as if the batch had not been drawn, so that no prompt is lost with it."""
        state: dict[str, Any] = dict(self._sampler.state_dict())
        if self._pending is not None:
            state |= {key: self._pending.before[key] for key in ("rates", "sampler")}
        return state

    def _end(self) -> None:
        """Stop the thread's work and wait for its end."""
        if self._pending is not None:
            self._stop.set()
            with suppress(Stopped):
                self._pending.rollouts.result()
            self._stop.clear()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
