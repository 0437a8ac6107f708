"""srpo.core.interrupts, with real processes: Ctrl-C and SIGTERM end a program within seconds and with one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from srpo.core.errors import UserError
from srpo.core.interrupts import GRACE_S, at_interrupt
from srpo.core.settings import run_program

PROGRAM = """
import ctypes, sys, time, threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from srpo.core.interrupts import at_interrupt
from srpo.core.settings import check_command_line, run_program

@dataclass(frozen=True)
class Settings:
    how: str = "sleeps"

def ready():
    print("ready", flush=True)

check_command_line(Settings)
if sys.argv[-1] == "imports":
    ready()
    time.sleep(60)

def main(settings):
    if settings.how == "sleeps":
        ready()
        time.sleep(60)
    if settings.how == "waits_for_a_thread":
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(time.sleep, 60)
            ready()
            future.result()
    if settings.how == "runs_no_python":  # as a collective does whose peer is silent
        libc = ctypes.PyDLL(None)
        mask = (ctypes.c_uint64 * 16)(*[2**64 - 1] * 16)
        libc.pthread_sigmask(0, mask, None)  # to the other threads, which are there to take it
        threading.Thread(target=lambda: (time.sleep(0.2), ready()), daemon=True).start()
        ctypes.CDLL(None).sleep(60)
    if settings.how == "fails_on_its_way_out":
        try:
            ready()
            time.sleep(60)
        finally:
            raise ValueError("a file is closed")
    if settings.how == "is_called_back":
        done = threading.Event()
        at_interrupt(done.set)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(done.wait, 60)
            ready()
            future.result()

run_program(main, Settings)
"""
BUSY_S = 10.0  # for a machine that runs other tests; what the program waits for would take 60 s
PLACES = ["imports", "sleeps", "waits_for_a_thread", "runs_no_python", "fails_on_its_way_out", "is_called_back"]


def start(tmp_path: Path, place: str, **env: str) -> subprocess.Popen[str]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, str(path), "--how", place],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, **env},
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    return process


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_a_program_with_one_line(place: str, number: signal.Signals, word: str, tmp_path: Path) -> None:
    process = start(tmp_path, place)
    begin = time.monotonic()
    process.send_signal(number)
    _, lines = process.communicate(timeout=20)
    assert (process.returncode, lines) == (128 + number, f"{word}\n")
    late = place in ("waits_for_a_thread", "runs_no_python")
    assert time.monotonic() - begin < GRACE_S + BUSY_S if late else time.monotonic() - begin < GRACE_S


def test_ctrl_c_while_a_program_imports_its_first_library(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "srpo.report"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, lines = process.communicate(timeout=20)
    assert (process.returncode, lines) == (130, "interrupted\n")


def test_a_second_ctrl_c_waits_for_nothing_and_other_ranks_say_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, "waits_for_a_thread", RANK="1")
    begin = time.monotonic()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, lines = process.communicate(timeout=20)
    assert (process.returncode, lines) == (130, "") and time.monotonic() - begin < 3


@dataclass(frozen=True)
class Nothing:
    pass


def test_a_program_that_ends_leaves_the_signals_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(settings: Nothing) -> None:
        raise UserError("no")

    def stops(settings: Nothing) -> None:
        raise KeyboardInterrupt

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], threading.active_count()
    fds = len(os.listdir("/proc/self/fd"))
    for main, code, line in ((fails, 2, "error: no\n"), (stops, 130, "interrupted\n"), (stops, 130, "interrupted\n")):
        with pytest.raises(SystemExit) as ended:
            run_program(main, Nothing, [])
        assert (ended.value.code, capsys.readouterr().err) == (code, line)
    assert ([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], threading.active_count()) == before
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_callback_can_be_taken_back() -> None:
    forget = at_interrupt(lambda: None)
    forget()
    forget()
