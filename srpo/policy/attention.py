"""Causal attention over packed sequences, registered with transformers by `registered_attention`; none attends to another.

`policy.attention` names the kernel (`srpo.policy.varlen_kernels`).
Letters: T packed rows, N sequences, L rows of the longest sequence, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from srpo.core.errors import UserError
from srpo.policy.plain_attention import plain_attention
from srpo.policy.varlen_kernels import NAMES, WIDEST_OF_TORCH, Kernel, check_name, kernel_of

# Transformers' names of `NAMES`. None contains "flash": transformers would take it for its own FlashAttention.
_REGISTERED: dict[str, str] = dict(zip(NAMES, ("srpo_varlen", "srpo_fa2", "srpo_fa4"), strict=True))
ATTENTION = _REGISTERED["torch"]
LONGEST_PLAIN = 512  # rows; the probabilities of that many are a third of what a layer of a small model keeps for its backward
# Arguments of attention that change its result, and that neither function of srpo computes.
_UNSUPPORTED = {"s_aux": "attention sinks", "softcap": "a cap on attention scores", "position_bias": "a position bias"}

_WIDTHS = ("qk_head_dim", "head_dim", "head_size")  # attributes of attention layers for the width of queries; the first counts


@dataclass(frozen=True)
class PadLayout:
    """Position of each packed row in a padded [N * L] grid. Built at most once per batch, by the first layer that pads."""

    num_sequences: int  # N
    max_length: int  # L
    positions: torch.Tensor | None  # [T] int64; None if all sequences have length L: padding is then a view

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, max_length: int) -> PadLayout:
        """Layout of the sequences with the boundaries cu_seqlens [N+1]; max_length is L."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        num_sequences, num_rows = lengths.numel(), int(cu_seqlens[-1])
        if num_sequences * max_length == num_rows:
            return cls(num_sequences, max_length, None)
        shift = torch.arange(num_sequences, device=lengths.device) * max_length - cu_seqlens[:-1].long()
        rows = torch.arange(num_rows, device=lengths.device)
        return cls(num_sequences, max_length, rows + shift.repeat_interleave(lengths, output_size=num_rows))

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads, D] -> [N, heads, L, D], zeros after each sequence's end."""
        heads, dim = x.shape[1:]
        x = x.reshape(x.shape[0], heads * dim)
        if self.positions is not None:
            x = x.new_zeros(self.num_sequences * self.max_length, heads * dim).index_copy(0, self.positions, x)
        return x.view(self.num_sequences, self.max_length, heads, dim).transpose(1, 2)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """[N, heads, L, D] -> [T, heads, D]."""
        heads, dim = x.shape[1], x.shape[3]
        x = x.transpose(1, 2).reshape(self.num_sequences * self.max_length, heads * dim)
        return (x if self.positions is None else x.index_select(0, self.positions)).view(-1, heads, dim)


def needs_padding(device: torch.device, dtype: torch.dtype) -> bool:
    """True if no variable-length kernel supports the device and dtype (CPU; fp32 anywhere). Attention then pads sequences, or
    takes them one by one (bf16 on a CPU)."""
    return device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16)


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise UserError if the model gives its attention an argument that srpo does not compute."""
    extra = [words for name, words in _UNSUPPORTED.items() if arguments.get(name) is not None]
    if extra:
        raise UserError(f"its attention needs {', '.join(extra)}, which srpo does not compute")


def band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[L, L] bool: which keys each row attends to, the last `window` up to itself."""
    rows = torch.arange(length, device=device)
    behind = rows[:, None] - rows
    return (behind >= 0) & (behind < window)


