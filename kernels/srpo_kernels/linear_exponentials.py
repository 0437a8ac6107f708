"""The loss from hidden states with exponentials in place of logits: launches the kernels of triton_linear.py on a chunk of rows.

Shapes: C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from srpo_kernels import triton_rows
from srpo_kernels.native import ROW_FIELDS, kl_estimator
from srpo_kernels.options import LossOptions

WARPS = 8  # per tile
BLOCK = 1024  # number of tile sums that `finish_kernel` loads at once


def tiling(major: int | None) -> tuple[dict[str, int], int]:
    """(sizes of a tile in rows, columns and hidden size, number of pipeline stages) for a compute capability; None: AMD. The
    sizes fit the registers without spilling, and the shared memory: 64 KiB on gfx942, 99 KiB on sm86 and sm120."""
    rows = 128 if major in (8, 12) else 256  # half on tensor cores that read their factors from registers
    return {"BLOCK_M": rows, "BLOCK_N": 128, "BLOCK_K": 64}, 2 if major is None else 3


def why_not(hidden: Tensor) -> str | None:
    """The reason why these hidden states cannot be taken; None if they can. Triton's interpreter takes any dtype."""
    if hidden.dtype != torch.bfloat16 and not triton_rows.interpreted():
        return f"hidden states are {hidden.dtype}, not bf16"
    return triton_rows.why_not(hidden)


def kernels() -> ModuleType:
    """The module of kernels. Call only if `why_not` returns None."""
    return importlib.import_module("srpo_kernels.triton_linear")


def rows(
    hidden: Tensor,
    weight: Tensor,
    exponentials: Tensor | None,
    tables: dict[str, Tensor | None],
    options: LossOptions,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """(values per row [len(ROW_FIELDS), C] as `operators.Backend.rows` gives them, v [C] fp32).

    `exponentials` [C, V] is filled such that v times it is the gradient of the sum of the losses with respect to the logits
    hidden @ weight.T. Rows for which this is impossible (label of probability below 2^-60, label that is not a column, NaN
    logits) get the values of an ignored row, with step -1, and no gradient.

    hidden [C, H], weight [V, H]; tables, options and first_row as in `operators.Backend`; every row has a label.
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
    c, c_error = triton_rows.in_base_2(options.temperature)
    # Rounding of these products does no harm: the offset only has to be near the label's logit.
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
            first_row=first_row,
            c=c,
            c_error=c_error,
            **triton_rows.numbers(options),
            CLIP_FORM=options.clip_form,
            KL_ESTIMATOR=kl_estimator(tables, options),
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return values, scales


def _major(device: torch.device) -> int | None:
    """Major compute capability; None on AMD, 9 in the interpreter."""
    if torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
