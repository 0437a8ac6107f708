"""Stage libraries: the CPU and CUDA libraries of srpo_kernels, which every later process finds in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gpu_proof.card import CLUSTER_CAPABILITY, capability, tool
from gpu_proof.parts import Found, Skip, figure, needs, run_parts, small


def timed(build: Callable[[], Path]) -> Found:
    begin = time.perf_counter()
    library = build()
    seconds = time.perf_counter() - begin
    return {"library": library.name, "figures": [figure("compile, or find in the cache", seconds, "s")]}


def cuda() -> Found:
    from srpo_kernels.build import build_cuda

    if small():
        raise Skip("a dry run needs no CUDA library")
    if capability() < CLUSTER_CAPABILITY:
        raise Skip("the CUDA C++ kernels need compute capability 9.0")
    tool("nvcc")
    return timed(build_cuda)


def main() -> None:
    needs("torch")  # which the package imports
    from srpo_kernels.build import build_cpu

    run_parts({"cuda": cuda, "cpu": partial(timed, build_cpu)})
