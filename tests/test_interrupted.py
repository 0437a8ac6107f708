"""Ctrl-C beside a silent judge, in real processes of srpo.train: one line, within seconds, and the same command goes on."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import small_world as small
from judge_server import Answer, Asked, chat, serving

from srpo.core.interrupts import GRACE_S

BOUND_S = GRACE_S + 10  # for a machine that runs other tests; the judge is silent for 60 s


def settings(world: Any, run_dir: Path, url: str, **changes: Any) -> Any:
    reward = {"judge": "generative", "judge_engine": "url", "judge_url": url, "judge_model": "r_phi", "judge_retries": 1}
    return world.config(run_dir, num_steps=2, reward=reward, **changes)


def lines_of(program: small.Program) -> list[str]:
    return [line for line in program.log.read_text(encoding="utf-8").splitlines() if line]


WAYS = ({"overlap": "on"}, {"overlap": "off"}, {"overlap": "on", "off_policy_steps": 1})
SIGNALS = ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"))


@pytest.mark.parametrize(
    ("rollout", "number", "word"),
    [pytest.param(WAYS[0], *SIGNALS[0]), pytest.param(WAYS[2], *SIGNALS[1])]
    + [
        pytest.param(way, *which, marks=pytest.mark.slow)
        for way in WAYS
        for which in SIGNALS
        if (way, which) not in ((WAYS[0], SIGNALS[0]), (WAYS[2], SIGNALS[1]))
    ],
)
def test_a_silent_judge_does_not_hold_up_the_end(
    rollout: dict[str, Any], number: signal.Signals, word: str, world: Any, tmp_path: Path
) -> None:
    asked, over = threading.Event(), threading.Event()

    def silent(call: Asked) -> Answer:
        if call.number:  # the probe at the start is answered
            asked.set()
            over.wait(60)
        return chat("Step 1 is [Correct]")

    changes = {"loss": {"importance": "truncate"}} if "off_policy_steps" in rollout else {}
    with serving(silent) as server:
        cfg = settings(world, tmp_path / "run", server.url, rollout=rollout, **changes)
        program = small.Program("srpo.train", cfg, tmp_path / "log")
        try:
            assert asked.wait(120), lines_of(program)
            begin = time.monotonic()
            program.process.send_signal(number)
            code = program.process.wait(timeout=30)
            seconds = time.monotonic() - begin
        finally:
            over.set()
            program.kill()
    lines = lines_of(program)
    assert code == 128 + number and lines[-1] == word and not any("Traceback" in line for line in lines), lines
    assert lines.count(word) == 1 and seconds < BOUND_S


def test_two_ranks_end_within_seconds(world: Any, tmp_path: Path) -> None:
    """One rank waits for its judge, the other for that rank, in a collective that runs no Python."""
    asked, over = threading.Event(), threading.Event()

    def silent(call: Asked) -> Answer:
        if call.number > 2:
            asked.set()
            over.wait(60)
        return chat("Step 1 is [Correct]")

    with serving(silent) as server:
        program = small.Program("srpo.train", settings(world, tmp_path / "run", server.url), tmp_path / "log", num_ranks=2)
        try:
            assert asked.wait(200), lines_of(program)
            begin = time.monotonic()
            program.process.send_signal(signal.SIGINT)
            program.process.wait(timeout=60)
            seconds = time.monotonic() - begin
        finally:
            over.set()
            program.kill()
    assert lines_of(program).count("interrupted") <= 1 and seconds < BOUND_S + 5
