"""Sends weights to an engine on the same GPU: one CUDA IPC handle per bucket, in the wire format of vLLM's `ipc` weight transfer.

The engine's process maps the staging buffer (no copy through the host), reads the bucket and replies; only then is the next one
packed. vLLM 0.26 to 0.33 share this wire format, but not their trainer-side helpers, so the payload is built here.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import reduce_tensor

from srpo.core.errors import UserError
from srpo.policy.checkpoint_names import iter_checkpoint_params
from srpo.rollout.vllm.process import EngineError, EngineProcess
from srpo.rollout.weights.buckets import add_sums, bit_sum

# One bucket: (checkpoint names, their tensors in the engine's dtype).
Named = list[tuple[str, torch.Tensor]]
# Collective of the ranks of one engine: takes this rank's value, returns the values of all in order of rank.
Exchange = Callable[[Any], list[Any]]


def iter_buckets(params: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, bucket_bytes: int) -> Iterator[Named]:
    """Buckets of consecutive tensors: as many as fit into `bucket_bytes` without gaps; a larger tensor comes alone."""
    bucket: Named = []
    filled = 0
    for name, tensor in params:
        tensor = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        if bucket and filled + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, tensor.contiguous()))
        filled += tensor.nbytes
    if bucket:
        yield bucket


def describe(bucket: Named) -> dict[str, Any]:
    """The fields that vLLM's wire format has for a bucket, except its handle."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "tensor_sizes": [tensor.nbytes for _, tensor in bucket],
    }


class CudaSender:
    """Sends a policy's weights to an engine's process on `device`. If the process fails during a sync, the run ends.

    exchange: the collective of the ranks, if the engine is split over their GPUs. Each of its workers reads the staging buffer of
    the rank on its own GPU, so all these ranks call `send`: the first with the process, the others with None.
    Raises UserError if torch's allocator is set to use memory that has no IPC handles.
    """

    def __init__(self, bucket_bytes: int, dtype: torch.dtype, device: torch.device, exchange: Exchange | None = None) -> None:
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            if "expandable_segments:true" in os.environ.get(name, "").lower():
                raise UserError(f"{name} has expandable_segments:True, whose memory cannot be shared with vLLM: remove it")
        self._bucket_bytes = bucket_bytes
        self._dtype = dtype
        self._device = device
        self._exchange: Exchange = exchange or (lambda x: [x])
        self._policy: weakref.ref[nn.Module] | None = None
        self._sums: dict[str, int] = {}
        self.num_bytes = 0

    def send(self, process: EngineProcess | None, policy: nn.Module, version: int) -> dict[str, int]:
        """Send all weights, request the engine's bit sums (the caller reads the reply), and return the sums they must equal.
        Collective for a sharded policy: every rank sends to its own engine."""
        self._policy = weakref.ref(policy)
        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        sums: dict[str, int] = {}
        self.num_bytes = 0
        if process is not None:
            process.send("begin")
        for bucket in iter_buckets(iter_checkpoint_params(policy), self._dtype, self._bucket_bytes):
            # The handle's arguments do not keep the memory alive; `staging` does, until the engine has replied. Each buffer is
            # exported once and opened once: memory of an export that is opened twice is never freed.
            staging = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in bucket])
            _, arguments = reduce_tensor(staging)
            add_sums(sums, [(name, bit_sum(tensor)) for name, tensor in bucket])
            torch.cuda.synchronize(self._device)
            handles = {gpu: handle for shared in self._exchange({uuid: arguments}) for gpu, handle in shared.items()}
            problem = None
            if process is not None:
                try:
                    process.send("handles", update={**describe(bucket), "ipc_handles": handles})
                    process.receive()
                except EngineError as error:
                    problem = error
            for error in self._exchange(problem):  # now every worker has read its rank's staging buffer
                if error is not None:
                    raise error
            self.num_bytes += staging.nbytes
            del staging
        torch.cuda.ipc_collect()
        if process is not None:
            process.send("finish", version=version, keep=[])
        self._sums = sums
        return sums

    def send_again(self, process: EngineProcess, version: int) -> dict[str, int]:
        """Send a new process the weights of the last `send`.

        Raises EngineError if the policy is sharded (the other ranks do not take part) or has been updated since.
        """
        policy = self._policy() if self._policy is not None else None
        if policy is None or any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
            raise EngineError("the engine failed, and a sharded policy cannot send its weights again: resume from the checkpoint")
        before = self._sums
        sums = self.send(process, policy, version)
        if sums != before:
            raise EngineError("the engine failed after the policy was updated: resume from the last checkpoint")
        return sums
