"""The CUDA kernels of csrc/ as they are written, on a CPU: `tests/helpers/simt/` emulates threads, warps, clusters and copies."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from srpo_kernels import LossOptions, build, cuda, native

SIMT = Path(__file__).parent / "simt"
IMPOSSIBLE = 9  # cudaErrorInvalidConfiguration: rows_one_read cannot take these rows in clusters of this size


def compile_library(output: Path, csrc: Path = build.CSRC) -> ctypes.CDLL:
    """The emulated library, built from the kernels in `csrc`. Skips the test without a C++ compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on the PATH")
    # -O1: at -O2 g++ 12 merges an aligned and an unaligned read into one aligned read. Each library has variables of its own.
    flags = ("-std=c++17", "-O1", "-fno-gnu-unique", "-w", "-shared", "-fPIC", f"-I{SIMT}", f"-I{csrc}")
    subprocess.run([compiler, *flags, str(SIMT / "rows_simt.cpp"), "-o", str(output)], check=True)
    return cuda.declared(ctypes.CDLL(str(output)))


class KernelError(RuntimeError):
    """The emulated launch returned an error code."""


@dataclass
class Emulated:
    """`srpo_kernels.cuda` on CPU tensors. cluster: CTAs per row where that is possible, 0: not rows_one_read, -1: the
    library's choice."""

    library: ctypes.CDLL
    cluster: int = -1
    any_gradient_dtype = False

    def why_not(self, logits: torch.Tensor) -> str | None:
        return None if logits.dtype in native.DTYPES else f"logits are {logits.dtype}"

    def new_gradient(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, 7.0, memory_format=torch.contiguous_format)

    def rows(
        self,
        mode: str,
        logits: torch.Tensor,
        dlogits: torch.Tensor | None,
        tables: dict[str, torch.Tensor | None],
        options: LossOptions,
        first_row: int = 0,
    ) -> torch.Tensor:
        values = logits.new_full((len(native.ROW_FIELDS), logits.shape[0]), 7.0, dtype=torch.float32)
        tensors = {**tables, "logits": logits, "dlogits": dlogits, "rows": values}
        args, held = native.row_args(mode, tensors, options, first_row)
        code = self.library.srpo_cuda_rows(ctypes.byref(args), 0, self.cluster, None)
        if code == IMPOSSIBLE and self.cluster > 0:
            code = self.library.srpo_cuda_rows(ctypes.byref(args), 0, -1, None)
        self.check(code)
        assert held
        return values

    def top_k(self, logits: torch.Tensor, top_k: int) -> torch.Tensor:
        ids = torch.full((logits.shape[0], min(top_k, logits.shape[1])), -7)
        sizes = (logits.stride(0), *logits.shape, ids.shape[1])
        self.check(self.library.srpo_cuda_top_k(logits.data_ptr(), *sizes, native.DTYPES[logits.dtype], ids.data_ptr(), 0, None))
        return ids

    def scaled(self, gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return gradient * factor

    @staticmethod
    def check(code: int) -> None:
        """Raises KernelError for an error code; 702: no thread of the kernel could go on."""
        if code:
            raise KernelError(f"CUDA error {code}")
