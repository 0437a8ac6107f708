"""Time and memory of one call, for bench/loss_kernel.py."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arms import finish
from problem import Problem
from rivals import Run, one_line
from srpo_kernels import cpu


def elapsed_ms(run: Run, problem: Problem) -> float:
    """Milliseconds of one forward and backward. On a GPU the time between two events: Python queues the kernels while the logits
    are still being restored, so that launch overhead is not measured."""
    problem.restore()
    if problem.device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        finish(run)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    finish(run)
    return (time.perf_counter() - begin) * 1e3


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of a call above the level before it; None if the system does not report it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    cpu.empty_cache()  # reused memory would not show in the resident set
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; for the same reason
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    """A size from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in /proc/self/status")


def lost(device: torch.device) -> str | None:
    """The error with which a CUDA device answers every call after a fault in a kernel; None if the device works."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return one_line(error)
    return None
