"""Weights in anonymous shared memory: the trainer writes them once, the engine's process maps the same pages.

The segments have no name: nothing is left behind whatever is killed, and the size of /dev/shm is no limit. Their descriptors go
to the engine's process over a private socket. All buckets stay as they are until the next sync, so an engine that died is
brought back to the weights that it had without the trainer (which may be sharded, or already a step further).
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from srpo.rollout.weights import Entry, Packer, add_sums, bit_sum

_KEYS = itertools.count()


@dataclass
class Segment:
    """One bucket: `num_bytes` of shared memory behind a file descriptor."""

    key: int  # never used again for another segment
    fd: int
    num_bytes: int
    buffer: torch.Tensor  # [num_bytes] uint8

    @classmethod
    def create(cls, num_bytes: int) -> Segment:
        """New shared memory; pages are taken when they are first written."""
        fd = os.memfd_create("srpo-weights", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        return cls(next(_KEYS), fd, num_bytes, map_segment(fd, num_bytes))


def map_segment(fd: int, num_bytes: int) -> torch.Tensor:
    """The shared memory behind a descriptor as [num_bytes] uint8. It is unmapped with the last tensor that looks into it."""
    return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)


@dataclass(frozen=True)
class Bucket:
    """What one segment holds after a sync."""

    segment: int  # its key
    entries: tuple[Entry, ...]


@dataclass
class WeightStore:
    """The policy's weights of one version, in segments that are written again at every sync.

    dtype: the engine's; what is of another floating type is converted. `version` is None while the store is not whole.
    """

    bucket_bytes: int
    dtype: torch.dtype
    version: int | None = None
    segments: list[Segment] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    sums: dict[str, int] = field(default_factory=dict)  # bit sum of each group, see `weights.group_of`

    def write(self, params: Iterable[tuple[str, torch.Tensor]], version: int) -> Iterator[Bucket]:
        """Write (checkpoint name, tensor) pairs and yield each bucket as soon as it is full; whole once this is exhausted.

        Only one tensor of `params` is held at a time. Raises ValueError for a name that comes twice.
        """
        self.version, self.buckets, self.sums = None, [], {}
        packer, entries, seen = Packer(self.bucket_bytes), [], set()
        for name, tensor in params:
            if name in seen:
                raise ValueError(f"parameter {name} comes twice: a checkpoint has each name once")
            seen.add(name)
            tensor = tensor.detach().to(self.dtype) if tensor.is_floating_point() else tensor.detach()
            opens, entry = packer.place(name, tensor.shape, tensor.dtype)
            if opens and entries:
                yield self._close(entries)
                entries = []
            entry.view(self._segment(len(self.buckets), entry.offset + entry.num_bytes)).copy_(tensor)
            add_sums(self.sums, [(name, bit_sum(tensor))])
            entries.append(entry)
        if entries:
            yield self._close(entries)
        self.version = version

    def _close(self, entries: list[Entry]) -> Bucket:
        self.buckets.append(Bucket(self.segments[len(self.buckets)].key, tuple(entries)))
        return self.buckets[-1]

    def _segment(self, index: int, needed: int) -> torch.Tensor:
        """The buffer of segment `index`, which is made, or made anew where it is too small for `needed` bytes."""
        if index < len(self.segments) and self.segments[index].num_bytes >= needed:
            return self.segments[index].buffer
        assert index >= len(self.segments) or needed > self.bucket_bytes, "only a bucket's first tensor outgrows it"
        segment = Segment.create(max(needed, self.bucket_bytes))
        if index < len(self.segments):
            os.close(self.segments[index].fd)
            self.segments[index] = segment
        else:
            self.segments.append(segment)
        return segment.buffer

    def descriptor(self, bucket: Bucket) -> int:
        """The file descriptor of a bucket's segment."""
        return next(segment.fd for segment in self.segments if segment.key == bucket.segment)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors in it."""
        return sum(entry.num_bytes for bucket in self.buckets for entry in bucket.entries)

    def close(self) -> None:
        """Give the memory back (that which an engine still maps, when the engine unmaps it)."""
        for segment in self.segments:
            os.close(segment.fd)
        self.segments, self.buckets, self.version = [], [], None
