from __future__ import annotations

import io
import re

import pytest

from srpo.core.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_tell_percent_time_left_and_values():
    stream = io.StringIO()
    with Progress("SFT", 4, stream=stream, interval_s=0) as bar:
        for loss in (4.0, 3.0):
            bar.advance(loss=loss)
        bar.print("a line of its own")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "SFT 1/4 (25 %), 0 s left, loss 4"
    assert lines[1].startswith("SFT 2/4 (50 %)")
    assert lines[2] == "a line of its own"
    assert lines[3] == "SFT 2/4 (50 %), done in 0 s, loss 3"


def test_time_left_counts_only_what_this_process_did(monkeypatch: pytest.MonkeyPatch):
    clock = iter((0.0, 0.0, 10.0, 10.0, 10.0))
    monkeypatch.setattr("srpo.core.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Progress("RL", 1000, start=500, stream=stream) as bar:
        bar.advance(1)
    assert stream.getvalue().splitlines()[0] == "RL 501/1000 (50 %), 1 h 23 min left"


def test_no_lines_between_the_intervals():
    stream = io.StringIO()
    with Progress("SFT", 1000, stream=stream, interval_s=60) as bar:
        for _ in range(1000):
            bar.advance()
    assert stream.getvalue().splitlines() == ["SFT 1000/1000 (100 %), done in 0 s"]


def test_an_error_is_not_reported_as_done():
    stream = io.StringIO()
    with pytest.raises(ValueError, match="boom"), Progress("SFT", 2, stream=stream):
        raise ValueError("boom")
    assert "stopped" in stream.getvalue()
    assert "done" not in stream.getvalue()


def test_other_ranks_are_silent():
    stream = Terminal()
    with Progress("SFT", 1, enabled=False, stream=stream) as bar:
        bar.advance()
        bar.print("x")
    assert stream.getvalue() == ""


def test_terminal_gets_a_bar_and_whole_lines():
    stream = Terminal()
    with Progress("SFT", 2, stream=stream) as bar:
        bar.advance(2, loss=1.25)
        bar.print("[not markup] table")
    text = re.sub(r"\x1b\[[\d;?]*\w", "", stream.getvalue())
    assert "2/2" in text
    assert "loss 1.25" in text
    assert "[not markup] table" in text


def test_a_stage_within_a_stage_shares_the_terminal():
    stream = Terminal()
    with Progress("SRPO", 2, stream=stream) as outer:
        with Progress("evaluation", 3, stream=stream) as inner:
            inner.advance(3)
        outer.advance(2)
    text = re.sub(r"\x1b\[[\d;?]*\w", "", stream.getvalue())
    assert "evaluation" in text
    assert "2/2" in text
    assert "evaluation" not in text[text.rindex("SRPO") :]  # gone when it is done
    with Progress("next", 1, stream=stream) as bar:  # the terminal was given back
        bar.advance()
    assert "next" in stream.getvalue()
