"""Requests of several ranks to one engine: how they are merged, kept apart and ended, also after failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from srpo.core.errors import UserError
from srpo.rollout.engine import SamplingParams
from srpo.rollout.vllm import shared_server
from srpo.rollout.vllm.client import Replies
from srpo.rollout.vllm.process import EngineError
from srpo.rollout.vllm.shared_server import SharedServer

PARAMS = SamplingParams(max_new_tokens=2, group_size=1, stop_ids=(7,))


class Scripted:
    """An engine that answers each prompt with its tokens and its number, last prompt first, and records its calls. It waits for a
    permit of `go` before each answer, with heartbeats meanwhile."""

    policy_version = 3

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.given: list[int] = []
        self.params: Any = None
        self.go = threading.Semaphore(1000)
        self.error: Exception | None = None
        self.closed = 0

    def replies(self, prompts: Any, params: SamplingParams, seed: int, numbers: Any = None) -> Replies:
        self.calls.append(list(numbers))
        self.params = params
        try:
            for i in reversed(range(len(prompts))):
                while not self.go.acquire(timeout=0.02):
                    yield None
                if self.error is not None:
                    raise self.error
                self.given.append(numbers[i])
                yield i, [[[*prompts[i], numbers[i]], [-1.0], "stop"]]
        finally:
            self.closed += 1


@pytest.fixture
def engine() -> Scripted:
    return Scripted()


@pytest.fixture
def serve(engine: Scripted, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Connection]]:
    """A function that starts a server for `num_ranks` ranks and returns the ranks' ends of the connections."""

    def start(num_ranks: int, gather_s: float = 20.0) -> list[Connection]:
        monkeypatch.setattr(shared_server, "GATHER_S", gather_s)
        pairs = [Pipe() for _ in range(num_ranks)]
        start.server = SharedServer(engine, [theirs for _, theirs in pairs])  # pyright: ignore
        return [ours for ours, _ in pairs]

    return start


def say(rank: Connection, message: Any) -> None:
    rank.send_bytes(json.dumps(message).encode())


def ask(rank: Connection, numbers: list[int], params: SamplingParams = PARAMS, seed: int = 1, version: int = 3) -> None:
    how = {"params": asdict(params), "seed": seed, "version": version}
    say(rank, {"prompts": [[40 + n] for n in numbers], "numbers": numbers, "how": how})


def until(happened: Callable[[], object]) -> None:
    """Wait for something that the server's thread does."""
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def hear(rank: Connection) -> dict[str, Any]:
    assert rank.poll(10), "nothing came"
    return json.loads(rank.recv_bytes())


def read(rank: Connection) -> dict[int, list[int]]:
    """Read replies to the end of the request; returns prompt index -> response."""
    responses = {}
    while "done" not in (reply := hear(rank)):
        if "error" in reply:
            raise EngineError(reply["error"])
        responses[reply["prompt"]] = reply["samples"][0][0]
    return responses


def test_ranks_that_come_together_are_one_request_and_get_their_own_samples(serve, engine):
    first, second = serve(2)
    begin = time.monotonic()
    ask(first, [0, 2, 4])
    ask(second, [1, 3])
    assert read(first) == {0: [40, 0], 1: [42, 2], 2: [44, 4]}
    assert read(second) == {0: [41, 1], 1: [43, 3]}
    assert [sorted(call) for call in engine.calls] == [[0, 1, 2, 3, 4]] and time.monotonic() - begin < 8  # no further wait
    assert engine.params == PARAMS


def test_one_that_has_nothing_to_ask_or_has_gone_is_not_waited_for(serve, engine):
    first, second, third = serve(3)
    ask(first, [])
    third.close()
    ask(second, [5])
    assert read(first) == {} and read(second) == {0: [45, 5]}
    second.close()
    ask(first, [6])
    assert read(first) == {0: [46, 6]} and engine.calls == [[5], [6]]


@pytest.mark.parametrize("other", [{"seed": 2}, {"params": SamplingParams(max_new_tokens=3, group_size=1)}])
def test_different_requests_are_served_one_after_the_other(serve, engine, other):
    first, second = serve(2, gather_s=0.5)
    ask(first, [0])
    time.sleep(0.1)
    ask(second, [1], **other)
    assert read(first) == {0: [40, 0]} and read(second) == {0: [41, 1]}
    assert engine.calls == [[0], [1]]


def test_a_late_rank_is_served_after_the_window(serve, engine):
    first, second = serve(2, gather_s=0.05)
    engine.go = threading.Semaphore(0)
    ask(first, [0])
    until(lambda: engine.calls)
    ask(second, [1])
    engine.go.release(2)
    assert read(first) == {0: [40, 0]} and read(second) == {0: [41, 1]} and engine.calls == [[0], [1]]


def test_the_rest_is_stopped_when_nobody_wants_it_and_not_before(serve, engine):
    engine.go = threading.Semaphore(1)
    first, second = serve(2)
    ask(first, [0, 1, 2])
    time.sleep(0.1)
    ask(second, [3, 4, 5])
    assert hear(second)["prompt"] == 2
    say(first, None)
    assert read(first) == {}  # at once, although the engine goes on
    engine.go.release()
    assert hear(second)["prompt"] == 1 and engine.closed == 0
    say(second, None)  # while the engine is in the middle of something
    assert read(second) == {}
    with serve.server.busy:
        assert engine.given == [5, 4] and engine.closed == 1
    say(second, None)  # its request has ended: no effect
    engine.go.release(10)
    ask(first, [7])
    ask(second, [])
    assert read(first) == {0: [47, 7]} and read(second) == {}


def test_what_a_rank_asks_while_its_last_request_still_runs_is_another_one(serve, engine):
    engine.go = threading.Semaphore(0)
    first, second = serve(2)
    ask(first, [0])
    ask(second, [1])
    until(lambda: engine.calls)
    say(first, None)
    assert read(first) == {}
    ask(first, [8])
    engine.go.release(3)
    assert read(second) == {0: [41, 1]}
    ask(second, [])
    assert read(first) == {0: [48, 8]} and read(second) == {}


@pytest.mark.parametrize("error", [EngineError("dead"), UserError("bad"), RuntimeError("no"), OSError("gone")])
def test_what_the_engine_raises_reaches_all_who_asked_and_the_next_request_is_served(serve, engine, error):
    ranks = serve(2)
    for failure in (error, None):
        engine.error = failure
        for n, rank in enumerate(ranks):
            ask(rank, [n])
        for n, rank in enumerate(ranks):
            if failure is None:
                assert read(rank) == {0: [40 + n, n]}
            else:
                with pytest.raises(EngineError, match=str(error)):
                    read(rank)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_our_own_leaves_nobody_waiting(serve, engine):
    ranks = serve(2)
    engine.error = KeyError("a bug")
    for rank in ranks:
        ask(rank, [0])
    for rank in ranks:
        with pytest.raises(EOFError):
            read(rank)
    serve.server.join()


def test_weights_of_another_version_are_refused(serve):
    (rank,) = serve(1)
    ask(rank, [0], version=4)
    with pytest.raises(EngineError, match="version 4, the shared vLLM has 3"):
        read(rank)


def test_a_rank_that_dies_while_it_is_served_costs_the_others_nothing(serve, engine):
    engine.go = threading.Semaphore(1)
    first, second = serve(2)
    ask(first, [0, 1])
    time.sleep(0.1)
    ask(second, [2, 3])
    assert hear(second)["prompt"] == 1
    first.close()
    engine.go.release(10)
    assert read(second) == {0: [42, 2]}
    second.close()
    serve.server.join()
