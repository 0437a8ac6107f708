"""A replacement of `subprocess.Popen` for tests that often start tests/helpers/fake_engine.py: it forks a process that has
already imported torch, because a new interpreter takes seconds. Sockets, log, environment, session, signals and exit codes are
those that `EngineProcess` expects."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FAKE = str(Path(__file__).with_name("fake_engine.py"))
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "srpo.rollout.vllm.server"])  # pytest: __main__ of the parent


def popen(command: Sequence[str], **options: Any) -> Any:
    """A fork for `python fake_engine.py ...`; an ordinary process for any other command."""
    return Forked(command, **options) if command[1] == FAKE else subprocess.Popen(command, **options)


class Descriptor:
    """A file descriptor that is pickled to the process being started, and is a number there."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _number, (reduction.DupFd(self.fd),)


def _number(descriptor: Any) -> int:
    return descriptor.detach()


class Forked:
    """The part of `subprocess.Popen` that `EngineProcess` uses."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], stdout: Any, pass_fds: tuple[int, int], **options: Any
    ) -> None:
        assert options == {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
        assert tuple(command[-2:]) == tuple(map(str, pass_fds))
        descriptors = [Descriptor(fd) for fd in (*pass_fds, stdout.fileno())]
        begun, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (list(command[1:-2]), dict(env), descriptors, theirs)
        self._process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        self._lock = threading.Lock()  # an exit code can be read once
        self._process.start()
        theirs.close()
        with begun:
            begun.recv_bytes()  # now it leads a process group, so that killpg finds it
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        with self._lock:
            self._process.join(timeout)
            code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("fake_engine.py", timeout)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _serve(argv: list[str], env: dict[str, str], descriptors: list[int], begun: Connection) -> None:
    *sockets, log = descriptors
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    begun.send_bytes(b"x")
    begun.close()
    import fake_engine

    fake_engine.main([*argv, *map(str, sockets)])
