"""Scoring in parallel with sampling: equal rollouts, errors on either side, early ends, stops."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import replace

import pytest

from srpo.core.batch import Rollout
from srpo.training.stream import Stopped, check_age, quota, stream_scored


def rollout(group: int, number: int = 0, version: int = 3) -> Rollout:
    return Rollout(f"e{group}", group, (1,), (2,), (-0.5,), (1,), (None,), f"{group}/{number}", "stop", version)


class Source:
    """Yields groups in a given order; records how many were requested and whether it was closed before its end."""

    def __init__(
        self, order: Sequence[int], pause_s: float = 0.0, fails_at: int = -1, wait_for: threading.Event | None = None
    ) -> None:
        self.given, self.closed, self.ended = 0, False, False
        self.wait_for, self.last_given = wait_for, threading.Event()
        self.order, self.pause_s, self.fails_at = order, pause_s, fails_at

    def groups(self) -> Generator[list[Rollout], None, None]:
        try:
            for place, group in enumerate(self.order):
                time.sleep(self.pause_s)
                if self.wait_for is not None and place == len(self.order) - 1:
                    assert self.wait_for.wait(20), "nobody has begun to score"
                if place == self.fails_at:
                    self.last_given.set()
                    raise OSError("the engine is gone")
                self.given += 1
                yield [rollout(group, number) for number in range(3)]
                if place == len(self.order) - 1:
                    self.last_given.set()
            self.ended = True
        finally:
            self.closed = True


class Scorer:
    """Rewards each rollout by its text, slowly; records groups and threads of its calls. The first call waits for an event."""

    def __init__(self, pause_s: float = 0.0, fails_at: int = -1, wait_for: threading.Event | None = None) -> None:
        self.pause_s, self.fails_at, self.wait_for = pause_s, fails_at, wait_for
        self.begun = threading.Event()
        self.calls: list[list[int]] = []
        self.threads: set[int] = set()

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        self.threads.add(threading.get_ident())
        self.calls.append([r.group for r in rollouts])
        self.begun.set()
        assert self.wait_for is None or self.wait_for.wait(20), "the rest never came"
        if len(self.calls) - 1 == self.fails_at:
            raise ValueError("the judge is gone")
        time.sleep(self.pause_s)
        return [replace(r, step_rewards=(float(r.group * 10 + int(r.text[-1])),)) for r in rollouts]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_all_come_scored_in_the_order_of_their_groups(seed: int, overlap: bool) -> None:
    rng = random.Random(seed)
    order = rng.sample(range(20), k=rng.randint(0, 12))
    source, scorer = Source(order, pause_s=rng.choice([0.0, 0.002])), Scorer(rng.choice([0.0, 0.003]))
    scored = stream_scored(source.groups(), scorer, overlap=overlap)
    assert [(r.group, r.text) for r in scored] == [(g, f"{g}/{n}") for g in sorted(order) for n in range(3)]
    assert all(r.step_rewards == (float(r.group * 10 + int(r.text[-1])),) for r in scored)
    assert source.ended and sorted(g for call in scorer.calls for g in call) == sorted(order * 3)
    if not overlap:
        assert scorer.calls == [[g for g in sorted(order) for _ in range(3)]]  # one call, as without streaming
        assert scorer.threads == {threading.get_ident()}


def test_groups_are_scored_while_others_are_sampled() -> None:
    """The last group comes only once the first are being scored, and their scoring ends only once the last has come."""
    scorer = Scorer()
    source = Source(range(10), wait_for=scorer.begun)
    scorer.wait_for = source.last_given
    stream_scored(source.groups(), scorer, overlap=True)
    assert source.ended and len(scorer.threads) == 1 and threading.get_ident() not in scorer.threads


def test_what_has_piled_up_is_one_call() -> None:
    source = Source(range(8))
    scorer = Scorer(wait_for=source.last_given)
    stream_scored(source.groups(), scorer, overlap=True)
    assert len(scorer.calls) <= 3


@pytest.mark.parametrize("overlap", [True, False])
def test_enough_is_the_first_to_finish_and_closes_the_source(overlap: bool) -> None:
    source, scorer = Source([4, 1, 3, 0, 2]), Scorer()
    scored = stream_scored(source.groups(), scorer, overlap=overlap, enough=3)
    assert sorted({r.group for r in scored}) == [1, 3, 4] and len(scored) == 9
    assert source.given == 3 and source.closed and not source.ended
    assert len(stream_scored(Source([1, 2]).groups(), scorer, overlap=overlap, enough=3)) == 6  # the source has only two groups


@pytest.mark.parametrize("overlap", [True, False])
def test_an_engine_s_error_ends_scoring(overlap: bool) -> None:
    source = Source(range(50), fails_at=4)
    scorer = Scorer(wait_for=source.last_given)
    with pytest.raises(OSError, match="the engine is gone"):
        stream_scored(source.groups(), scorer, overlap=overlap)
    calls = len(scorer.calls)
    time.sleep(0.05)
    assert len(scorer.calls) == calls <= 2  # the current call, and no other


def test_a_judge_s_error_ends_sampling() -> None:
    source, scorer = Source(range(1000), pause_s=0.002), Scorer(fails_at=1)
    with pytest.raises(ValueError, match="the judge is gone"):
        stream_scored(source.groups(), scorer, overlap=True)
    assert source.closed and source.given < 500
    with pytest.raises(ValueError, match="the judge is gone"):  # the last call
        stream_scored(Source([1]).groups(), Scorer(fails_at=0), overlap=True)


def test_told_to_stop_it_stops_at_the_next_group() -> None:
    stop = threading.Event()
    source = Source(range(1000), pause_s=0.002)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Stopped):
        stream_scored(source.groups(), Scorer(), overlap=True, stop=stop)
    assert source.closed and source.given < 500


@pytest.mark.parametrize(
    ("num_prompts", "world_size", "cut_tail", "expected"),
    [(64, 1, 0.0, 64), (64, 4, 0.0, 16), (64, 1, 0.1, 58), (64, 4, 0.1, 15), (4, 4, 0.9, 1), (10, 1, 0.3, 7), (8, 2, 0.25, 3)],
)
def test_a_rank_s_quota(num_prompts: int, world_size: int, cut_tail: float, expected: int) -> None:
    """10 * 0.3 is 3 although 0.3 * 10 is 3.0000000000000004 or 2.9999999999999996 in floats."""
    assert quota(num_prompts, world_size, cut_tail) == expected


def test_rollouts_that_are_too_old_are_refused() -> None:
    check_age([rollout(0, version=3), rollout(1, version=2)], 3, 1)
    with pytest.raises(ValueError, match=r"step 3 got rollouts of policy versions \[2\], but trains only on 3 to 3"):
        check_age([rollout(0, version=3), rollout(1, version=2)], 3, 0)
    with pytest.raises(ValueError, match=r"versions \[1, 4\].*missed a weight sync"):
        check_age([rollout(0, version=4), rollout(1, version=1)], 3, 1)
