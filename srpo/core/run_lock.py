"""A folder is written by one process at a time: a lock that ends with the process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from srpo.core.errors import UserError, naming

LOCK = "lock"
_held: dict[Path, int] = {}  # folders that this process has locked, and how often: stages of a program share its folder


class Ranks(Protocol):
    """The part of `srpo.policy.parallel.Parallel` that a lock needs."""

    @property
    def is_main(self) -> bool: ...
    def broadcast_object(self, x: Any) -> Any: ...


class RunConfig(Protocol):
    """Settings with a run folder."""

    @property
    def run_dir(self) -> str: ...


C = TypeVar("C", bound=RunConfig)
P = TypeVar("P", bound=Ranks)
R = TypeVar("R")
More = ParamSpec("More")


class FolderInUse(UserError):
    """Another process writes into the folder."""


def locks_run_dir(work: Callable[Concatenate[C, P, More], R]) -> Callable[Concatenate[C, P, More], R]:
    """`work(settings, ranks, ...)` inside `run_lock(settings.run_dir)`."""

    @wraps(work)
    def locked(cfg: C, parallel: P, *args: More.args, **more: More.kwargs) -> R:
        with run_lock(Path(cfg.run_dir), parallel):
            return work(cfg, parallel, *args, **more)

    return locked


@contextmanager
def run_lock(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing, and removed at the end if it is still empty. Collective.

    Raises FolderInUse on all ranks if another process holds it; this process may hold it already. Rank 0 has the lock: flock on
    the file `lock`, whose text is its process id and host.
    """
    with ExitStack() as stack:
        problem = None
        if ranks.is_main:
            try:
                stack.enter_context(hold(folder))
            except (FolderInUse, OSError) as error:
                problem = error
        problem = ranks.broadcast_object(problem)
        if problem:
            raise problem
        yield


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """`run_lock` for one process."""
    lock = _Lock(folder)
    try:
        yield
    finally:
        lock.release()


class _Lock:
    def __init__(self, folder: Path) -> None:
        self._key, self._file, self._made = folder.resolve(), None, []
        if self._key not in _held:
            self._made = [path for path in (self._key, *self._key.parents) if not path.exists()]
            self._file = _locked_file(self._key / LOCK, folder)
        _held[self._key] = _held.get(self._key, 0) + 1

    def release(self) -> None:
        _held[self._key] -= 1
        if _held[self._key]:
            return
        del _held[self._key]
        assert self._file is not None
        with suppress(OSError):  # a read-only or full disk, or a folder that was moved away: the lock ends with its descriptor
            (self._key / LOCK).unlink()
        os.close(self._file)
        for path in self._made:
            with suppress(OSError):  # not empty
                path.rmdir()


def _locked_file(path: Path, folder: Path) -> int:
    """Descriptor of the locked file."""
    for again in range(99, -1, -1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileExistsError, FileNotFoundError):  # another process has just made or removed the empty folder
            if not again:
                raise
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 200).decode("utf-8", "replace").strip()
            os.close(file)
            who = f"another process ({owner})" if owner.isprintable() and owner else "another process"
            raise FolderInUse(f"{who} works in {folder}: wait for it or end it, or give another folder") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                os.close(file)
                raise OSError(error.errno, error.strerror, str(path)) from error
            print(f"{path}: this file system has no locks: start no second process in {folder}", flush=True)
        try:
            same = os.path.samestat(os.fstat(file), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:  # else its last owner has removed it in the meantime
            with naming(path):
                os.ftruncate(file, 0)
                os.pwrite(file, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return file
        os.close(file)
    raise FolderInUse(f"other processes start and end in {folder} all the time: give another folder")
