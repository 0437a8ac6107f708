"""Weights in anonymous shared memory: the trainer writes them once, and the engine's process maps the same pages.

The segments have no name, so a killed process leaves nothing behind, and the size of /dev/shm is no limit. Their descriptors go
to the engine's process over a private socket. The buckets do not change until the next sync, so a replacement for a dead engine
gets the same weights without the policy (which may be sharded, or already a step further).

Not implemented, but possible: ranks that send only the experts they own. No sender has to hold the whole model:
`WeightStore.write` takes any blocks, each with the checkpoint names and positions of its parts; the engine collects a layer's
tensors by name from any bucket, and makes its kernels when the last one has arrived; the sums of a group add up over senders
(`add_sums`). Such a rank would call `write` with its local shard and the `Part`s of its own experts in place of gathered
parameters. The ranks of one engine would pass it their descriptors over the same socket, and the rank that sends `finish` would
first add up their sums.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from srpo.policy.checkpoint_names import Block
from srpo.rollout.weights.buckets import Bucket, Entry, Packer, add_sums, copy_and_sum, group_of

_KEYS = itertools.count()


@contextmanager
def half_the_threads() -> Iterator[None]:
    """Halve torch's threads: one process writes buckets while the other loads them, and with all cores each their threads would
    wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Segment:
    """Shared memory for one bucket: `num_bytes` behind a file descriptor."""

    key: int  # never reused for another segment
    fd: int
    num_bytes: int
    buffer: torch.Tensor  # [num_bytes] uint8

    @classmethod
    def create(cls, num_bytes: int) -> Segment:
        """Allocate shared memory; pages are committed when they are first written."""
        fd = os.memfd_create("srpo-weights", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        return cls(next(_KEYS), fd, num_bytes, map_segment(fd, num_bytes))


def map_segment(fd: int, num_bytes: int) -> torch.Tensor:
    """The shared memory behind a descriptor as [num_bytes] uint8. It is unmapped with the last tensor that views it."""
    return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)


@dataclass
class WeightStore:
    """The policy's weights of one version, in segments that every sync overwrites.

    dtype: the engine's; tensors of another floating-point dtype are converted. `version` is None while the store is incomplete.
    """

    bucket_bytes: int
    dtype: torch.dtype
    version: int | None = None
    segments: list[Segment] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    sums: dict[str, int] = field(default_factory=dict)  # bit sum of each group, see `buckets.group_of`

    def write(self, blocks: Iterable[Block], version: int) -> Iterator[Bucket]:
        """Write blocks and yield each bucket as soon as it is full. The store is complete once the generator is exhausted.

        Holds one tensor of `blocks` at a time. Raises ValueError for a name that comes twice.
        """
        self.version, self.buckets, self.sums = None, [], {}
        packer, entries, seen = Packer(self.bucket_bytes), [], set()
        for tensor, parts in blocks:
            for part in parts:
                if part.name in seen:
                    raise ValueError(f"parameter {part.name} comes twice: a checkpoint has each name once")
                seen.add(part.name)
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            opens, block = packer.place(parts[0].name, tensor.shape, dtype)
            if opens and entries:
                yield self._close(entries)
                entries = []
            target = block.view(self._segment(len(self.buckets), block.offset + block.num_bytes))
            assert len({group_of(part.name) for part in parts}) == 1, "a parameter lies in one decoder layer"
            add_sums(self.sums, [(parts[0].name, copy_and_sum(target, tensor))])
            entries += [block.part(part.name, part.first, part.shape) for part in parts]
        if entries:
            yield self._close(entries)
        self.version = version

    def _close(self, entries: list[Entry]) -> Bucket:
        self.buckets.append(Bucket(self.segments[len(self.buckets)].key, tuple(entries)))
        return self.buckets[-1]

    def _segment(self, index: int, needed: int) -> torch.Tensor:
        """The buffer of segment `index`; the segment is created, or replaced if it is smaller than `needed` bytes."""
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
        """Bytes of all tensors in the store."""
        return sum(entry.num_bytes for bucket in self.buckets for entry in bucket.entries)

    def close(self) -> None:
        """Release the memory; pages that an engine still maps are released when it unmaps them."""
        for segment in self.segments:
            os.close(segment.fd)
        self.segments, self.buckets, self.version = [], [], None
