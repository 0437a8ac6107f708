"""Runs a program with a limit in seconds, and ends everything that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

# Environment variable by which the descendants of a program are found, whatever their session: its mark, after those of the
# programs that it was started under.
MARK = "GPU_PROOF_PROCESS"
STACKS_S = 3.0  # time to write stacks after SIGABRT
_POLL_S = 0.05


@dataclass(frozen=True)
class Ended:
    """How a program ended: by itself with an exit code, or killed at its limit ("limit") or by `stop` ("stopped")."""

    code: int | None
    killed: str
    seconds: float


def run_capped(
    command: Sequence[str],
    cap_s: float,
    log: Path,
    *,
    env: Mapping[str, str],
    folder: Path,
    cores: set[int] | None = None,
    stop: Event | None = None,
) -> Ended:
    """Run a program whose output goes to the file `log`, on the given cores.

    At the limit it gets SIGABRT, on which Python's fault handler prints the stacks of all threads, then SIGKILL; so do all its
    descendants, also those of a program that has ended.
    """
    mark = uuid.uuid4().hex
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**env, MARK: f"{env.get(MARK, '')} {mark}", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"},
            cwd=folder,
            start_new_session=True,
        )
    if cores:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, cores)
    killed = ""
    try:
        while process.poll() is None:
            stopped = stop is not None and stop.is_set()
            if stopped or time.monotonic() - begin > cap_s:
                killed = "stopped" if stopped else "limit"
                break
            time.sleep(_POLL_S)
        if killed:
            _ask_for_stacks(mark, process)
    finally:
        end_all(mark, process)
    return Ended(None if killed else process.returncode, killed, time.monotonic() - begin)


def _ask_for_stacks(mark: str, process: subprocess.Popen[bytes]) -> None:
    """Send SIGABRT to the process, then to its descendants, each when the one before has ended: their stacks go to one file."""
    until = time.monotonic() + STACKS_S
    for pid in [process.pid, *sorted(marked(mark) - {process.pid})]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
        while pid in marked(mark) and time.monotonic() < until:  # a process that waits to be reaped has no environment any more
            time.sleep(_POLL_S)


def end_all(mark: str, process: subprocess.Popen[bytes]) -> None:
    """Kill the process and everything that carries its mark; processes that are started meanwhile, too."""
    until = time.monotonic() + STACKS_S
    while _signal_all(mark, process.pid if process.poll() is None else None, signal.SIGKILL) and time.monotonic() < until:
        time.sleep(_POLL_S)
    with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold a process whose kernel never ends
        process.wait(STACKS_S)


def _signal_all(mark: str, pid: int | None, number: int) -> int:
    """Signal a process and all others with its mark; returns how many there were."""
    pids = marked(mark) | ({pid} if pid is not None else set())
    for each in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, number)
    return len(pids)


def marked(mark: str) -> set[int]:
    """Ids of the running processes whose environment has the mark (Linux)."""
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if mark.encode() in (path / "environ").read_bytes():
                found.add(int(path.name))
    return found


def ends(text: str, first: int = 20_000, last: int = 40_000) -> str:
    """The beginning and the end of a long text."""
    cut = len(text) - first - last
    return text if cut <= 0 else f"{text[:first]}\n[... {cut} characters ...]\n{text[-last:]}"
