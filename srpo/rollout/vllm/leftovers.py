"""Removes everything that the processes of an engine leave on this machine: a private temporary folder, and shared memory."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

_PREFIX = "srpo-engine-"
OWNER = "owner"  # file that the trainer of a folder holds locked
_YOUNG_S = 60.0  # a folder may not be locked yet
_SHARED = "/dev/shm/"
_TRACKER_S = 1.0  # time for a tracker to remove what it has tracked


def make_folder() -> tuple[Path, IO[str]]:
    """(a temporary folder that only this user may enter, its lock). Removes the folders of trainers that have ended."""
    _sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    lock = (folder / OWNER).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _sweep(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another trainer sweeps, too
            stat = folder.lstat()
            if stat.st_uid != os.getuid() or time.time() - stat.st_mtime < _YOUNG_S:
                continue
            with (folder / OWNER).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the trainer lives
                shutil.rmtree(folder, ignore_errors=True)


def empty_folder(folder: Path, keep: Iterable[str]) -> None:
    """Remove everything in `folder` but the files named in `keep`."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, number = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            if int(number) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def kill_group(group: int) -> None:
    """Kill the processes of a group: Python's resource trackers last, because they remove what the others have shared."""
    for pid in members(group):
        if not _is_tracker(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + _TRACKER_S
    while members(group) and time.monotonic() < until:
        time.sleep(0.01)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _is_tracker(pid: int) -> bool:
    with suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def shared_files(pids: Iterable[int]) -> set[str]:
    """Files of shared memory that these processes have mapped and that still have a name, and their named semaphores."""
    names = set()
    for pid in pids:
        names |= {str(path) for path in Path(_SHARED).glob(f"sem.*-{pid}-*")}  # mapped under another name, if at all
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
            names |= {line[line.index(_SHARED) :] for line in lines if _SHARED in line and not line.endswith(" (deleted)")}
    return names


def remove_shared(names: Iterable[str]) -> None:
    """Unlink files of `shared_files`, after the processes that used them have ended."""
    for name in names:
        with suppress(OSError):
            os.unlink(name)
