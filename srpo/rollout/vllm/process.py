"""Starts, watches and kills an engine's process, and exchanges messages with it over private sockets.

Requests are pickled, because they may carry CUDA handles, and go only from parent to child. Replies are JSON, so the trainer
unpickles nothing. Descriptors of shared memory go over a second socket. No port is opened.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from srpo.core.errors import UserError, printable
from srpo.rollout.vllm.leftovers import OWNER, empty_folder, kill_group, make_folder, members, remove_shared, shared_files
from srpo.rollout.vllm.orphan import TRAINER

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_LAUNCHER_PREFIXES = ("MASTER_", "TORCHELASTIC_", "ROLE_")
_CLOSE_S = 3.0  # time for a process to end by itself before it is killed, well below `interrupts.GRACE_S`
_DUMP_S = 2.0  # time for a hanging process to write its stacks
_LOG = "engine.log"
_TAIL = 3000  # characters of the process's log that an error shows


class EngineError(UserError):
    """The engine cannot serve a request. An error that its process reports ends in the last lines of its log."""

    def __init__(self, text: str) -> None:
        ValueError.__init__(self, "\n".join(map(printable, text.split("\n"))))


class EngineFailure(EngineError):
    """The engine's process died or hung, and has been killed; a new process may succeed."""


class EngineProcess:
    """A child process `python *command SOCKET SOCKET` that runs `srpo.rollout.vllm.server.serve`.

    timeout_s: a process that sends nothing for so long, not even a heartbeat, while a reply is due counts as hung.
    Usage: `send` a request, then `receive` until the reply that ends it.
    """

    def __init__(self, command: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None) -> None:
        self.timeout_s = timeout_s
        self._folder, self._lock = make_folder()
        self.log = self._folder / _LOG
        self._log = self.log.open("w")
        ours, theirs = socket.socketpair()
        # A child that stops reading lets the socket fill up: sending times out as well.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6)))
        self._descriptors, their_descriptors = socket.socketpair()
        self._channel = Connection(ours.detach())
        self._sent: set[int] = set()
        self._shared: set[str] | None = None  # shared memory of the process, known from its first reply on
        atexit.register(self.close)
        with theirs, their_descriptors:
            self._process = subprocess.Popen(
                [sys.executable, *command, str(theirs.fileno()), str(their_descriptors.fileno())],
                env=child_environment({**(env or {}), **self._own_environment()}),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(), their_descriptors.fileno()),
                start_new_session=True,  # Ctrl-C reaches the trainer alone, which closes the engine
            )

    def _own_environment(self) -> dict[str, str]:
        """Temporary files and sockets of the engine lie in the private folder. Caches of compiled code stay shared."""
        inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
        folder = str(self._folder)
        own = {"TMPDIR": folder, "VLLM_RPC_BASE_PATH": folder, "TORCHINDUCTOR_CACHE_DIR": inductor}
        return own | {TRAINER: str(os.getpid())}

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def send(self, op: str, **arguments: Any) -> None:
        """Send a request. Raises EngineFailure if the child does not read it."""
        try:
            self._channel.send((op, arguments))
        except BlockingIOError as error:
            raise self._hangs(self.timeout_s) from error
        except OSError as error:
            raise self._failure("died") from error

    def send_descriptor(self, key: int, fd: int) -> None:
        """Pass a file descriptor to the child, once per key."""
        if key in self._sent:
            return
        try:
            self._channel.send(("descriptor", {"key": key}))
            socket.send_fds(self._descriptors, [b"x"], [fd])
        except OSError as error:
            raise self._failure("died") from error
        self._sent.add(key)

    def receive(self, timeout_s: float | None = None, *, signs: bool = False) -> dict[str, Any]:
        """The next reply other than a heartbeat; with `signs` also heartbeats, `{"alive": True}`.

        Raises EngineError if the child reports an error, EngineFailure if it died or hangs.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        while True:
            try:
                if not self._channel.poll(timeout_s):
                    raise self._hangs(timeout_s)
                reply = json.loads(self._channel.recv_bytes())
            except (EOFError, OSError) as error:
                raise self._failure("died") from error
            if "error" in reply:
                raise EngineError(f"{reply['error']}\nThe engine's log is {self.log}:\n{self._tail()}")
            if self._shared is None and "alive" not in reply:
                self._shared = shared_files(members(self.pid))
            if signs or "alive" not in reply:
                return reply

    def _hangs(self, timeout_s: float) -> EngineFailure:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)  # the child writes the stacks of all threads into its log
        time.sleep(_DUMP_S)
        return self._failure(f"gave no sign of life for {timeout_s:g} s (rollout.vllm.timeout_s, at the start start_timeout_s)")

    def _failure(self, what: str) -> EngineFailure:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its sockets close a moment before it has exited
            self._process.wait(timeout=1.0 if what == "died" else 0.0)
        code = self._process.poll()
        self.kill()
        ending = f" with exit code {code}" if code is not None else ""
        return EngineFailure(f"the engine's process {self.pid} {what}{ending}; its log is {self.log}:\n{self._tail()}")

    def _tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-_TAIL:] if self.log.exists() else ""

    @contextlib.contextmanager
    def killed_unless_done(self) -> Iterator[None]:
        """Kill the process if the block is left by any exception: its state is unknown then, and its late replies would be read
        as answers to the next request."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                self.kill()

    def kill(self) -> None:
        """Kill the process and all processes that it started, and remove what they shared. The log stays for the reader of the
        error, until an engine of another run starts. Calling it again does nothing."""
        if self._channel.closed:
            return  # the pid may belong to another process by now
        self._end((self._shared or set()) | shared_files(members(self.pid)))

    def _end(self, shared: set[str]) -> None:
        atexit.unregister(self.close)
        kill_group(self.pid)
        self._process.wait()
        remove_shared(shared)  # a killed process does not, and its resource tracker may have been killed before
        self._channel.close()
        self._descriptors.close()
        self._log.close()
        empty_folder(self._folder, keep=(_LOG, OWNER))
        self._lock.close()

    def close(self) -> None:
        """End the process and all processes that it started, and remove its files. It is asked first, then killed."""
        if not self._channel.closed:
            shared = (self._shared or set()) | shared_files(members(self.pid))
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.set_blocking(self._channel.fileno(), False)  # a process that hangs may leave no room for a message
                self._channel.send(("close", {}))
                until = time.monotonic() + _CLOSE_S
                self._process.wait(timeout=_CLOSE_S)
                while members(self.pid) and time.monotonic() < until:  # its workers, and the tracker that removes their files
                    time.sleep(0.02)
            self._end(shared)
        shutil.rmtree(self._folder, ignore_errors=True)


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine's process: this process's without torchrun's variables, plus `extra`.

    PYTHONPATH repeats sys.path, so the child finds the same packages, including those added to sys.path at run time.
    """
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith(_LAUNCHER_PREFIXES)}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return env | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} | dict(extra)
