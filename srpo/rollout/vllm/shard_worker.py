"""One device of a vLLM that is split over several: loads its shard of the weights and proves that its kernels use it.

vLLM's worker processes import this module before they load the model, and add the methods of `ShardWorker` to their worker
(`worker_extension_cls`). No other module imports it, because it needs vLLM.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from typing import Any

import torch
from vllm.model_executor.model_loader import get_model_loader
from vllm.platforms import current_platform

from srpo.rollout.vllm.older_versions import import_ipc_engine
from srpo.rollout.vllm.orphan import end_with_trainer
from srpo.rollout.vllm.reload import KernelWatch, Reloader
from srpo.rollout.vllm.worker import kv_cache_bytes
from srpo.rollout.weights.buckets import Bucket, add_sums, bit_sum
from srpo.rollout.weights.shared_memory import map_segment

end_with_trainer()
if not current_platform.is_cpu():
    import_ipc_engine()
WATCH = KernelWatch()  # must exist before the model is loaded


class ShardWorker:
    """Methods added to vLLM's worker. vLLM's loaders cut this worker's shard out of every tensor."""

    def srpo_prove(self) -> dict[str, Any]:
        """Run `Reloader.prove`. Returns bit sum and place sum of each parameter, from the first worker the bit sum of each group
        of the checkpoint, and the facts of this shard that `VllmBackend.start` returns of the whole."""
        worker: Any = self
        self._srpo_reloader = Reloader(worker, WATCH)
        self._srpo_segments: dict[int, torch.Tensor] = {}
        config = worker.vllm_config
        loader: Any = get_model_loader(config.load_config)

        def checkpoint() -> Any:
            return loader.get_all_weights(config.model_config, self._srpo_reloader.model)

        self._srpo_reloader.prove(checkpoint, direct=False)
        expected: dict[str, int] = {}
        if worker.rank == 0:
            dtype = config.model_config.dtype
            add_sums(expected, ((name, bit_sum(t.to(dtype) if t.is_floating_point() else t)) for name, t in checkpoint()))
        return {
            "sums": self._srpo_reloader.parameter_sums(),
            "places": self._srpo_reloader.places(),
            "checkpoint": expected,
            "kv_cache_bytes": kv_cache_bytes(worker),
            "other_dtypes": self._srpo_reloader.of_other_dtype(config.model_config.dtype),
        }

    def srpo_transfer_fields(self) -> tuple[list[str], list[str]]:
        """Names of the fields that vLLM's weight transfer takes at initialization, and with each update."""
        transfer = getattr(self, "weight_transfer_engine")  # noqa: B009
        kinds = transfer.init_info_cls, transfer.update_info_cls
        at_init, at_update = ([field.name for field in dataclasses.fields(kind)] for kind in kinds)
        return at_init, at_update

    def srpo_map(self, key: int, path: str) -> None:
        """Map a segment of shared memory. path: its descriptor, below /proc of another process of this user."""
        fd = os.open(path, os.O_RDWR)
        try:
            self._srpo_segments[key] = map_segment(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def srpo_begin(self, native: bool) -> None:
        self._srpo_reloader.begin(native=native)

    def srpo_load(self, bucket: Bucket) -> None:
        buffer = self._srpo_segments[bucket.segment]
        self._srpo_reloader.load([(entry.name, entry.view(buffer)) for entry in bucket.entries])

    def srpo_finish(self, native: bool, keep: Collection[int]) -> dict[str, int]:
        """Bit sum of each parameter in use. Unmaps the segments that are not in `keep`."""
        self._srpo_reloader.finish(native=native)
        self._srpo_segments = {key: buffer for key, buffer in self._srpo_segments.items() if key in keep}
        return self._srpo_reloader.parameter_sums()
