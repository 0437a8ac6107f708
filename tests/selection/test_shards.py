from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srpo.data.examples import Example
from srpo.selection.records import Record
from srpo.selection.shards import (
    check_shard,
    fingerprint,
    finished_shards,
    read_shard,
    shard_path,
    shard_seed,
    shards_of,
    write_shard,
)

EXAMPLES = [Example(f"e{i}", f"q{i}", "boots", f"title {i}", fields={"a": "1", "b": "2"}) for i in range(23)]


def record(example: Example, seed: int) -> Record:
    rng = random.Random(f"{seed} {example.example_id}")

    def maybe() -> float | None:
        return rng.choice((None, rng.random()))

    n = [rng.randrange(2**31) for _ in range(5)]
    steps = tuple(rng.random() for _ in range(5))
    return Record(
        example.example_id,
        maybe(),
        maybe(),
        steps,
        maybe(),
        tuple(maybe() for _ in range(5)),
        maybe(),
        maybe(),
        n[0],
        n[1],
        n[2],
        n[3],
        n[4],
        rng.choice(({}, {"grade": "L2", "type": "q\u00e4 / x"})),
    )


@pytest.mark.parametrize("size", [1, 4, 23, 100])
def test_shards_are_consecutive_and_complete(size: int) -> None:
    shards = list(shards_of(EXAMPLES, size))
    assert [number for number, _ in shards] == list(range(-(-23 // size)))
    assert [e for _, shard in shards for e in shard] == EXAMPLES
    assert {len(shard) for _, shard in shards[:-1]} <= {size} and 1 <= len(shards[-1][1]) <= size
    assert list(shards_of([], size)) == []


def test_a_stream_is_read_one_shard_at_a_time() -> None:
    num_read = 0

    def stream() -> Iterator[Example]:
        nonlocal num_read
        while True:  # an endless stream
            num_read += 1
            yield EXAMPLES[0]

    for number, shard in shards_of(stream(), 10):
        assert len(shard) == 10 and num_read == 10 * (number + 1)
        if number == 50:
            break


def test_records_are_read_back_as_they_were(tmp_path: Path) -> None:
    for number, examples in shards_of(EXAMPLES, 10):
        records = [record(example, number) for example in examples]
        path = write_shard(tmp_path / "new", number, examples, records)
        assert path == shard_path(tmp_path / "new", number)
        assert read_shard(tmp_path / "new", number) == records
        before = path.read_bytes()
        write_shard(tmp_path / "new", number, examples, records)
        assert path.read_bytes() == before  # the same records, the same bytes
    assert finished_shards(tmp_path / "new") == {0, 1, 2}
    assert [p.name for p in sorted((tmp_path / "new").iterdir())] == [f"records-00000{i}.parquet" for i in range(3)]
    assert finished_shards(tmp_path / "none") == frozenset()


def test_what_was_left_of_a_killed_write_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".records-000004.parquet.part").write_bytes(b"half of it")
    assert finished_shards(tmp_path) == frozenset()
    write_shard(tmp_path, 4, EXAMPLES[:1], [record(EXAMPLES[0], 0)])
    assert finished_shards(tmp_path) == {4} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"title": "x"},
        {"query": "x"},
        {"fields": {"b": "2", "a": "1"}},
        {"gold": ("L1",)},
        {"tags": {"a": "b"}},
        {"truth": ("L1",)},
    ],
)
def test_every_part_of_an_example_is_in_the_fingerprint(tmp_path: Path, change: dict) -> None:
    """The order of fields counts, too: prompts depend on it."""
    shard = EXAMPLES[:3]
    write_shard(tmp_path, 0, shard, [record(e, 0) for e in shard])
    check_shard(tmp_path, 0, shard)
    changed = [shard[0], replace(shard[1], **change), shard[2]]
    assert fingerprint(changed) != fingerprint(shard)
    for other in (changed, shard[:2], shard[::-1]):
        with pytest.raises(ValueError, match=r"made from other data .* restore the data, or use another folder"):
            check_shard(tmp_path, 0, other)


def test_seeds_follow_from_the_run_s_seed_and_the_ids() -> None:
    seeds = [shard_seed(seed, shard) for seed in (0, 1) for _, shard in shards_of(EXAMPLES, 5)]
    assert len(set(seeds)) == len(seeds)
    retold = [replace(example, title="other") for example in EXAMPLES[:5]]
    assert shard_seed(1, retold) == shard_seed(1, EXAMPLES[:5])
    assert all(0 <= number < 2**64 for seed in seeds for number in seed)


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", None])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = shard_path(tmp_path, 7)
    if content is None:
        pq.write_table(pa.table({"x": [1]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"records-000007\.parquet"):
        check_shard(tmp_path, 7, EXAMPLES[:1])
    if content is not None:
        with pytest.raises(ValueError, match=r"records-000007\.parquet: not a readable file of records .*: remove it"):
            read_shard(tmp_path, 7)
