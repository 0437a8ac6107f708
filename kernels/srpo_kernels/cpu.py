"""The C++ kernels of csrc/rows_cpu.cpp: AVX-512 (with BF16), AVX2 or portable, chosen at run time; fp32, bf16, fp16 logits."""

from __future__ import annotations

import ctypes
import sys
import warnings
from functools import cache
from typing import Any

import torch

from srpo_kernels.build import BuildError, build_cpu, load_with_openmp
from srpo_kernels.native import DTYPES, ROW_FIELDS, RowArgs, row_args

HUGE_PAGE = 2**21
MADV_HUGEPAGE = 14  # of <linux/mman.h>
LEVELS = ("portable", "avx2", "avx512", "avx512bf16")
any_gradient_dtype = False

forced_level: str | None = None  # tests run every instruction set that the machine has


@cache
def library() -> ctypes.CDLL | BuildError:
    """The compiled library, built on the first call; or why there is none, which is also said once as a warning."""
    try:
        lib = load_with_openmp(build_cpu())
    except BuildError as error:
        warnings.warn(f"no C++ kernels, the slower reference implementation is used instead: {error}", stacklevel=2)
        return error
    assert lib.srpo_cpu_args_bytes() == ctypes.sizeof(RowArgs), "csrc/rows.h and srpo_kernels/native.py disagree"
    lib.srpo_cpu_rows.argtypes = [ctypes.POINTER(RowArgs), ctypes.c_int]
    return lib


def why_not(logits: torch.Tensor) -> str | None:
    """Why these logits cannot be taken; None if they can."""
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}"
    if logits.dtype not in DTYPES:
        return f"logits are {logits.dtype}"
    lib = library()
    return str(lib) if isinstance(lib, BuildError) else None


def levels() -> tuple[str, ...]:
    """Instruction sets that this machine can run, slowest first."""
    lib = library()
    return () if isinstance(lib, BuildError) else LEVELS[: lib.srpo_cpu_level() + 1]


def new_gradient(logits: torch.Tensor) -> torch.Tensor:
    """An empty tensor like the logits. On Linux in huge pages where the kernel has them: on a fresh gradient of hundreds of
    megabytes page faults cost more than the loss does."""
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    start, end = gradient.data_ptr(), gradient.data_ptr() + gradient.nbytes
    start, end = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    if sys.platform == "linux" and end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)  # advice: may fail
    return gradient


def rows(
    mode: str,
    logits: torch.Tensor,
    dlogits: torch.Tensor | None,
    tables: dict[str, torch.Tensor | None],
    options: dict[str, Any],
) -> torch.Tensor:
    """See `operators.Backend`."""
    lib = library()
    assert isinstance(lib, ctypes.CDLL)
    values = logits.new_empty(len(ROW_FIELDS), logits.shape[0], dtype=torch.float32)
    args, held = row_args(mode, {**tables, "logits": logits, "dlogits": dlogits, "rows": values}, **options)
    args.num_threads = torch.get_num_threads()
    code = lib.srpo_cpu_rows(args, -1 if forced_level is None else LEVELS.index(forced_level))
    if code == 2:
        columns = f"[0, {logits.shape[1]})"
        raise ValueError(
            f"a label or a kept id is not a column of the logits: labels lie in {columns} or are -100, ids below 0 are padding"
        )
    assert code == 0 and held, f"this machine has no {forced_level}"
    return values


def scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """See `operators.Backend`."""
    return gradient if factor.item() == 1 else gradient * factor
