"""One vLLM for several ranks of a host (rollout.vllm.tensor_parallel_size), as each rank sees it: the first owns the vLLM, and
all send their requests to it.

Sampling needs no collective, so a rank may sample from a thread of its own, and more or less often than the others. A weight sync
is collective, as it is when each rank has its own engine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from torch import nn

from srpo.policy.checkpoint_names import Layouts, iter_checkpoint_blocks
from srpo.rollout.engine import Groups, Sample, SamplingParams, check_prompts, in_order
from srpo.rollout.vllm.client import Replies, samples_of
from srpo.rollout.vllm.engine import STATS
from srpo.rollout.vllm.process import EngineError
from srpo.rollout.vllm.shared_server import SharedServer
from srpo.rollout.vllm.trainer_memory import give_back_cache
from srpo.rollout.weights.cuda_ipc import CudaSender, Exchange, OwnerFailed


class SharedEngine:
    """One rank's `Engine` on a vLLM that it shares.

    channel: connection to the `SharedServer`. server: that server itself, on the rank that owns the vLLM. exchange: collective of
    the ranks that share. sender: on a GPU, sends the weights of a rank that does not own the vLLM.
    """

    def __init__(
        self,
        channel: Connection,
        max_context: int,
        exchange: Exchange,
        *,
        sender: CudaSender | None = None,
        server: SharedServer | None = None,
    ) -> None:
        self._channel, self.max_context, self._exchange = channel, max_context, exchange
        self._sender, self._server = sender, server
        self._layouts: Layouts = {}
        self._stats: dict[str, float] = {}
        self.policy_version = -1

    def generate(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int] | None = None
    ) -> list[Sample]:
        """See `Engine.generate`."""
        return in_order(self.stream(prompts, params, seed, numbers))

    def stream(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int] | None = None
    ) -> Groups:
        """See `Engine.stream`. Prompts are sampled together with other ranks' prompts, until no rank wants further groups.

        Raises EngineError with the engine's own error, or if the rank that owns the vLLM has ended.
        """
        check_prompts(prompts, params, self.max_context)
        how = {"params": asdict(params), "seed": seed, "version": self.policy_version}
        numbers = list(range(len(prompts)) if numbers is None else numbers)
        return samples_of(self._replies(prompts=prompts, numbers=numbers, how=how), self.policy_version, self._stats)

    def _replies(self, **request: Any) -> Replies:
        self._send(request)
        try:
            while "done" not in (reply := self._receive()):
                yield reply["prompt"], reply["samples"]
        except EngineError:
            raise
        except GeneratorExit:
            with suppress(EngineError):  # a failure of the abandoned rest does not matter
                self._send(None)
                while "done" not in self._receive():
                    pass
            raise
        except BaseException:  # late replies would be read as answers to the next request
            self._channel.close()
            raise

    def _send(self, message: dict[str, Any] | None) -> None:
        try:
            self._channel.send_bytes(json.dumps(message).encode())
        except OSError as error:
            raise self._owner_ended() from error

    def _receive(self) -> dict[str, Any]:
        try:
            reply = json.loads(self._channel.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._owner_ended() from error
        if "error" in reply:
            raise EngineError(reply["error"])
        return reply

    def _owner_ended(self) -> EngineError:
        return EngineError("the rank that owns the vLLM shared by this rank has ended: see that rank's errors")

    def sync_weights(self, policy: nn.Module, version: int) -> None:
        """See `Engine.sync_weights`. Starts once all ranks call it, which they do after receiving their samples, and returns once
        the engine's bit sums are verified. A failure raises EngineError on all ranks."""
        start = time.perf_counter()
        if self._sender is not None:  # the rank that owns the engine wakes it on this rank's GPU, too
            give_back_cache(self._sender.device)
        if set(versions := self._exchange(version)) != {version}:
            raise EngineError(f"ranks that share a vLLM called sync_weights with different versions of the weights: {versions}")
        problem = ""
        try:
            self._sync(policy, version)
        except OwnerFailed:  # the owner has exchanged its problem in place of its memory's handle
            raise
        except EngineError as error:
            problem = str(error)
        problems = [message for message in self._exchange(problem) if message]
        if problems:
            raise EngineError(problem or problems[0])
        self.policy_version = version
        self._stats["sync_s"] = time.perf_counter() - start

    def _sync(self, policy: nn.Module, version: int) -> None:
        """This rank's part of a weight sync."""
        if self._server is not None:
            with self._server.busy:  # the server may still be stopping an abandoned request
                self._server.engine.sync_weights(policy, version)
        elif self._sender is not None:
            self._sender.send(None, policy, version)
            self._sender.release()
        else:
            for _ in iter_checkpoint_blocks(policy, self._layouts):
                pass  # takes part in gathering a sharded policy

    def sleep(self) -> None:
        """See `Engine.sleep`. Call it after all ranks have received their samples."""
        if self._server is not None:
            with self._server.busy:
                self._server.engine.sleep()

    def stats(self) -> dict[str, float]:
        """As `VllmEngine.stats`; num_tokens, generate_s and tokens_per_s are those of this rank's samples. Values that only the
        engine measures are 0 on ranks that do not own it."""
        return dict.fromkeys(STATS, 0.0) | (self._server.engine.stats() if self._server is not None else {}) | self._stats

    def close(self) -> None:
        """Disconnect. The rank that owns the engine waits until all others have disconnected; they may still be sampling."""
        self._channel.close()
        if self._server is not None:
            self._server.join()
            self._server.engine.close()
