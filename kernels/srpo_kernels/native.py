"""`RowArgs` of csrc/rows.h for ctypes, filled from tensors: the argument of the C++ and the CUDA library."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch

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
DEFAULTS = {  # values of options that a mode does not use
    "clip_eps_low": 0.0,
    "clip_eps_high": 0.0,
    "dual_clip": math.inf,
    "clip_form": "ppo",
    "kl_coef": 0.0,
    "kl_estimator": None,
    "first_row": 0,
}
_STRIDES = {"logits": "logits_stride", "ref_logits": "ref_stride", "dlogits": "dlogits_stride"}
_SIZES = (*_STRIDES.values(), "T", "V", "N", "J", "K", "first_row")
_NUMBERS = ("temperature", "clip_eps_low", "clip_eps_high", "dual_clip", "kl_coef")
_CODES = ("dtype", "mode", "kl_estimator", "clip_form", "num_threads")


class RowArgs(ctypes.Structure):
    """The struct of csrc/rows.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_int32) for name in _CODES),
    ]


def row_args(mode: str, tensors: dict[str, torch.Tensor | None], **options: Any) -> tuple[RowArgs, list[Any]]:
    """(the struct, the tensors that its pointers refer to). Keep the tensors alive until the call has returned.

    The keys of `tensors` are the field names of csrc/rows.h. Tensors that are only read are converted to the dtype and layout
    that the kernels expect; `dlogits` and `rows` are written and must already have them. Options: temperature, and the options
    that differ from DEFAULTS.
    """
    logits = tensors["logits"]
    assert logits is not None
    held: list[Any] = []
    options = DEFAULTS | options
    args = RowArgs(mode=MODES[mode], dtype=DTYPES[logits.dtype], num_threads=1)
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
    for name in (*_NUMBERS, "first_row"):
        setattr(args, name, options[name])
    args.kl_estimator, args.clip_form = KL_ESTIMATORS[options["kl_estimator"]], CLIP_FORMS[options["clip_form"]]
    return args, held
