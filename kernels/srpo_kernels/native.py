"""`RowArgs` of csrc/rows.h for ctypes, filled from tensors: the argument of the C++ and the CUDA library."""

from __future__ import annotations

import ctypes
import math

import torch

from srpo_kernels.options import LossOptions

ROW_FIELDS = ("loss", "logprob", "lse", "ratio", "kl", "entropy", "clipped", "outside", "step")
MODES = {"policy_loss": 0, "logprobs": 1, "logprobs_backward": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CLIP_FORMS = {"ppo": 0, "cispo": 1}
KL_ESTIMATORS = {None: 0, "k1": 1, "k2": 2, "k3": 3, "full": 4}

POINTERS = {  # name: dtype; None: the dtype of the logits
    "logits": None,
    "ref_logits": None,
    "dlogits": None,
    "labels": torch.int64,
    "kept_ids": torch.int64,
    "step_advantages": torch.float32,
    "step_ends": torch.int32,
    "cu_seqlens": torch.int32,
    "weights": torch.float32,
    "old_logprobs": torch.float32,
    "ref_logprobs": torch.float32,
    "grad_logprobs": torch.float32,
    "grad_lse": torch.float32,
    "rows": torch.float32,
}
_STRIDES = {"logits": "logits_stride", "ref_logits": "ref_stride", "dlogits": "dlogits_stride"}
_SIZES = (*_STRIDES.values(), "T", "V", "N", "J", "K", "first_row")
_OPTIONS = ("temperature", "clip_eps_low", "clip_eps_high", "dual_clip", "kl_coef")
_CODES = ("dtype", "mode", "kl_estimator", "clip_form", "num_threads")


class RowArgs(ctypes.Structure):
    """The struct of csrc/rows.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_double) for name in _OPTIONS),
        *((name, ctypes.c_int32) for name in _CODES),
    ]


def kl_estimator(tables: dict[str, torch.Tensor | None], options: LossOptions) -> str | None:
    """The estimator of the KL; None without a reference."""
    has_reference = tables.get("ref_logprobs") is not None or tables.get("ref_logits") is not None
    return options.kl_estimator if has_reference else None


def row_args(
    mode: str, tensors: dict[str, torch.Tensor | None], options: LossOptions, first_row: int = 0
) -> tuple[RowArgs, list[torch.Tensor]]:
    """(the struct, the tensors that its pointers refer to). Keep the tensors alive until the call has returned.

    The keys of `tensors` are the field names of csrc/rows.h. Tensors that are only read are converted to the dtype and layout
    that the kernels expect; `dlogits` and `rows` are written and must already have them.
    """
    logits = tensors["logits"]
    assert logits is not None
    held: list[torch.Tensor] = []
    args = RowArgs(mode=MODES[mode], dtype=DTYPES[logits.dtype], num_threads=1, first_row=first_row)
    args.T, args.V = logits.shape
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dtype = POINTERS[name] or logits.dtype
        if name in ("dlogits", "rows"):
            assert tensor.dtype == dtype and (tensor.shape[1] <= 1 or tensor.stride(1) == 1), name
        elif name in ("logits", "ref_logits"):
            tensor = tensor.detach().to(dtype)
            if tensor.shape[1] > 1 and tensor.stride(1) != 1:
                tensor = tensor.contiguous()
        else:
            tensor = tensor.detach().to(dtype).contiguous()
        held.append(tensor)
        setattr(args, name, tensor.data_ptr())
        if name in _STRIDES:
            setattr(args, _STRIDES[name], tensor.stride(0))
        elif name == "step_ends":
            args.N, args.J = tensor.shape
        elif name == "kept_ids":
            args.K = tensor.shape[1]
    for name in _OPTIONS:
        value = getattr(options, name)
        setattr(args, name, math.inf if value is None else value)  # None: no bound
    args.kl_estimator, args.clip_form = KL_ESTIMATORS[kl_estimator(tensors, options)], CLIP_FORMS[options.clip_form]
    return args, held
