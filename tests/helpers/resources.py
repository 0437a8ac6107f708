"""Processes, files and memory that this process holds or has left on the machine (Linux): for the audit after each module."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

# Threads and processes that libraries start once and keep: tqdm's monitor; Python's servers of processes and of resources.
KEPT = ("tqdm", "TMonitor", "multiprocessing.forkserver", "multiprocessing.resource_tracker", "execnet")
_INSTALLED = ("/dev/", "/proc/", sys.prefix, sys.base_prefix, "/usr/")
_WAIT_S = 3.0  # time for what has been told to end


def held() -> set[str]:
    """Names of living child processes, threads, descriptors, shared memory and temporary files of ours."""
    if sys.platform != "linux":
        return set()
    names = {f"process {line}" for pid in _descendants() if (line := _command(pid))}
    names |= {f"thread {thread.name}" for thread in threading.enumerate()}
    names |= _descriptors()
    names |= {f"shared memory {path}" for path in Path("/dev/shm").glob("*") if not _is_anothers(path.name)}
    names |= {f"temporary {path}" for path in Path(tempfile.gettempdir()).glob(f"srpo-*{os.getpid()}-*") if not _is_log(path)}
    return {name for name in names if not any(kept in name for kept in KEPT)}


def newcomers(before: set[str]) -> list[str]:
    """The names held now and not `before`, after waiting a little for them to end."""
    until = time.monotonic() + _WAIT_S
    while True:
        left = held() - before
        if left:
            gc.collect()  # ends what only garbage holds
            left = held() - before
        if any(name.startswith("shared memory") for name in left):
            left = {name for name in left if name.removeprefix("shared memory ") not in _mapped()}  # in use: another process's
        if not left or time.monotonic() > until:
            return sorted(left)
        time.sleep(0.1)


def _descendants() -> list[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(path.parent.name)] = int(parent)
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sorted(mine - {os.getpid()})


def _is_anothers(name: str) -> bool:
    """Whether a semaphore is named after a living process that is none of ours, such as one of tests beside these."""
    pid = name.split("-")[1] if name.startswith("sem.loky-") else ""
    return pid.isdigit() and Path(f"/proc/{pid}").exists() and int(pid) not in _descendants()


def _is_log(folder: Path) -> bool:
    """Whether an engine that failed has left its log there, which stays for the reader of the error."""
    return {path.name for path in folder.glob("*")} == {"engine.log", "owner"}


def _command(pid: int) -> str:
    with suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        return f"{pid} {line[:200]}" if line else ""
    return ""


def _descriptors() -> set[str]:
    """Open files and local sockets. Pipes, network sockets and anonymous descriptors belong to threads and processes, which are
    named themselves, or to gloo, which keeps one; files of installed packages, such as fonts, to their caches."""
    names = set()
    local = {fields[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:] if len(fields := line.split()) > 6}
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(path)
            if target[len("socket:[") : -1] in local or (target.startswith("/") and not target.startswith(_INSTALLED)):
                names.add(f"descriptor {target}")
    return names


def _mapped() -> set[str]:
    """Shared memory that some process has mapped."""
    names = set()
    for path in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            text = path.read_text(encoding="utf-8", errors="replace")
            names |= {line[line.index("/dev/shm/") :] for line in text.splitlines() if "/dev/shm/" in line}
    return names
