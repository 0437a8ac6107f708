"""Launches the Triton kernels of triton_kernels.py: NVIDIA from sm80 and AMD from gfx942; fp32, bf16 and fp16 logits.

If TRITON_INTERPRET=1 is set before triton is first imported, the kernels also run on a CPU, slowly: for tests.
"""

from __future__ import annotations

import importlib
import math
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from srpo_kernels.native import DTYPES, POINTERS, ROW_FIELDS, kl_estimator
from srpo_kernels.options import LossOptions

OLDEST = (3, 6)
OLDEST_CAPABILITY = (8, 0)
any_gradient_dtype = True
TABLES = {name: dtype for name, dtype in POINTERS.items() if dtype is not None and name != "rows"}


class Tiling(NamedTuple):
    """Division of a row into tiles, and the number of warps per row."""

    block: int  # columns of a tile
    num_held: int  # tiles that stay in registers
    fold: int  # neighbours that one thread loads at once
    num_warps: int


def tiling(num_columns: int, element_bytes: int, *, gathered: bool, aligned: bool) -> Tiling:
    """The tiling for rows of `num_columns`; the same for every batch of a model, so that kernels are compiled once. gathered:
    single elements are loaded; aligned: rows start at multiples of 16 bytes. The sizes fit the registers without spilling, which
    tests/ops/test_triton_compile.py checks."""
    fold = 16 // element_bytes if aligned and not gathered else 1
    block, num_held = (8192, 2) if element_bytes == 2 and aligned else (4096, 4)
    if num_columns > block and not gathered:
        return Tiling(block, num_held, fold, 16)
    block = max(512, 2 ** math.ceil(math.log2(num_columns)))
    return Tiling(block, 1, fold, min(16, max(4, block // 512)))


@cache
def kernels() -> ModuleType | str:
    """The module of kernels, or the reason why it cannot be imported."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"triton is {triton.__version__}, not {'.'.join(map(str, OLDEST))} or later"
    return importlib.import_module("srpo_kernels.triton_kernels")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return False
    module = kernels()
    return isinstance(module, ModuleType) and not isinstance(module.rows_kernel, module.triton.JITFunction)


def why_not(logits: torch.Tensor) -> str | None:
    """See `operators.Backend`."""
    if logits.dtype not in DTYPES:
        return f"logits are {logits.dtype}"
    if logits.device.type != "cuda":
        return None if logits.device.type == "cpu" and interpreted() else f"logits are on {logits.device}"
    module = kernels()
    if isinstance(module, str):
        return module
    if interpreted():
        return "TRITON_INTERPRET is set"
    if torch.version.hip is None and torch.cuda.get_device_capability(logits.device) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(logits.device)} is older than sm80"
    return None


def new_gradient(logits: torch.Tensor) -> torch.Tensor:
    """An empty tensor like the logits, contiguous."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def rows(
    mode: str,
    logits: torch.Tensor,
    dlogits: torch.Tensor | None,
    tables: dict[str, torch.Tensor | None],
    options: LossOptions,
    first_row: int = 0,
) -> torch.Tensor:
    """See `operators.Backend`."""
    num_rows, vocab = logits.shape
    values = logits.new_empty(len(ROW_FIELDS), num_rows, dtype=torch.float32)
    if num_rows == 0:
        return values
    assert dlogits is None or vocab <= 1 or dlogits.stride(1) == 1
    logits, ref_logits = rows_together(logits), tables.get("ref_logits")
    if ref_logits is not None:
        ref_logits = rows_together(ref_logits)
    table = {name: as_table(tables.get(name), dtype) for name, dtype in TABLES.items()}
    kept_ids, step_ends = table["kept_ids"], table["step_ends"]
    num_kept = 0 if kept_ids is None else kept_ids.shape[1]
    num_sequences, num_steps = (0, 0) if step_ends is None else step_ends.shape
    tiles = tiling(
        vocab if kept_ids is None else num_kept + 1,
        logits.element_size(),
        gathered=kept_ids is not None,
        aligned=logits.data_ptr() % 16 == 0 and logits.stride(0) * logits.element_size() % 16 == 0,
    )
    c, c_error = in_base_2(options.temperature)
    module = kernels()
    assert isinstance(module, ModuleType)
    with on(logits):
        module.rows_kernel[num_rows,](
            logits,
            ref_logits,
            dlogits,
            **table,
            rows=values,
            logits_stride=logits.stride(0),
            ref_stride=0 if ref_logits is None else ref_logits.stride(0),
            dlogits_stride=0 if dlogits is None else dlogits.stride(0),
            num_rows=num_rows,
            vocab=vocab,
            num_sequences=num_sequences,
            num_steps=num_steps,
            num_kept=num_kept,
            first_row=first_row,
            c=c,
            c_error=c_error,
            **numbers(options),
            MODE=mode,
            CLIP_FORM=options.clip_form,
            KL_ESTIMATOR=kl_estimator(tables, options),
            BLOCK=tiles.block,
            NUM_HELD=tiles.num_held,
            FOLD=tiles.fold,
            num_warps=tiles.num_warps,
            enable_fp_fusion=True,  # explicit, because Triton warns that its default will change
        )
    return values


def scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """See `operators.Backend`. In place; the version counter makes autograd raise if the gradient is used a second time."""
    scale_(gradient, factor)
    torch.autograd.graph.increment_version(gradient)
    return gradient


def scale_(dlogits: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply `dlogits` [T, V] by `factor` (one element, on the same device) in place; a factor of 1 costs no memory traffic."""
    num_rows, vocab = dlogits.shape
    assert factor.numel() == 1 and (vocab <= 1 or dlogits.stride(1) == 1)
    if num_rows:
        module = kernels()
        assert isinstance(module, ModuleType)
        with on(dlogits):
            module.scale_kernel[num_rows,](dlogits, factor, dlogits.stride(0), vocab, BLOCK=4096, num_warps=8)
    return dlogits


def in_base_2(temperature: float) -> tuple[float, float]:
    """(c = log2(e) / temperature rounded to fp32, exact c / rounded c - 1)."""
    exact = math.log2(math.e) / temperature
    rounded = torch.tensor(exact, dtype=torch.float32).item()
    return rounded, exact / rounded - 1


def numbers(options: LossOptions) -> dict[str, float]:
    """The kernels' scalar arguments that depend on the options of the loss."""
    return {
        "inverse_temperature": 1 / options.temperature,
        "clip_low": 1 - options.clip_eps_low,
        "clip_high": 1 + options.clip_eps_high,
        "dual_clip": math.inf if options.dual_clip is None else options.dual_clip,
        "kl_coef": options.kl_coef,
    }


def on(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current, since kernels are launched on the current device."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def as_table(table: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A table in the dtype and layout that the kernels read; copied if it differs."""
    return None if table is None else table.detach().to(dtype).contiguous()


def rows_together(logits: torch.Tensor) -> torch.Tensor:
    """Logits whose rows are contiguous; copied if they are not."""
    logits = logits.detach()
    return logits if logits.shape[1] <= 1 or logits.stride(1) == 1 else logits.contiguous()
