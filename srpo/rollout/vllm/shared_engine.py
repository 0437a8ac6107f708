"""One vLLM for several ranks of a host (rollout.vllm.tensor_parallel_size): the first of them has it, all of them ask that one.

Sampling takes no collective, so that a rank may sample from a thread of its own, and none or more often than the others. A weight
sync is collective, as it is with an engine for each rank.
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
from srpo.rollout.weights.cuda_ipc import CudaSender, Exchange


class SharedEngine:
    """What one rank has of the vLLM that it shares; see `Engine`.

    channel: to the `SharedServer`, which the rank that has the vLLM also has as `server`. exchange: among the ranks that share.
    sender: on a GPU, another rank's part of a weight sync.
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
        """See `Engine.stream`. Sampled with the other ranks' prompts, and stopped where none of them wants the rest.

        Raises EngineError with what the engine raises, and where its rank has ended.
        """
        check_prompts(prompts, params, self.max_context)
        how = {"params": asdict(params), "seed": seed, "version": self.policy_version}
        numbers = list(range(len(prompts)) if numbers is None else numbers)
        return samples_of(self._replies(prompts=prompts, numbers=numbers, how=how), self.policy_version, self._stats)

    def _replies(self, **request: Any) -> Replies:
        self._say(request)
        try:
            while "done" not in (reply := self._hear()):
                yield reply["prompt"], reply["samples"]
        except EngineError:
            raise
        except GeneratorExit:
            with suppress(EngineError):  # what nobody wants may fail
                self._say(None)
                while "done" not in self._hear():
                    pass
            raise
        except BaseException:  # what else comes would be taken for the next request's
            self._channel.close()
            raise

    def _say(self, message: dict[str, Any] | None) -> None:
        try:
            self._channel.send_bytes(json.dumps(message).encode())
        except OSError as error:
            raise self._ended() from error

    def _hear(self) -> dict[str, Any]:
        try:
            reply = json.loads(self._channel.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if "error" in reply:
            raise EngineError(reply["error"])
        return reply

    def _ended(self) -> EngineError:
        return EngineError("the rank that has the vLLM which this one shares has ended: see that rank's errors")

    def sync_weights(self, policy: nn.Module, version: int) -> None:
        """See `Engine.sync_weights`. It begins when all ranks have come, with all their samples, and ends when the engine's proof
        is there: where that fails it fails on all of them."""
        start = time.perf_counter()
        if set(versions := self._exchange(version)) != {version}:
            raise EngineError(f"the ranks that share a vLLM sync different versions of the weights: {versions}")
        problem = ""
        try:
            self._sync(policy, version)
        except EngineError as error:
            problem = str(error)
        problems = [said for said in self._exchange(problem) if said]
        if problems:
            raise EngineError(problem or problems[0])
        self.policy_version = version
        self._stats["sync_s"] = time.perf_counter() - start

    def _sync(self, policy: nn.Module, version: int) -> None:
        """This rank's part."""
        if self._server is not None:
            with self._server.busy:  # it may not have ended what nobody waits for
                self._server.engine.sync_weights(policy, version)
        elif self._sender is not None:
            self._sender.send(None, policy, version)
        else:
            for _ in iter_checkpoint_blocks(policy, self._layouts):
                pass

    def sleep(self) -> None:
        """See `Engine.sleep`; after all ranks have their samples."""
        if self._server is not None:
            with self._server.busy:
                self._server.engine.sleep()

    def wake(self) -> None:
        """Nothing, see `VllmEngine.wake`."""

    def stats(self) -> dict[str, float]:
        """As `VllmEngine.stats`: num_tokens, generate_s and tokens_per_s of this rank's samples; what only the engine knows is 0
        on the ranks that do not have it."""
        return dict.fromkeys(STATS, 0.0) | (self._server.engine.stats() if self._server is not None else {}) | self._stats

    def close(self) -> None:
        """Hang up. On the rank that has the engine it returns when the others have, who may still sample."""
        self._channel.close()
        if self._server is not None:
            self._server.join()
            self._server.engine.close()
