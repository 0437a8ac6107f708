"""The loss from hidden states with exponentials in place of logits: the kernels of triton_linear.py on one chunk of rows.

Shapes: C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from srpo_kernels import triton_rows
from srpo_kernels.native import ROW_FIELDS

WARPS = 8  # on a tile
BLOCK = 1024  # of its sums that one row's program adds at once


def tiling(major: int | None) -> tuple[dict[str, int], int]:
    """(rows, columns and how much of the hidden size a tile has, how many of these are on their way at once) for a compute
    capability; None: AMD. What registers take without spilling, and the shared memory: 64 KiB of gfx942, 99 of sm86 and sm120."""
    rows = 128 if major in (8, 12) else 256  # tensor cores that read their factors from registers leave room for half
    return {"BLOCK_M": rows, "BLOCK_N": 128, "BLOCK_K": 64}, 2 if major is None else 3


def why_not(hidden: Tensor) -> str | None:
    """Why these hidden states cannot be taken; None if they can. In the interpreter of Triton any dtype can."""
    if hidden.dtype != torch.bfloat16 and not triton_rows.interpreted():
        return f"hidden states are {hidden.dtype}, not bf16"
    return triton_rows.why_not(hidden)


def kernels() -> ModuleType:
    """The module of kernels; `why_not` has said that it can be imported."""
    return importlib.import_module("srpo_kernels.triton_linear")


def rows(
    hidden: Tensor, weight: Tensor, exponentials: Tensor | None, tables: dict[str, Tensor | None], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(values per row [len(ROW_FIELDS), C] as `operators.Backend.rows` gives them, v [C] fp32).

    `exponentials` [C, V] is filled: times v it is the gradient of the sum of the losses by the logits hidden @ weight.T. Rows of
    which that cannot be said, as their label has a probability below 2^-60, or is no column, or their logits are not numbers, get
    the values of an ignored row, step -1 among them, and no gradient.

    hidden [C, H], weight [V, H]; tables and options as in `operators.Backend`, every row with a label.
    """
    num_rows, size = hidden.shape
    hidden, weight = triton_rows.rows_together(hidden), triton_rows.rows_together(weight)
    vocab = weight.shape[0]
    values = hidden.new_empty(len(ROW_FIELDS), num_rows, dtype=torch.float32)
    table = {
        name: triton_rows.as_table(tables.get(name), dtype)
        for name, dtype in triton_rows.TABLES.items()
        if name not in ("kept_ids", "grad_logprobs", "grad_lse")
    }
    labels, step_ends = table["labels"], table["step_ends"]
    assert labels is not None and step_ends is not None and num_rows > 0
    c, c_error = triton_rows.in_base_2(options["temperature"])
    # That a product or two are rounded here does no harm: any number near the label's logit will do.
    near = (hidden * weight[labels.clamp(0, vocab - 1)]).sum(1, dtype=torch.float32)
    offsets = torch.round(near * c)
    tiles, num_stages = tiling(_major(hidden.device))
    num_tiles = -(-vocab // tiles["BLOCK_N"])
    sums = hidden.new_empty(2, num_rows, num_tiles, dtype=torch.float32)
    label_logits, scales = torch.empty_like(offsets), torch.empty_like(offsets)
    module, stride = kernels(), 0 if exponentials is None else exponentials.stride(0)
    with triton_rows.on(hidden):
        module.exponentials_kernel[-(-num_rows // tiles["BLOCK_M"]) * num_tiles,](
            hidden,
            weight,
            exponentials,
            labels,
            offsets,
            sums,
            label_logits,
            hidden_stride=hidden.stride(0),
            weight_stride=weight.stride(0),
            exponentials_stride=stride,
            num_rows=num_rows,
            vocab=vocab,
            size=size,
            c=c,
            **tiles,
            WHOLE=size % tiles["BLOCK_K"] == 0,
            num_warps=WARPS,
            num_stages=num_stages,
            enable_fp_fusion=True,
        )
        module.finish_kernel[num_rows,](
            exponentials,
            sums,
            label_logits,
            offsets,
            scales,
            **table,
            rows=values,
            exponentials_stride=stride,
            num_tiles=num_tiles,
            num_rows=num_rows,
            vocab=vocab,
            num_sequences=step_ends.shape[0],
            num_steps=step_ends.shape[1],
            first_row=options["first_row"],
            c=c,
            c_error=c_error,
            **triton_rows.numbers(options),
            CLIP_FORM=options["clip_form"],
            KL_ESTIMATOR=options["kl_estimator"],
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return values, scales


def _major(device: torch.device) -> int | None:
    """The first number of the compute capability, None on AMD; in the interpreter that of sm90."""
    if torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
