"""The CUDA C++ kernels of csrc/rows_cuda.cu, for Hopper and later; fp32, bf16 and fp16 logits.

Rows that can be moved in units of 16 bytes (V and the row stride are multiples of 8, or of 4 in fp32) and that fit into a cluster
of CTAs, up to about 900,000 ids in 16 bits, are read once. All other rows and the exact KL take a kernel that reads a row twice.
With a filter only the candidates are read: finding a row's largest logits (`top_k`) and the loss then take a read and a write.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache

import torch

from srpo_kernels import triton_rows
from srpo_kernels.build import BuildError, build_cuda
from srpo_kernels.native import DTYPES, ROW_FIELDS, RowArgs, row_args
from srpo_kernels.options import LossOptions

MIN_CAPABILITY = (9, 0)  # thread block clusters
MAX_TOP_K = 1024  # of `top_k`
MAX_FILTERED = 1_800_000  # columns of rows with a filter: their kernel holds a bit for each in shared memory
any_gradient_dtype = False

forced_cluster: int | None = None  # tests and benchmarks: CTAs per row, or 0 for the kernel that reads twice


@cache
def library() -> ctypes.CDLL | BuildError:
    """The compiled library, built on the first call; if the build fails, the error, which is also issued once as a warning."""
    try:
        lib = ctypes.CDLL(str(build_cuda()))
    except BuildError as error:
        warnings.warn(f"no CUDA C++ kernels, a slower implementation is used instead: {error}", stacklevel=2)
        return error
    return declared(lib)


def declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of its functions."""
    lib.srpo_cuda_args_bytes.restype = ctypes.c_int64
    assert lib.srpo_cuda_args_bytes() == ctypes.sizeof(RowArgs), "csrc/rows.h and srpo_kernels/native.py disagree"
    lib.srpo_cuda_rows.argtypes = [ctypes.POINTER(RowArgs), ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    lib.srpo_cuda_cluster.argtypes = [ctypes.POINTER(RowArgs), ctypes.c_int]
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    lib.srpo_cuda_top_k.argtypes = [pointer, size, size, size, size, ctypes.c_int, pointer, ctypes.c_int, pointer]
    lib.srpo_cuda_max_top_k.restype = ctypes.c_int64
    assert lib.srpo_cuda_max_top_k() == MAX_TOP_K, "csrc/top_k.cuh and srpo_kernels/cuda.py disagree"
    lib.srpo_cuda_error.restype = ctypes.c_char_p
    return lib


def why_not(logits: torch.Tensor) -> str | None:
    """See `operators.Backend`."""
    if logits.device.type != "cuda" or torch.version.cuda is None:
        return f"logits are on {logits.device}, not on an NVIDIA GPU"
    if logits.dtype not in DTYPES:
        return f"logits are {logits.dtype}"
    capability = torch.cuda.get_device_capability(logits.device)
    if capability < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(logits.device)} has compute capability {capability[0]}.{capability[1]}, below 9.0"
    lib = library()
    return str(lib) if isinstance(lib, BuildError) else None


def new_gradient(logits: torch.Tensor) -> torch.Tensor:
    """An empty tensor like the logits."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def rows(
    mode: str,
    logits: torch.Tensor,
    dlogits: torch.Tensor | None,
    tables: dict[str, torch.Tensor | None],
    options: LossOptions,
    first_row: int = 0,
) -> torch.Tensor:
    """See `operators.Backend`. Queued on the current stream. Raises RuntimeError for a CUDA error."""
    lib = library()
    assert isinstance(lib, ctypes.CDLL)
    for name, tensor in {**tables, "dlogits": dlogits}.items():
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device} and the logits on {logits.device}: move both to one device")
    if dlogits is not None and tables.get("kept_ids") is not None and logits.shape[1] > MAX_FILTERED:
        raise ValueError(f"logits have {logits.shape[1]} columns: impl 'cuda' filters at most {MAX_FILTERED}, give impl 'triton'")
    values = logits.new_empty(len(ROW_FIELDS), logits.shape[0], dtype=torch.float32)
    args, held = row_args(mode, {**tables, "logits": logits, "dlogits": dlogits, "rows": values}, options, first_row)
    stream = torch.cuda.current_stream(logits.device).cuda_stream
    cluster = -1 if forced_cluster is None else forced_cluster
    _check(lib, lib.srpo_cuda_rows(ctypes.byref(args), _index(logits), cluster, stream))
    del held  # only after the launch: memory freed now is reused on this stream after the kernel has run
    return values


def top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Ids of the largest logits of each row, [T, top_k] int64, largest first; of equal ones the smaller id. top_k: from 1 to V,
    at most `MAX_TOP_K`. Queued on the current stream. Raises RuntimeError for a CUDA error."""
    lib = library()
    assert isinstance(lib, ctypes.CDLL)
    logits = triton_rows.rows_together(logits)
    ids = torch.empty(logits.shape[0], top_k, dtype=torch.int64, device=logits.device)
    sizes, stream = (logits.stride(0), *logits.shape, top_k), torch.cuda.current_stream(logits.device).cuda_stream
    dtype, device = DTYPES[logits.dtype], _index(logits)
    _check(lib, lib.srpo_cuda_top_k(logits.data_ptr(), *sizes, dtype, ids.data_ptr(), device, stream))
    return ids


def scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """See `operators.Backend`. Triton's kernel skips a factor of 1 on the device; without Triton the product is computed."""
    return triton_rows.scaled(gradient, factor) if triton_rows.why_not(gradient) is None else gradient * factor


def _index(tensor: torch.Tensor) -> int:
    return torch.cuda.current_device() if tensor.device.index is None else tensor.device.index


def _check(lib: ctypes.CDLL, code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error {code} in a kernel of srpo: {lib.srpo_cuda_error(code).decode()}")
