"""The C++ kernels of csrc/rows_cpu.cpp: AVX-512 (with BF16), AVX2 or portable, chosen at run time; fp32, bf16, fp16 logits."""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections import deque
from functools import cache

import numpy as np
import torch

from srpo_kernels.build import BuildError, build_cpu, load_with_openmp
from srpo_kernels.native import DTYPES, ROW_FIELDS, RowArgs, row_args
from srpo_kernels.options import LossOptions

HUGE_PAGE = 2**21
KEPT_BYTES = 2**24  # the memory of a gradient of this size or more is kept for the next one
LEVELS = ("portable", "avx2", "avx512", "avx512bf16")
any_gradient_dtype = False

_kept: deque[np.ndarray] = deque(maxlen=1)  # memory of the gradient that was freed last, shared by all threads
forced_level: str | None = None  # an instruction set; set by tests, which run all that the machine has


@cache
def library() -> ctypes.CDLL | BuildError:
    """The compiled library, built on the first call; if the build fails, the error, which is also issued once as a warning."""
    try:
        lib = load_with_openmp(build_cpu())
    except BuildError as error:
        warnings.warn(f"no C++ kernels, the slower reference implementation is used instead: {error}", stacklevel=2)
        return error
    assert lib.srpo_cpu_args_bytes() == ctypes.sizeof(RowArgs), "csrc/rows.h and srpo_kernels/native.py disagree"
    lib.srpo_cpu_rows.argtypes = [ctypes.POINTER(RowArgs), ctypes.c_int]
    return lib


def why_not(logits: torch.Tensor) -> str | None:
    """See `operators.Backend`."""
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}"
    if logits.dtype not in DTYPES:
        return f"logits are {logits.dtype}"
    lib = library()
    return str(lib) if isinstance(lib, BuildError) else None


def new_gradient(logits: torch.Tensor) -> torch.Tensor:
    """An empty tensor like the logits. A large one reuses the memory of the last large gradient that was freed, if it fits,
    because page faults on hundreds of megabytes cost more than the loss. `empty_cache` releases that memory."""
    if logits.nbytes < KEPT_BYTES:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    try:
        block = _kept.pop()
    except IndexError:  # not a check beforehand: another thread could take the block between check and pop
        block = np.empty(0, np.uint8)
    if not logits.nbytes <= block.nbytes <= 2 * logits.nbytes:
        del block  # freed before the next block is allocated
        block = np.empty(logits.nbytes + HUGE_PAGE, np.uint8)  # numpy requests huge pages
        start = -block.ctypes.data % HUGE_PAGE
        block = block[start : start + logits.nbytes]
    used = block[: logits.nbytes]
    weakref.finalize(used, _kept.append, block).atexit = False
    return torch.from_numpy(used).view(logits.dtype).view(logits.shape)


def empty_cache() -> None:
    """Release the memory that is kept for the next large gradient."""
    _kept.clear()


def rows(
    mode: str,
    logits: torch.Tensor,
    dlogits: torch.Tensor | None,
    tables: dict[str, torch.Tensor | None],
    options: LossOptions,
    first_row: int = 0,
) -> torch.Tensor:
    """See `operators.Backend`."""
    lib = library()
    assert isinstance(lib, ctypes.CDLL)
    values = logits.new_empty(len(ROW_FIELDS), logits.shape[0], dtype=torch.float32)
    args, held = row_args(mode, {**tables, "logits": logits, "dlogits": dlogits, "rows": values}, options, first_row)
    args.num_threads = torch.get_num_threads()
    code = lib.srpo_cpu_rows(args, -1 if forced_level is None else LEVELS.index(forced_level))
    if code == 2:
        columns = f"[0, {logits.shape[1]})"
        raise ValueError(
            f"a label or kept id is not a column of the logits: labels must lie in {columns} or be -100, ids below 0 are padding"
        )
    assert code == 0 and held, f"this machine has no {forced_level}"
    return values


def scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """See `operators.Backend`."""
    return gradient if factor.item() == 1 else gradient * factor
