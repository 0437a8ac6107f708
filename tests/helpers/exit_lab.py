"""A rank of a finished run whose gloo threads are delayed. argv: rendezvous file, rank, world size."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from srpo.policy.parallel import Parallel


def main(meeting: str, rank: int, world_size: int) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})  # one core: threads of low priority wait for the main one
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    layer = torch.nn.Linear(8, 8)
    fully_shard(layer, mesh=init_device_mesh("cpu", (world_size,)))
    layer(torch.ones(2, 8)).sum().backward()
    for task in Path("/proc/self/task").iterdir():
        if "gloo_run" in (task / "comm").read_text():
            os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    parallel = Parallel(rank, world_size, rank, torch.device("cpu"))
    parallel.all_gather_object([torch.ones(3)])
    parallel.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