def by_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
) -> torch.Tensor:
    """Causal attention of sequences of equal length, [N, heads, L, D]."""
    mask = None if window is None else band(query.shape[2], window, query.device)
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float | None, window: int | None
) -> torch.Tensor:
    """Causal attention of each sequence by itself, [T, heads, D]: no row is padding, and no bit depends on a neighbour.

    Up to LONGEST_PLAIN rows by `plain_attention`, beyond them by torch's kernel, which stores no matrix of scores.
    """
    factor = query.shape[2] ** -0.5 if scale is None else scale
    size = min(max(lengths, default=0), LONGEST_PLAIN)
    hidden = ~band(size, size if window is None else window, query.device)
    bias = torch.zeros(size, size, dtype=torch.promote_types(query.dtype, torch.float32)).masked_fill_(hidden, -torch.inf)
    out = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        if len(q) <= LONGEST_PLAIN:
            out.append(plain_attention(q, k, v, factor, bias[: len(q), : len(q)]))
        else:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            out.append(by_torch(q, k, v, factor, window)[0].transpose(0, 1))
    return torch.cat(out)


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    pad_layout: Callable[[], PadLayout] | None = None,
    sliding_window: int | None = None,
    *,
    kernel: Kernel | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed sequence: ([1, T, heads, D], None).

    query [1, heads, T, D]; key, value [1, kv_heads, T, D]; cu_seq_lens_q [N+1] int32; max_length_q is L.
    pad_layout: the layout of these sequences, for all layers; None: each layer that pads builds its own.
    sliding_window: a row attends to so many keys, itself included; None: to all before it.
    kernel: computes everything; None: `one_by_one` in bf16 on a CPU, else torch's kernel, or padding if that cannot take the
    device, dtype or width of heads.
    Dropout is never applied, so that log-probabilities are deterministic. Raises ValueError if `cu_seq_lens_q` or
    `max_length_q` is missing, if the batch dimension is not 1, and for an argument that is not computed.
    """
    if cu_seq_lens_q is None or max_length_q is None or query.shape[0] != 1:
        raise ValueError(
            f"{ATTENTION} attention takes one packed row with cu_seq_lens_q and max_length_q, and they have not come: call "
            "srpo.policy.model.hidden_states, or model.set_attn_implementation('sdpa') for padded inputs and generation"
        )
    check_arguments(kwargs)
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    too_wide = max(query.shape[2], value.shape[2]) > WIDEST_OF_TORCH
    if kernel is None and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return one_by_one(query, key, value, cu_seq_lens_q.diff().tolist(), scaling, window)[None], None
    if kernel is None and (too_wide or needs_padding(query.device, query.dtype)):
        layout = pad_layout() if pad_layout else PadLayout.of(cu_seq_lens_q, max_length_q)
        query, key, value = (layout.pad(x) for x in (query, key, value))
        # Padding follows the last row of each sequence, so the causal mask alone hides it from every real row.
        return layout.unpad(by_torch(query, key, value, scaling, window))[None], None
    kernel = kernel or kernel_of("torch")
    scale = query.shape[2] ** -0.5 if scaling is None else scaling
    return kernel(query, key, value, cu_seq_lens_q, max_length_q, scale, window)[None], None


def registered_attention(attention: str) -> str:
    """Transformers' name of one of `NAMES`, whose kernel is looked up here, once. MissingPackage if it is not installed."""
    check_name(attention)
    if attention != "torch":
        AttentionInterface.register(_REGISTERED[attention], partial(varlen_attention, kernel=kernel_of(attention)))
    return _REGISTERED[attention]


def head_widths(model: nn.Module) -> list[tuple[int, int]]:
    """(width of queries and keys, width of values) of each kind of head in the model, sorted.

    Taken from the layers, not from the config: transformers' configs name widths in many ways, and some layers have their own.
    """
    widths = set()
    for module in model.modules():
        width = next((size for name in _WIDTHS if isinstance(size := getattr(module, name, None), int)), None)
        if width is not None:
            widths.add((width, getattr(module, "v_head_dim", None) or width))
    return sorted(widths)


# No mask function is registered under these names, so transformers builds no attention mask for them.
AttentionInterface.register(ATTENTION, varlen_attention)
