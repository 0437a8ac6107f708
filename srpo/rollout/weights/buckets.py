"""Buckets of weights, which say where each tensor lies, and bit sums, which show whether all weights arrived.

A bit sum is the sum of a tensor's bit patterns as integers, modulo 2^64. It is exact in any order of summation, and a permutation
of the elements or added zeros do not change it. So it stays valid after an engine has packed q, k and v into one tensor, repacked
experts for its kernels or padded the vocabulary.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from srpo.core.errors import UserError

ALIGNMENT = 64  # bytes; every tensor begins at a multiple of it
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 17  # elements widened to int64 at once on a CPU: 1 MiB stays in cache and takes a ninth of the time of 128 MiB
_DEVICE_CHUNK = 1 << 26  # the same on another device
_MASK = (1 << 64) - 1
_LAYER = re.compile(r"^.*?\.layers\.\d+(?=\.)")


@dataclass(frozen=True)
class Entry:
    """One tensor of a bucket, under its checkpoint name."""

    name: str
    dtype: str  # torch's name without "torch."
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the bucket
    num_bytes: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of the bucket's buffer, [bytes] uint8."""
        return buffer[self.offset : self.offset + self.num_bytes].view(getattr(torch, self.dtype)).view(self.shape)

    def part(self, name: str, first: int, shape: tuple[int, ...]) -> Entry:
        """The entry of a tensor that lies inside this one, from element `first` on."""
        item = getattr(torch, self.dtype).itemsize
        return Entry(name, self.dtype, shape, self.offset + first * item, math.prod(shape) * item)


@dataclass(frozen=True)
class Bucket:
    """The tensors that one segment of shared memory holds after a sync."""

    segment: int  # key of the segment
    entries: tuple[Entry, ...]


class Packer:
    """Assigns tensors to buckets of `bucket_bytes`, one after another; a larger tensor gets a bucket of its own."""

    def __init__(self, bucket_bytes: int) -> None:
        if bucket_bytes < 1:
            raise UserError(f"buckets of {bucket_bytes} bytes hold no weights: set rollout.vllm.bucket_mib to 1 or more")
        self.bucket_bytes = bucket_bytes
        self._end = 0  # bytes used in the open bucket

    def place(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> tuple[bool, Entry]:
        """(whether the tensor opens a new bucket, its entry)."""
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        opens = self._end == 0 or offset + num_bytes > self.bucket_bytes
        if opens:
            offset = 0
        self._end = max(offset + num_bytes, 1)
        return opens, Entry(name, str(dtype).removeprefix("torch."), tuple(shape), offset, num_bytes)


def bit_sum(tensor: torch.Tensor) -> int:
    """Sum of the bit patterns of a tensor modulo 2^64."""
    return bit_sums([tensor])[0]


@torch.no_grad()
def bit_sums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """`bit_sum` of each tensor. They are added up on the device of the tensors, one for all, and read from it once."""
    sums = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
        parts = [chunk.sum(dtype=torch.int64) for chunk in flat.split(_chunk_of(flat))]
        sums.append(parts[0] if len(parts) == 1 else torch.stack(parts).sum())  # int64 wraps around, as modulo 2^64
    return [value & _MASK for value in torch.stack(sums).tolist()] if sums else []


@torch.no_grad()
def copy_and_sum(target: torch.Tensor, source: torch.Tensor) -> int:
    """Copy `source` into `target` (contiguous; its dtype may differ) and return the bit sum of the result. Each chunk is summed
    while it is in the cache, which saves a pass over memory."""
    integers = _INTEGERS[target.element_size()]
    size, total = _chunk_of(target), 0
    for into, out_of in zip(target.view(-1).split(size), source.detach().reshape(-1).split(size), strict=True):
        total += int(into.copy_(out_of).view(integers).sum(dtype=torch.int64))
    return total & _MASK


@torch.no_grad()
def place_sum(tensor: torch.Tensor) -> int:
    """Like `bit_sum`, but each pattern is weighted by its position, so a permutation changes the sum: it compares layouts."""
    flat = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = place = 0
    for chunk in flat.split(_chunk_of(flat)):
        weights = torch.arange(place, place + chunk.numel(), device=chunk.device).remainder_(65521).add_(1)
        total += int((chunk.to(torch.int64) * weights).sum())
        place += chunk.numel()
    return total & _MASK


def _chunk_of(tensor: torch.Tensor) -> int:
    return _CHUNK if tensor.device.type == "cpu" else _DEVICE_CHUNK


@functools.cache
def group_of(name: str) -> str:
    """The part of a model whose bit sum includes a parameter: its decoder layer, else its module. It is the same for trainer and
    engine, however either packs tensors inside a layer."""
    layer = _LAYER.match(name)
    return layer[0] if layer else name.rpartition(".")[0]


def add_sums(sums: dict[str, int], named: Iterable[tuple[str, int]]) -> None:
    """Add bit sums of parameters to the sums of their groups, in place."""
    for name, value in named:
        group = group_of(name)
        sums[group] = (sums.get(group, 0) + value) & _MASK


def differing_groups(expected: dict[str, int], found: dict[str, int]) -> list[str]:
    """Groups whose sums differ or that only one side has, sorted."""
    return sorted(g for g in expected.keys() | found.keys() if expected.get(g) != found.get(g))
