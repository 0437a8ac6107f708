"""Streams rollouts from the engine to their rewards: groups are scored on a thread while others are still being sampled."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from srpo.core.batch import Rollout

Score = Callable[[Sequence[Rollout]], list[Rollout]]


class Stopped(RuntimeError):
    """Sampling was stopped from outside (`stream_scored(stop=...)`); its rollouts are discarded."""


def stream_scored(
    groups: Generator[list[Rollout], None, None],
    score: Score,
    *,
    overlap: bool,
    enough: int = 0,
    stop: threading.Event | None = None,
) -> list[Rollout]:
    """The scored rollouts of the first `enough` groups to finish (0: all groups), sorted by group number.

    overlap: score finished groups while others are sampled, on one thread, one call at a time; otherwise score all of them in one
    call at the end, in that order. Both give the same rollouts if the reward of a response does not depend on the other responses
    in the call. `groups` is closed as soon as enough have come, so that the engine stops sampling the rest.

    An error on one side ends the other: scoring after its current call, sampling after the next group to finish. Once `stop` is
    set, both end in the same way, with Stopped. At Ctrl-C the current call ends at once (`srpo.core.interrupts`).
    """
    rollouts: list[Rollout] = []
    with closing(groups), _Scorer(score, overlap) as scorer:
        for number, group in enumerate(groups, start=1):
            if stop is not None and stop.is_set():
                raise Stopped
            scorer.put(group)
            if number == enough:
                break
        groups.close()
        rollouts = scorer.finish()
    return sorted(rollouts, key=lambda rollout: rollout.group)


class _Scorer:
    """Scores the groups it is given: on a thread, or (overlap False) all at once in `finish`. Unusable after its `with` block."""

    def __init__(self, score: Score, overlap: bool) -> None:
        self._score = score
        self._waiting: queue.SimpleQueue[list[Rollout] | None] = queue.SimpleQueue()
        self._given_up = False
        self._held: list[Rollout] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="score") if overlap else None
        self._future = self._pool.submit(self._run) if self._pool else None

    def _run(self) -> list[Rollout]:
        """Score groups until None comes, and return all of them; all groups that are waiting go into one call."""
        scored: list[Rollout] = []
        last = False
        while not last:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            last = batch[-1] is None
            rollouts = [rollout for group in batch if group is not None for rollout in group]
            if rollouts and not self._given_up:
                scored += self._score(rollouts)
        return scored

    def put(self, group: list[Rollout]) -> None:
        """Add a group. Raises the error that scoring has raised meanwhile, if any."""
        if self._future is None:
            self._held += group
            return
        if self._future.done():
            self._future.result()
        self._waiting.put(group)

    def finish(self) -> list[Rollout]:
        """All rollouts, scored. Raises any error of scoring."""
        if self._future is None:
            return self._score(sorted(self._held, key=lambda rollout: rollout.group))
        self._waiting.put(None)
        return self._future.result()

    def __enter__(self) -> _Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._given_up = True
            self._waiting.put(None)
            self._pool.shutdown()  # waits for the current call


def quota(num_prompts: int, world_size: int, cut_tail: float) -> int:
    """Number of groups after which a rank aborts the rest: its share of `num_prompts` less `cut_tail` of it (rounded down).

    At least one. `num_prompts` is a multiple of `world_size`.
    """
    share = num_prompts // world_size
    return max(1, share - int(cut_tail * share + 1e-9))


def check_age(rollouts: Sequence[Rollout], version: int, max_age: int) -> None:
    """Raise ValueError if a rollout was sampled more than `max_age` weight syncs before `version`, or after it."""
    refused = sorted({r.policy_version for r in rollouts if not 0 <= version - r.policy_version <= max_age})
    if refused:
        raise ValueError(
            f"optimizer step {version} got rollouts of policy versions {refused}, but trains only on {version - max_age} to "
            f"{version} (rollout.off_policy_steps is {max_age}): the engine has missed a weight sync"
        )
