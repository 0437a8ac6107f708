"""vLLM split over several devices, in processes of its own: `python -m srpo.rollout.vllm.shards SOCKET SOCKET`.

`srpo.rollout.vllm.engine` starts it if rollout.vllm.tensor_parallel_size is above 1. This process runs vLLM's scheduler. Each
device has a worker process of vLLM (`shard_worker`), which maps the trainer's shared memory, or opens the CUDA handle of its own
GPU, and loads its shard. After a sync the bit sums of all shards are added up.
"""

from __future__ import annotations

from srpo.rollout.vllm.orphan import end_with_trainer

if __name__ == "__main__":
    end_with_trainer()  # before the imports, which take seconds

import os
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from srpo.rollout.vllm.reload import STALE
from srpo.rollout.vllm.server import Server, serve
from srpo.rollout.vllm.worker import VllmBackend
from srpo.rollout.weights.buckets import Bucket, add_sums, differing_groups

WORKER_EXTENSION = "srpo.rollout.vllm.shard_worker.ShardWorker"
DIFFERS = " (differs between shards)"


def repeated(places: Sequence[Mapping[str, int | None]]) -> frozenset[str]:
    """Parameters that every shard holds in full: those whose place sums are the same on all shards."""
    return frozenset(name for name in places[0] if len({shard.get(name) for shard in places}) == 1)


def add_shards(shards: Sequence[Mapping[str, int]], replicated: Collection[str]) -> dict[str, int]:
    """Bit sum of each group of the model, from the bit sums of each shard's parameters.

    replicated: parameters that every shard holds in full; they count once. If they differ between shards, or if a kernel is
    outdated, the result has a name that the trainer does not have, so the sums do not compare as equal.
    """
    sums: dict[str, int] = {}
    for name in {name: None for shard in shards for name in shard}:
        values = [shard[name] for shard in shards if name in shard]
        if name.endswith(STALE):
            sums[name] = values[0]
        elif name not in replicated:
            add_sums(sums, [(name, value) for value in values])
        elif len(values) == len(shards) and len(set(values)) == 1:
            add_sums(sums, [(name, values[0])])
        else:
            sums[name + DIFFERS] = values[-1]
    return sums


class ShardsBackend(VllmBackend):
    """See `srpo.rollout.vllm.server.Backend`. Weights arrive through `map_segment` and `load_bucket`, or as CUDA handles."""

    def __init__(self) -> None:
        super().__init__()
        self._replicated: frozenset[str] = frozenset()

    def _each(self, method: str, *args: Any) -> list[Any]:
        """Call a method on every worker; returns their results in order of rank."""
        return self._llm.llm_engine.collective_rpc(method, args=args)

    def start(self, settings: dict[str, Any]) -> dict[str, Any]:
        """settings: those of `VllmBackend.start` and tensor_parallel_size.

        Raises RuntimeError if the bit sums of the shards do not add up to those of the checkpoint.
        """
        size = settings["tensor_parallel_size"]
        options = {"tensor_parallel_size": size, "worker_extension_cls": WORKER_EXTENSION, "distributed_executor_backend": "mp"}
        config = self._open(settings, **options)
        shards = self._each("srpo_prove")
        self._replicated = repeated([shard["places"] for shard in shards])
        sums = add_shards([shard["sums"] for shard in shards], self._replicated)
        # A checkpoint may hold tensors that the model does not read, such as a tied head.
        wrong = differing_groups({group: value for group, value in shards[0]["checkpoint"].items() if group in sums}, sums)
        if wrong:
            raise RuntimeError(
                f"the shards of {len(wrong)} groups of weights, first {wrong[0]}, do not add up to the checkpoint: this vLLM "
                "splits the model in a way that weight syncs cannot verify. Set rollout.vllm.tensor_parallel_size to 1"
            )
        if self._native:
            self._open_transfer(*self._each("srpo_transfer_fields")[0])
        self._llm.reset_prefix_cache()
        return {
            "max_context": config.model_config.max_model_len,
            "loads": f"vLLM is split over {size} devices",
            "kv_cache_bytes": min(shard["kv_cache_bytes"] for shard in shards),
            "other_dtypes": shards[0]["other_dtypes"],
        }

    def begin_weights(self) -> None:
        if self._native:
            self._llm.start_weight_update()
        self._each("srpo_begin", self._native)

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        raise AssertionError("the workers read shared memory by themselves")

    def map_segment(self, key: int, path: str) -> None:
        """Make every worker map a segment that this process holds open."""
        self._each("srpo_map", key, path)

    def load_bucket(self, bucket: Bucket) -> None:
        """Make every worker load its shards of a bucket's tensors."""
        self._each("srpo_load", bucket)

    def close(self) -> None:
        """End the workers, and remove the shared memory that they exchange messages through."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()

    def finish_weights(self, keep: Collection[int] = ()) -> dict[str, int]:
        if self._native:
            self._llm.finish_weight_update()
        shards = self._each("srpo_finish", self._native, list(keep))
        self._llm.reset_prefix_cache()  # keys and values of the old weights
        return add_shards(shards, self._replicated)


class ShardsServer(Server):
    """Passes the trainer's shared memory on to the workers, as paths below /proc of this process."""

    def __init__(self, channel: Any, descriptors: socket.socket, backend: ShardsBackend) -> None:
        super().__init__(channel, descriptors, backend)
        self._shards = backend

    def close(self) -> None:
        self._shards.close()

    def map_segment(self, key: int, fd: int) -> None:
        self._shards.map_segment(key, f"/proc/{os.getpid()}/fd/{fd}")

    def load_bucket(self, bucket: Bucket) -> None:
        self._shards.load_bucket(bucket)

    def finish_weights(self, keep: Collection[int]) -> dict[str, int]:
        return self._shards.finish_weights(keep)


if __name__ == "__main__":
    serve(ShardsBackend(), sys.argv, ShardsServer)
