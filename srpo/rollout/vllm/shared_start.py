"""Forms the groups of ranks that share a vLLM, starts it on the first rank of each group, and connects the others to it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from srpo.core.config.train import VllmConfig
from srpo.core.errors import UserError
from srpo.policy.parallel import Parallel
from srpo.rollout.vllm.engine import WORKER, VllmEngine
from srpo.rollout.vllm.process import EngineError
from srpo.rollout.vllm.settings import bucket_bytes, check_vllm_settings, visible_device
from srpo.rollout.vllm.shared_engine import SharedEngine
from srpo.rollout.vllm.shared_server import SharedServer
from srpo.rollout.weights.cuda_ipc import CudaSender, Exchange


def check_groups(hosts: Sequence[str], size: int) -> None:
    """Raise UserError unless the ranks form groups of `size` consecutive ranks on one host. hosts: the host of each rank."""
    for host, count in Counter(hosts).items():
        if count % size:
            raise UserError(
                f"rollout.vllm.tensor_parallel_size is {size}, and host {host} has {count} ranks: every {size} of them share one "
                f"vLLM. Set it to a divisor of {count}, or start a multiple of {size} ranks per host (torchrun --nproc-per-node)"
            )
    for first in range(0, len(hosts), size):
        if len(set(hosts[first : first + size])) > 1:
            raise UserError(
                f"rollout.vllm.tensor_parallel_size is {size}, so ranks {first} to {first + size - 1} share one vLLM, but run on "
                f"hosts {sorted(set(hosts[first : first + size]))}: start torchrun so that the ranks of a host are consecutive"
            )


def open_shared(
    path: str | Path,
    parallel: Parallel,
    *,
    dtype: torch.dtype,
    max_context: int,
    config: VllmConfig,
    command: Sequence[str] = WORKER,
    routing: bool = False,
) -> SharedEngine:
    """This rank's engine; `config.tensor_parallel_size` consecutive ranks share one vLLM. Arguments as for `VllmEngine`.

    Collective over all ranks of the run. Raises UserError on all ranks if they do not form such groups, and on all ranks of a
    group if its engine does not start.
    """
    check_vllm_settings(config)
    size = config.tensor_parallel_size
    facts = parallel.all_gather_object((socket.gethostname(), visible_device(parallel.device)))
    check_groups([host for host, _ in facts], size)
    exchange = _exchange(parallel, config)
    first = parallel.rank - parallel.rank % size
    started: VllmEngine | UserError | None = None
    if parallel.rank == first:
        devices = [device for _, device in facts[first : first + size] if device]
        open_engine = partial(VllmEngine, path, device=parallel.device, dtype=dtype, max_context=max_context, config=config)
        try:
            started = open_engine(command=command, devices=devices, exchange=exchange, routing=routing)
            started.check_formats()  # in a sync the other ranks would wait for this one
        except UserError as error:
            if isinstance(started, VllmEngine):
                started.close()
            started = error
    engine = started if isinstance(started, VllmEngine) else None
    outcome = str(started) if isinstance(started, Exception) else "", engine.max_context if engine else 0
    problem, context = exchange(outcome)[0]
    if isinstance(started, Exception):
        raise started
    if problem:
        raise EngineError(f"the vLLM of rank {first}, which rank {parallel.rank} shares, does not start: {problem}")
    channel, channels = _connect(exchange, size if engine else 0)
    if engine is not None:
        return SharedEngine(channel, context, exchange, server=SharedServer(engine, channels))
    on_gpu = parallel.device.type == "cuda"
    sender = CudaSender(bucket_bytes(config, parallel.device), dtype, parallel.device, exchange) if on_gpu else None
    return SharedEngine(channel, context, exchange, sender=sender)


def _exchange(parallel: Parallel, config: VllmConfig) -> Exchange:
    """The collective of this rank's group. It waits for twice `config.start_timeout_s`, so that an engine can start."""
    size, timeout = config.tensor_parallel_size, timedelta(seconds=2 * config.start_timeout_s)
    firsts = range(0, parallel.world_size, size)
    groups = [dist.new_group(list(range(first, first + size)), timeout=timeout, backend="gloo") for first in firsts]
    group = groups[parallel.rank // size]

    def exchange(x: Any) -> list[Any]:
        values: list[Any] = [None] * size
        try:
            dist.all_gather_object(values, x, group=group)
        except RuntimeError as error:
            raise EngineError(f"a rank that shares a vLLM with this rank has ended, see that rank's errors: {error}") from error
        return values

    return exchange


def _connect(exchange: Exchange, num_ranks: int) -> tuple[Connection, list[Connection]]:
    """(connection to the server; on the server's rank, its connections to all ranks of the group). The socket lies in a temporary
    folder that only this user may enter; it is removed once all are connected. num_ranks: 0 except on the server's rank."""
    with ExitStack() as stack:
        path, listener = "", None
        if num_ranks:
            folder = tempfile.TemporaryDirectory(prefix=f"srpo-{os.getpid()}-")  # mode 700
            path = os.path.join(stack.enter_context(folder), "vllm")
            listener = stack.enter_context(Listener(path, "AF_UNIX", backlog=num_ranks))
        path = exchange(path)[0]
        try:
            channel = Client(path, "AF_UNIX")
        except OSError as error:
            raise EngineError(f"cannot connect to the rank that owns the shared vLLM, at {path}: {error}") from error
        exchange(None)  # now all ranks are in the listener's queue
        return channel, [listener.accept() for _ in range(num_ranks)] if listener is not None else []
