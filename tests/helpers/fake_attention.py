"""Stand-ins for attention kernels of other packages: signatures and conventions of the real ones, strict about arguments.

Each computes in fp64 and rounds once, so what differs from attention in fp32 is the rounding of the result.
"""

from __future__ import annotations

from typing import Any

import torch

SIXTEEN = (torch.bfloat16, torch.float16)


def by_the_book(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scale: float, left: int, right: int
) -> torch.Tensor:
    """Row i of a sequence attends to its keys i - left .. i + right; query [T, heads, D] -> [T, heads, E] in its dtype."""
    lengths = (bounds[1:] - bounds[:-1]).tolist()
    out = []
    for q, k, v in zip(*(x.double().split(lengths) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (k, v))
        behind = torch.arange(len(q))[:, None] - torch.arange(len(q))
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        scores = scores.masked_fill((behind > left) | (behind < -right), -torch.inf)
        out.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    return torch.cat(out).to(query.dtype)


def _check(query: Any, key: Any, value: Any, bounds: Any, other: Any, longest: Any, longest_key: Any) -> None:
    assert query.dtype in SIXTEEN and query.dtype == key.dtype == value.dtype
    assert query.ndim == key.ndim == value.ndim == 3 and len(query) == len(key) == len(value)
    assert query.shape[2] == key.shape[2] and key.shape[1] == value.shape[1] and query.shape[1] % key.shape[1] == 0
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert bounds is other and bounds.dtype == torch.int32 and bounds.is_contiguous()
    assert type(longest) is int and longest == longest_key == int((bounds[1:] - bounds[:-1]).max())


def _one_width(query: Any, value: Any) -> None:
    assert query.shape[2] == value.shape[2] and query.shape[2] % 8 == 0 and query.shape[2] <= 256


def _signed(window: Any, length: int) -> tuple[int, int]:
    """A window in which -1 means no bound; all kernels of srpo are causal, so the right bound is 0."""
    left, right = window
    assert right == 0 and left >= -1
    return (length if left == -1 else left), 0


def varlen_attn_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    """torch 2.11's torch.nn.attention.varlen.varlen_attn."""
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    _one_width(query, value)
    assert return_aux is None and scale is not None and type(window_size) is tuple
    return by_the_book(query, key, value, cu_seq_q, scale, *_signed(window_size, max_q))


def varlen_attn_2_12(query: torch.Tensor, key: torch.Tensor, *args: Any, enable_gqa: bool = False, **kwargs: Any) -> Any:
    """The same of torch 2.12, which refuses fewer key-value heads unless it is told of them."""
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Try setting enable_gqa=True for GQA.")
    return varlen_attn_2_11(query, key, *args, **kwargs)


def flash_2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> torch.Tensor:
    """flash_attn.flash_attn_varlen_func of flash-attn 2.8.3."""
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _one_width(q, v)
    assert causal and softmax_scale is not None and not (dropout_p or softcap or return_attn_probs)
    assert alibi_slopes is block_table is None and not deterministic
    return by_the_book(q, k, v, cu_seqlens_q, softmax_scale, *_signed(window_size, max_seqlen_q))


def flash_4(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: Any = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    gather_kv_indices: Any = None,
    page_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Any = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """flash_attn.cute.flash_attn_varlen_func of flash-attn-4 4.0.0b36, as far as its parameters go."""
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert cu_seqlens_q is not None and max_seqlen_q is not None and softmax_scale is not None and causal
    assert q.shape[2] % 8 == v.shape[2] % 8 == 0
    assert qv is seqused_q is seqused_k is gather_kv_indices is page_table is learnable_sink is min_seqlen_k is None
    assert not softcap and num_splits == 1 and pack_gqa is None and not deterministic and not return_lse
    left, right = window_size
    if left is not None and right is not None and left < 0 and right < 0:
        left = None
    # Causal sets the right bound to 0; a left bound below 0 stays, and such a row would attend to nothing.
    left = max_seqlen_q if left is None else left
    return by_the_book(q, k, v, cu_seqlens_q, softmax_scale, left, 0), torch.empty(q.shape[1], len(q))


def flash_4_early(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    page_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
) -> Any:
    """The early copy of flash_attn.cute that flash-attn 2.8.3 brings along."""
    raise AssertionError("srpo does not call it")
