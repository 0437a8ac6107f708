"""Sends weights to an engine on the same GPU: one CUDA IPC handle per bucket, in the wire format of vLLM's `ipc` weight transfer.

The engine's process maps the staging buffer (no copy through the host), reads the bucket and replies; only then is the next one
written into the same buffer. Versions of vLLM share this wire format, but not their trainer-side helpers, so the payload is built
here.
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
from srpo.rollout.vllm.trainer_memory import give_back_cache
from srpo.rollout.weights.buckets import add_sums, bit_sums

# One bucket: (checkpoint names, their tensors in the engine's dtype).
Named = list[tuple[str, torch.Tensor]]
# Collective of the ranks of one engine: takes this rank's value, returns the values of all in order of rank.
Exchange = Callable[[Any], list[Any]]


@torch.no_grad()
def iter_buckets(
    params: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, bucket_bytes: int, device: torch.device
) -> Iterator[tuple[Named, torch.Tensor]]:
    """Yields (bucket, staging buffer [bytes] uint8 that its tensors are views of), without gaps from the buffer's start on.

    A bucket has as many consecutive tensors as fit into `bucket_bytes`; a larger tensor comes alone. The buffer is on `device`
    and holds one bucket at a time: the next step overwrites it, and only a tensor that is larger than it replaces it.
    """
    buffer = torch.empty(bucket_bytes, dtype=torch.uint8, device=device)
    bucket: Named = []
    filled = 0
    for name, tensor in params:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        num_bytes = tensor.numel() * kind.itemsize
        if bucket and (filled + num_bytes > bucket_bytes or filled % kind.itemsize):  # a view begins at a multiple of its items
            yield bucket, buffer
            bucket, filled = [], 0
        if num_bytes > buffer.numel():
            buffer = None  # frees it before the larger one is made
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        place = slice(filled, filled + num_bytes)
        bucket.append((name, buffer[place].view(kind).view(tensor.shape).copy_(tensor.detach())))
        filled += num_bytes
    if bucket:
        yield bucket, buffer


def describe(bucket: Named) -> dict[str, Any]:
    """The fields that vLLM's wire format has for a bucket, except its handle."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "tensor_sizes": [tensor.nbytes for _, tensor in bucket],
    }


class OwnerFailed(EngineError):
    """The rank with the engine's process has failed before it sent weights. All ranks know its error now."""


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
        self.device = device
        self._exchange: Exchange = exchange or (lambda x: [x])
        self._policy: weakref.ref[nn.Module] | None = None
        self._sums: dict[str, int] = {}
        self.num_bytes = 0

    def send(self, process: EngineProcess | None, policy: nn.Module, version: int) -> dict[str, int]:
        """Send all weights and return the bit sums that the engine's must equal. `release` has to follow, once the engine has
        ended the update. Collective for a sharded policy: every rank sends to its own engine.

        Raises EngineError if the process fails, OwnerFailed on the other ranks if it has failed before."""
        self._policy = weakref.ref(policy)
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        sums: dict[str, int] = {}
        self.num_bytes = 0
        if process is not None:
            process.send("begin")
        for bucket, staging in iter_buckets(iter_checkpoint_params(policy), self._dtype, self._bucket_bytes, self.device):
            # One buffer, exported anew for each bucket: torch counts how often an export is opened and closed, an engine may
            # close its mapping after each bucket (vLLM 0.26), and memory whose export was closed twice is never freed.
            _, arguments = reduce_tensor(staging)
            add_sums(sums, zip([name for name, _ in bucket], bit_sums([tensor for _, tensor in bucket]), strict=True))
            torch.cuda.synchronize(self.device)
            handles = {}
            for shared in self._exchange({uuid: arguments}):
                if not isinstance(shared, dict):
                    raise OwnerFailed(str(shared))
                handles |= shared
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
            self.num_bytes += sum(tensor.nbytes for _, tensor in bucket)
            del bucket, staging  # a larger buffer may take its place
        self._sums = sums
        return sums

    def release(self) -> None:
        """Free the staging buffer, and give the memory back that this process only caches. Call it after `send`, when the engine
        has ended the update, or failed: vLLM holds its last mapping until then. Collective like `send`: when it returns, all
        ranks have done so."""
        torch.cuda.ipc_collect()
        give_back_cache(self.device)
        self._exchange(None)

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
