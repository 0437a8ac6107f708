"""Weights in anonymous shared memory: the trainer writes them once, the engine's process maps the same pages.

The segments have no name: nothing is left behind whatever is killed, and the size of /dev/shm is no limit. Their descriptors go
to the engine's process over a private socket. All buckets stay as they are until the next sync, so an engine that died is
brought back to the weights that it had without the trainer (which may be sharded, or already a step further).

Ranks that send only the experts they own: nothing here needs a sender to have all of a model. `WeightStore.write` takes whatever
blocks it is given, each with the checkpoint names and places of its parts; the engine collects a layer's tensors by name, from
whichever bucket they come in, and makes its kernels when it has the last; the sums of a group add up over senders (`add_sums`).
Such a rank would give `write` a local shard with the `Part`s of its own experts in place of gathered parameters, ranks of one
engine would give their descriptors to it over the same socket, and the one that says `finish` would first add up their sums.
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
from srpo.rollout.weights.buckets import Entry, Packer, add_sums, copy_counting, group_of

_KEYS = itertools.count()


@contextmanager
def half_the_threads() -> Iterator[None]:
    """While buckets are written and loaded two processes compute: with all cores each, their threads wait for one another's."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


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

    def write(self, blocks: Iterable[Block], version: int) -> Iterator[Bucket]:
        """Write blocks and yield each bucket as soon as it is full; whole once this is exhausted.

        Only one tensor of `blocks` is held at a time, and written in one go. Raises ValueError for a name that comes twice.
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
            add_sums(self.sums, [(parts[0].name, copy_counting(target, tensor))])
            entries += [block.part(part.name, part.first, part.shape) for part in parts]
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
