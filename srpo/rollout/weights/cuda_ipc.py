"""Weights to an engine on the same GPU: handles of one staging buffer, in the wire format of vLLM's `ipc` weight transfer.

The engine's process maps the buffer (no copy through the host), reads a bucket and answers; only then is the next one packed into
it. Alike in vLLM 0.26 to 0.33; their trainer-side helpers are not, so the payload is made here.
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

from srpo.policy.checkpoint_names import iter_checkpoint_params
from srpo.rollout.vllm.process import EngineError, EngineProcess
from srpo.rollout.weights.buckets import add_sums, bit_sum

# One bucket: (checkpoint names, their tensors in the engine's dtype).
Named = list[tuple[str, torch.Tensor]]
# Of the ranks of one engine: this rank's value in, those of all of them out, in order of rank. Collective.
Exchange = Callable[[Any], list[Any]]


def chunks(params: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, bucket_bytes: int) -> Iterator[Named]:
    """Tensors one behind the other, without gaps, as many as fit into `bucket_bytes`; a larger one comes alone."""
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
    """A bucket in vLLM's words, without its handle."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "tensor_sizes": [tensor.nbytes for _, tensor in bucket],
    }


class CudaSender:
    """Sends a policy's weights to an engine's process on `device`. A process that fails meanwhile ends the run.

    exchange: where an engine is split over the GPUs of several ranks, what they tell one another. Each of its workers reads the
    staging buffer of the rank on its own GPU, so all of these ranks `send`, the first one to the process and the others to None.
    Raises ValueError where torch's allocator makes memory that has no handles.
    """

    def __init__(self, bucket_bytes: int, dtype: torch.dtype, device: torch.device, exchange: Exchange | None = None) -> None:
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            if "expandable_segments:true" in os.environ.get(name, "").lower():
                raise ValueError(f"{name} has expandable_segments:True, whose memory cannot be shared with vLLM: take it out")
        self._bucket_bytes = bucket_bytes
        self._dtype = dtype
        self._device = device
        self._exchange: Exchange = exchange or (lambda x: [x])
        self._policy: weakref.ref[nn.Module] | None = None
        self._sums: dict[str, int] = {}
        self.num_bytes = 0

    def send(self, process: EngineProcess | None, policy: nn.Module, version: int) -> dict[str, int]:
        """Send everything, ask for the proof (whose answer is left to the caller to read), and return the sums that it has to
        have. Collective for a sharded policy: every rank sends to its own engine."""
        self._policy = weakref.ref(policy)
        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        sums: dict[str, int] = {}
        self.num_bytes = 0
        if process is not None:
            process.send("begin")
        for bucket in chunks(iter_checkpoint_params(policy), self._dtype, self._bucket_bytes):
            # The handle's arguments do not keep the memory alive: `staging` does, until the engine has answered. Exported once
            # and opened once: an export that is opened twice is never given back.
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
        """Bring a new process to the weights of the last `send`.

        Raises EngineError where the policy is sharded (the other ranks do not take part) or has been updated since.
        """
        policy = self._policy() if self._policy is not None else None
        if policy is None or any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
            raise EngineError("the engine failed and a sharded policy cannot send its weights again: resume from the checkpoint")
        before = self._sums
        sums = self.send(process, policy, version)
        if sums != before:
            raise EngineError("the engine failed after the policy was updated: resume from the last checkpoint")
        return sums
