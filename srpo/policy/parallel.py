"""Processes and sharding: FSDP2 under torchrun, gloo on CPUs and nccl on GPUs. One process without torchrun runs the same code.

Gradients are *summed* over ranks. `Batch.weights` already carries the denominators of the whole optimizer step, so FSDP's
averaging is off (`set_gradient_divide_factor(1)` with plain sum reductions, which gloo supports too).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from srpo.core.errors import UserError
from srpo.policy.bf16_copies import compute_in_bf16

X = TypeVar("X")
Module = TypeVar("Module", bound=nn.Module)
_NORM_CHUNK = 1 << 20  # elements of a gradient that are held in fp64 at a time
LAST_TENSORS = 0.2  # seconds for gloo's threads to release their last tensors


@dataclass(frozen=True)
class Parallel:
    """This process among all processes of a run. Every collective is a no-op in a run of one process."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this host
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, policy: Module, *, dtype: str = "float32") -> Module:
        """The policy on this process's device, its parameters sharded over all ranks (FSDP2), one unit per decoder layer.

        Master weights keep their dtype; with `bfloat16` forward and backward run in bf16 and gradients are reduced in fp32.
        In a run of one process in fp32 the policy is not wrapped, and in bf16 on a CPU it is not sharded (`bf16_copies`). In a
        larger run all shards come from rank 0's weights, and the policies of the other ranks may be on the meta device
        (`srpo.policy.loading`): such a rank holds its shards and at most one whole parameter at a time. Collective.
        """
        if self.world_size > 1 or (dtype != "float32" and self.device.type != "cpu"):
            return self.fully_shard(policy, dtype)
        policy = policy.to(self.device)
        if dtype == "bfloat16":
            compute_in_bf16(policy, decoder_layers(policy))
        return policy

    def fully_shard(self, policy: Module, dtype: str) -> Module:
        """`shard` by FSDP2, whatever the number of processes."""
        if not dist.is_initialized():  # mixed precision needs FSDP, even for one process
            dist.init_process_group(_backend(self.device), store=dist.HashStore(), rank=0, world_size=1)
        full_params = {name: p.detach() for name, p in policy.named_parameters()} if self.is_main and self.world_size > 1 else {}
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        precision = MixedPrecisionPolicy()
        if dtype == "bfloat16":
            precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for unit in (*decoder_layers(policy), policy):
            # The root is resharded after its forward, too, so that later readers of parameters see the master weights.
            fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        policy._apply(lambda t: torch.empty_like(t, device=self.device) if t.is_meta else t.to(self.device))
        if self.world_size > 1:
            for name, param in policy.named_parameters():
                self._fill(param, full_params.pop(name, None))  # pop: each whole tensor is freed once it is sharded
        return policy

    @torch.no_grad()
    def _fill(self, param: nn.Parameter, full: torch.Tensor | None) -> None:
        """Write a whole parameter, which only rank 0 passes, into the shards of all ranks."""
        empty = {"dtype": param.dtype, "device": self.device}
        full = torch.empty(param.shape, **empty) if full is None else full.to(self.device)
        dist.broadcast(full, src=0)
        for shard in full.chunk(self.world_size)[self.rank : self.rank + 1]:  # few rows: none for the last ranks
            to_local(param).copy_(shard)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all ranks, a new tensor on the same device."""
        return self._all_reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum of a tensor over all ranks, a new tensor on the same device."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX)

    def _all_reduce(self, tensor: torch.Tensor, op: Any) -> torch.Tensor:
        tensor = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def all_gather_object(self, x: X) -> list[X]:
        """The picklable `x` of every rank, in order of rank."""
        if self.world_size == 1:
            return [x]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, x)
        return gathered

    def broadcast_object(self, x: X) -> X:
        """Rank 0's picklable `x`."""
        box = [x]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], X]) -> X:
        """The picklable result of `work()`, which rank 0 calls. Its UserError or OSError is raised on all ranks. Collective."""
        result: X | None = None
        problem: UserError | OSError | None = None
        if self.is_main:
            try:
                result = work()
            except (UserError, OSError) as error:
                problem = error
        result, problem = self.broadcast_object((result, problem))
        if problem is not None:
            raise problem
        return cast(X, result)

    def barrier(self) -> None:
        """Return once every rank has called it."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group.

        FSDP's device mesh outlives the group and keeps gloo's threads alive. A gloo thread that releases its last tensor while
        the interpreter shuts down aborts the finished process (Python before 3.14). torch cannot wait for these threads, so
        `close` sleeps LAST_TENSORS seconds.
        """
        if dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(LAST_TENSORS)


def init_parallel() -> Parallel:
    """This process as torchrun's environment variables describe it; without torchrun, one process and no process group."""
    world_size, rank, local_rank = (int(os.environ.get(k, v)) for k, v in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group(_backend(device), device_id=device if device.type == "cuda" else None)
    return Parallel(rank, world_size, local_rank, device)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def unwrap(policy: nn.Module) -> PreTrainedModel:
    """The transformers model in a `Policy`; a transformers model itself unchanged."""
    return next(module for module in policy.modules() if isinstance(module, PreTrainedModel))


def decoder_layers(policy: nn.Module) -> list[nn.Module]:
    """The decoder layers: the modules listed in transformers' `_no_split_modules`. Raises UserError if the model lists none."""
    model = unwrap(policy)
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"{type(model).__name__} lists no decoder layers in _no_split_modules: set policy.path to another model")
    return layers


def current_rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def iter_full_params(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, whole tensor) of each of `named_stored`, one at a time, the same on all ranks.

    Collective for a sharded model: every rank must iterate to the end. The tensors of an unsharded model are the parameters' own
    memory: copy a tensor that must outlive the next update.
    """
    for name, tensor in named_stored(unwrap(model)):
        yield name, whole(tensor)


def named_stored(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything that a checkpoint of the model holds: its parameters, tied ones once, and then its persistent
    buffers, such as the biases by which the routers of DeepSeek-V3 and GLM-4.5 choose experts."""
    yield from model.named_parameters()
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter without gradient, gathered if it is sharded; collective then."""
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_grad_norm(policy: nn.Module, max_norm: float, parallel: Parallel) -> float:
    """L2 norm of the whole gradient before clipping; a larger norm than `max_norm` is scaled down to it (0: no clipping).

    Squares are summed in fp64: on CPUs a sum in fp32 is off by 2 % at 1e8 elements. If the norm is not finite, the gradients stay
    as they are.
    """
    grads = [to_local(p.grad) for p in policy.parameters() if p.grad is not None]
    chunks = [chunk for grad in grads for chunk in grad.reshape(-1).split(_NORM_CHUNK)]
    norms = [torch.linalg.vector_norm(chunk, dtype=torch.float64) for chunk in chunks]
    squares = torch.stack([torch.zeros((), dtype=torch.float64, device=parallel.device), *norms]).square().sum()
    norm = float(parallel.all_reduce_sum(squares).sqrt())
    if 0 < max_norm < norm < float("inf"):
        torch._foreach_mul_(grads, max_norm / norm)
    return norm


def distributed(work: Callable[[X, Parallel], object]) -> Callable[[X], None]:
    """The `main` of a program: joins the ranks of torchrun, runs `work(settings, parallel)`, leaves them."""

    def main(settings: X) -> None:
        parallel = init_parallel()
        try:
            work(settings, parallel)
        finally:
            parallel.close()

    return main
