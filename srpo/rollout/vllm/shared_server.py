"""One vLLM for several ranks of a host, on the rank that owns it: requests that arrive at about the same time are merged."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from srpo.core.errors import UserError
from srpo.rollout.engine import SamplingParams
from srpo.rollout.vllm.engine import VllmEngine
from srpo.rollout.vllm.process import EngineError

GATHER_S = 0.2  # ranks leave a weight sync together: wait this long for the others' requests before serving the first alone


@dataclass(eq=False)
class Request:
    """A pending request of one rank. how: sampling parameters, seed and weight version; requests with equal `how` are merged."""

    channel: Connection
    prompts: list[list[int]]
    numbers: list[int]
    how: dict[str, Any]


class SharedServer:
    """Serves the ranks behind `channels` from `engine`, on a thread, until all of them have disconnected.

    Messages are JSON in both directions: nothing is unpickled. A rank sends one request at a time, with the fields of `Request`,
    and receives {"prompt": index, "samples": rows} as groups finish, then {"done"} or {"error"}. It sends `null` to give up the
    rest. A rank that does not read its replies blocks the others.
    """

    def __init__(self, engine: VllmEngine, channels: Sequence[Connection]) -> None:
        self.engine = engine
        self._channels = list(channels)
        self._requests: list[Request] = []
        self.busy = threading.Lock()  # held while the engine samples; take it for any other use of the engine
        self._thread = threading.Thread(target=self._run, name="shared vllm", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until every rank has disconnected."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._channels:
                self._listen(0 if self._requests else None)
                until = time.monotonic() + GATHER_S
                while 0 < len(self._requests) < len(self._channels) and time.monotonic() < until:
                    self._listen(until - time.monotonic())
                if self._requests:
                    with self.busy:
                        self._serve([request for request in self._requests if request.how == self._requests[0].how])
        finally:  # also if a bug ends this thread with a traceback: no rank waits for a reply then
            for channel in self._channels:
                channel.close()

    def _listen(self, timeout_s: float | None) -> None:
        """Read the messages that have arrived; waits at most `timeout_s` for the first one (None: without limit)."""
        for channel in wait(self._channels, timeout_s):
            assert isinstance(channel, Connection)
            try:
                message = json.loads(channel.recv_bytes())
            except (EOFError, OSError):
                self._drop(channel)
                continue
            if message is None:
                self._end([request for request in self._requests if request.channel is channel], done=True)
            else:
                self._requests.append(Request(channel, **message))

    def _drop(self, channel: Connection) -> None:
        """Forget a rank that has disconnected."""
        self._requests = [request for request in self._requests if request.channel is not channel]
        if channel in self._channels:
            self._channels.remove(channel)
            channel.close()

    def _end(self, requests: Sequence[Request], **outcome: Any) -> None:
        """Send `outcome` as the last reply to those of `requests` that are still pending."""
        for request in requests:
            if request in self._requests:
                self._requests.remove(request)
                self._send(request, outcome)

    def _send(self, request: Request, message: dict[str, Any]) -> None:
        try:
            request.channel.send_bytes(json.dumps(message).encode())
        except OSError:
            self._drop(request.channel)

    def _serve(self, batch: Sequence[Request]) -> None:
        """Sample these requests as one, until all groups have come or no rank wants the rest."""
        try:
            self._sample(batch)
        except (UserError, RuntimeError, OSError) as error:  # all errors of an engine
            self._end(batch, error=str(error))
        self._end(batch, done=True)

    def _sample(self, batch: Sequence[Request]) -> None:
        how, version = batch[0].how, self.engine.policy_version
        if how["version"] != version:
            raise EngineError(f"request to sample from weights of version {how['version']}, the shared vLLM has {version}")
        params = SamplingParams(**{**how["params"], "stop_ids": tuple(how["params"]["stop_ids"])})
        owners = [(request, i) for request in batch for i in range(len(request.prompts))]
        prompts = [tuple(request.prompts[i]) for request, i in owners]
        numbers = [request.numbers[i] for request, i in owners]
        with closing(self.engine.replies(prompts, params, how["seed"], numbers)) as replies:
            for group in replies:
                if group is not None:
                    request, i = owners[group[0]]
                    if request in self._requests:
                        self._send(request, {"prompt": i, "samples": group[1]})
                self._listen(0)
                if not any(request in self._requests for request in batch):
                    return
