"""The request loop of the engine's process: serves one parent over the sockets that the process was started with.

A `Backend` does the work (vLLM's is `srpo.rollout.vllm.worker`). The loop guarantees that once a sync has begun, nothing is
sampled before all weights have arrived and the bit sums of the weights in use have been computed.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from srpo.rollout.engine import SamplingParams
from srpo.rollout.vllm.orphan import end_with_trainer
from srpo.rollout.weights.buckets import Bucket
from srpo.rollout.weights.shared_memory import half_the_threads, map_segment

ALIVE_EVERY_S = 1.0

# (response ids, log-probabilities, finish); if support or routing was requested also support, [L, K] int32 in base64, and routed,
# (layers, experts per token, [tokens, layers, experts] int16 in base64), each None unless requested.
Routed = tuple[int, int, str]
Response = tuple[list[int], list[float], str] | tuple[list[int], list[float], str, str | None, Routed | None]
Group = tuple[int, Sequence[Response]]  # (prompt index, its responses)


class Backend(Protocol):
    """An inference engine in this process."""

    def start(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Load the model. Returns facts for the parent, at least max_context."""
        ...

    def begin_weights(self) -> None: ...

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        """Load some of the tensors, under checkpoint names. The tensors do not change until `finish_weights` has returned."""
        ...

    def load_handles(self, update: dict[str, Any]) -> None:
        """Load some of the tensors from CUDA IPC handles; all are read before this returns."""
        ...

    def finish_weights(self) -> dict[str, int]:
        """Bit sum of each group (`srpo.rollout.weights.buckets.group_of`) of the weights that are in use from now on."""
        ...

    def generate(
        self, prompts: Sequence[tuple[int, list[int]]], params: SamplingParams, seeds: Sequence[int]
    ) -> Generator[Group | None, None, None]:
        """Yields whole groups as they finish, and None in between as a heartbeat. Closing it early drops unfinished groups."""
        ...

    def sleep(self) -> None: ...

    def wake(self, tags: list[str] | None) -> None: ...


class Server:
    """The request loop and its state: the version of the weights (None: unknown) and the mapped segments of shared memory."""

    def __init__(self, channel: Connection, descriptors: socket.socket, backend: Backend) -> None:
        self._channel = channel
        self._descriptors = descriptors
        self._backend = backend
        self._buffers: dict[int, torch.Tensor] = {}
        self._version: int | None = None
        self._over = False
        self._last_sign = 0.0
        self._load_s = 0.0  # seconds spent on loading buckets in the current sync

    def reply(self, **content: Any) -> None:
        self._last_sign = time.monotonic()
        self._channel.send_bytes(json.dumps(content).encode())

    def alive(self) -> None:
        """Send a heartbeat, at most one per ALIVE_EVERY_S."""
        if time.monotonic() - self._last_sign > ALIVE_EVERY_S:
            self.reply(alive=True)

    def run(self) -> None:
        """Serve requests until the parent closes the socket or sends `close`."""
        while not self._over:
            try:
                op, arguments = self._channel.recv()
            except EOFError:
                return
            if op == "close":
                return
            try:
                getattr(self, f"on_{op}")(**arguments)
            except Exception as error:
                self.reply(error=f"{type(error).__name__}: {error}")
                raise  # the state of the backend is unknown: this process ends, with a traceback in its log

    def close(self) -> None:
        """Release what lives on outside this process; called when the parent closes the engine."""

    def on_start(self, settings: dict[str, Any]) -> None:
        facts = self._backend.start(settings)
        self._version = -1
        self.reply(started=True, **facts)

    def on_descriptor(self, key: int) -> None:
        _, fds, _, _ = socket.recv_fds(self._descriptors, 1, 1)
        self.map_segment(key, fds[0])
        os.close(fds[0])

    def map_segment(self, key: int, fd: int) -> None:
        """Map shared memory that syncs write buckets to. The caller closes the descriptor afterwards."""
        self._buffers[key] = map_segment(fd, os.fstat(fd).st_size)

    def on_begin(self) -> None:
        self._version = None
        start = time.perf_counter()
        self._backend.begin_weights()
        self._load_s = time.perf_counter() - start

    def on_bucket(self, bucket: Bucket) -> None:
        start = time.perf_counter()
        with half_the_threads():
            self.load_bucket(bucket)
        self._load_s += time.perf_counter() - start
        self.alive()

    def load_bucket(self, bucket: Bucket) -> None:
        buffer = self._buffers[bucket.segment]
        self._backend.load_weights([(entry.name, entry.view(buffer)) for entry in bucket.entries])

    def on_handles(self, update: dict[str, Any]) -> None:
        start = time.perf_counter()
        self._backend.load_handles(update)
        self._load_s += time.perf_counter() - start
        self.reply(loaded=True)

    def on_finish(self, version: int, keep: list[int]) -> None:
        start = time.perf_counter()
        sums = self.finish_weights(keep)
        finish_s = time.perf_counter() - start
        self._version = version
        self.reply(version=version, sums=sums, load_s=self._load_s, finish_s=finish_s)

    def finish_weights(self, keep: Collection[int]) -> dict[str, int]:
        """Bit sums of the weights in use. Unmaps the segments that are not in `keep`."""
        sums = self._backend.finish_weights()
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in keep}
        return sums

    def on_generate(self, prompts: list[tuple[int, list[int]]], params: SamplingParams, seeds: list[int], version: int) -> None:
        if self._version != version:
            raise RuntimeError(f"request to sample from weights of version {version}, but this process has {self._version}")
        with closing(self._backend.generate(prompts, params, seeds)) as groups:
            for group in groups:
                if group is None:
                    self.alive()
                else:
                    self.reply(prompt=group[0], samples=group[1])
                if self._channel.poll():
                    op, _ = self._channel.recv()
                    self._over = op == "close"
                    if op not in ("abort", "close"):
                        raise RuntimeError(f"request {op!r} during sampling: only 'abort' is possible")
                    break
        self.reply(done=True)

    def on_abort(self) -> None:
        """An abort that arrives after its request has ended; ignored."""

    def on_sleep(self) -> None:
        self._version = None
        self._backend.sleep()
        self.reply(asleep=True)

    def on_wake(self, tags: list[str] | None) -> None:
        self._backend.wake(tags)
        self.reply(awake=True)


def serve(backend: Backend, argv: Sequence[str], server: type[Server] = Server) -> None:
    """Serve the parent, whose sockets are the last two arguments. Ends this process when the parent has ended."""
    channel, descriptors = Connection(int(argv[-2])), socket.socket(fileno=int(argv[-1]))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    end_with_trainer()
    loop = server(channel, descriptors, backend)
    loop.run()
    loop.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skips the destructors of the inference engine, which the parent would have to wait for
