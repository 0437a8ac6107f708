"""Kernels of attention over packed sequences, by their names in `policy.attention`, all behind one signature.

Each needs an NVIDIA GPU and 16-bit tensors. The packages are asked for by name: nothing is used because it is installed.
Letters: T packed rows, N sequences, D head dimension of queries and keys, E of values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from srpo.core.errors import MissingPackage, UserError

NAMES = ("torch", "flash_attention_2", "flash_attention_4")
_INSTALL = {"flash_attention_2": "pip install flash-attn --no-build-isolation", "flash_attention_4": "pip install flash-attn-4"}
WIDEST_OF_TORCH = 256  # width of heads that torch's kernel takes; wider ones are padded sequences
_OLDEST = {"torch": 8, "flash_attention_2": 8, "flash_attention_4": 9}  # major compute capability; 4 has no backward on 8.x
_FLASH_4_WIDEST = {9: 256}  # head dimension, by major compute capability; elsewhere 128
_FLASH_4_ALSO = {10: ((192, 128), (256, 256)), 11: ((192, 128), (256, 256))}  # (D, E) beside these

# (query [T, heads, D], key [T, kv_heads, D], value [T, kv_heads, E], bounds [N+1] int32, rows of the longest sequence, scale,
# window) -> [T, heads, E]. A row attends to the last `window` keys up to itself; None: to all.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float, int | None], torch.Tensor]


@cache
def kernel_of(name: str) -> Kernel:
    """The kernel of one of `NAMES`. Raises MissingPackage, with the command that installs it, if it cannot be imported."""
    if name == "torch":
        from torch.nn.attention.varlen import varlen_attn

        return of_torch(varlen_attn)
    try:
        if name == "flash_attention_2":
            from flash_attn import flash_attn_varlen_func

            return of_flash_2(flash_attn_varlen_func)
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError as error:  # absent, only the other package's part of `flash_attn`, or built for another torch
        raise _missing(name, f"cannot be imported ({' '.join(str(error).split())})") from error
    if "max_seqlen_q" not in inspect.signature(flash_attn_varlen_func).parameters:
        raise _missing(name, "is only the early copy that FlashAttention 2 brings along")
    return of_flash_4(flash_attn_varlen_func)


def _missing(name: str, why: str) -> MissingPackage:
    return MissingPackage(f"policy.attention is {name!r}, and its package {why}: {_INSTALL[name]}, or set it to 'torch'")


def of_torch(varlen_attn: Callable[..., Any]) -> Kernel:
    """The kernel of torch. `enable_gqa` came with torch 2.12; that of 2.11 takes fewer key-value heads without it."""
    has_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float, window: Any
    ) -> torch.Tensor:
        gqa = {"enable_gqa": True} if has_gqa and query.shape[1] != key.shape[1] else {}
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=_behind(window), **gqa)

    return _of_one_width(attend)


def of_flash_2(flash_attn_varlen_func: Callable[..., Any]) -> Kernel:
    """The kernel of the package flash-attn (2.8 and later)."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float, window: Any
    ) -> torch.Tensor:
        where = (bounds, bounds, longest, longest)
        return flash_attn_varlen_func(query, key, value, *where, softmax_scale=scale, causal=True, window_size=_behind(window))

    return _of_one_width(attend)


def of_flash_4(flash_attn_varlen_func: Callable[..., Any]) -> Kernel:
    """The kernel of the package flash-attn-4, which returns (output, log-sum-exp). No bound of a window is None there, not -1."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float, window: Any
    ) -> torch.Tensor:
        out, _ = flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
        )
        return out

    return attend


def _behind(window: int | None) -> tuple[int, int]:
    """(keys before a row that it attends to, keys after it); -1: all."""
    return (-1 if window is None else window - 1, 0)


def _of_one_width(kernel: Kernel) -> Kernel:
    """For a kernel whose queries, keys and values have one width, a multiple of 8: fills up with zeros, which change no score."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float, window: Any
    ) -> torch.Tensor:
        size = value.shape[2]
        width = -(-max(query.shape[2], size) // 8) * 8
        query, key, value = (x if x.shape[2] == width else F.pad(x, (0, width - x.shape[2])) for x in (query, key, value))
        out = kernel(query, key, value, bounds, longest, scale, window)
        return out if size == width else out[..., :size]

    return attend


def check_name(name: str) -> None:
    """Raise UserError for a name that is not one of `NAMES`."""
    if name not in NAMES:
        raise UserError(f"policy.attention is {name!r}: set it to one of {', '.join(NAMES)}")


def check_kernel(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if the kernel cannot run on this device or in this dtype, MissingPackage if it is not installed.

    "torch" pads sequences in fp32, and on a CPU takes those in bf16 one by one (`srpo.policy.attention`).
    """
    check_name(name)
    if name == "torch" and (device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16)):
        return
    if device.type != "cuda":
        raise UserError(f"policy.attention is {name!r}, which needs an NVIDIA GPU, and this run is on the CPU: set it to 'torch'")
    if dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"policy.attention is {name!r}, which has no float32: set policy.dtype to 'bfloat16', or it to 'torch'")
    major, minor = torch.cuda.get_device_capability(device)
    if major < _OLDEST[name] and name == "torch":
        raise UserError(
            f"attention in {str(dtype).removeprefix('torch.')} needs compute capability 8.0, and this GPU has {major}.{minor}: "
            "set policy.dtype to 'float32'"
        )
    if major < _OLDEST[name]:
        raise UserError(
            f"policy.attention is {name!r}, which needs compute capability {_OLDEST[name]}.0, and this GPU has {major}.{minor}: "
            "set it to 'torch'"
        )
    kernel_of(name)


def check_widths(name: str, widths: Iterable[tuple[int, int]], device: torch.device) -> None:
    """Raise UserError if the kernel cannot compute heads of one of these widths (D, E), forward and backward, on this GPU."""
    if name == "torch":
        return
    major = torch.cuda.get_device_capability(device)[0]
    widest = 256 if name == "flash_attention_2" else _FLASH_4_WIDEST.get(major, 128)
    for pair in widths:
        fits = max(pair) <= widest or (name == "flash_attention_4" and pair in _FLASH_4_ALSO.get(major, ()))
        if not fits or (name == "flash_attention_4" and (pair[0] % 8 or pair[1] % 8)):
            of_8 = "multiples of 8 " if name == "flash_attention_4" else ""
            raise UserError(
                f"policy.attention is {name!r}, which takes heads of {of_8}up to {widest} on this GPU, and the model has "
                f"{pair[0]} for queries and keys and {pair[1]} for values: set it to 'torch'"
            )
