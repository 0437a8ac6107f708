"""Shards of a stream of examples: each consists of consecutive examples and one Parquet file with their records.

The bounds of a shard depend only on the stream and the shard size, so the number of ranks and restarts does not change them. The
file of a shard is written atomically: if it exists, the shard is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from srpo.core.digests import digest_of
from srpo.core.errors import UserError
from srpo.core.files import whole_file
from srpo.data.examples import Example
from srpo.selection.records import Record

_FINGERPRINT, _CONTENTS = b"srpo.examples", b"srpo.records"  # digests of the examples and of their records
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError, KeyError, TypeError)
_TYPES: dict[str, pa.DataType] = {
    "example_id": pa.string(),
    "step_rewards": pa.list_(pa.float64()),
    "judge_scores": pa.list_(pa.float64()),
    "tags": pa.map_(pa.string(), pa.string()),
}
_SCHEMA = pa.schema(
    [(f.name, _TYPES.get(f.name, pa.int32() if f.name.startswith("num_") else pa.float64())) for f in fields(Record)]
)


def shards_of(examples: Iterable[Example], size: int) -> Iterator[tuple[int, list[Example]]]:
    """(number, examples) of consecutive shards of `size` examples; the last may be smaller. Holds one shard at a time."""
    stream, number = iter(examples), 0
    while shard := list(islice(stream, size)):
        yield number, shard
        number += 1


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash of the examples, including the order of their fields."""
    return digest_of(examples)


def shard_seed(seed: int, examples: Sequence[Example]) -> tuple[int, ...]:
    """Seeds of a shard's random draws: the seed of the run and a hash of the shard's example ids."""
    names = "\n".join(example.example_id for example in examples).encode("utf-8", "backslashreplace")
    return seed, int.from_bytes(hashlib.blake2b(names, digest_size=8).digest(), "big")


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"records-{number:06d}.parquet"


def finished_shards(folder: Path) -> frozenset[int]:
    """Numbers of the shards whose file exists."""
    return frozenset(int(path.stem.removeprefix("records-")) for path in folder.glob("records-*.parquet"))


def write_shard(folder: Path, number: int, examples: Sequence[Example], records: Sequence[Record]) -> Path:
    """Write the records of a shard, record i for example i, and return the path. Atomic, and durable even after a power cut."""
    assert [record.example_id for record in records] == [example.example_id for example in examples]
    folder.mkdir(parents=True, exist_ok=True)
    path = shard_path(folder, number)
    rows: list[dict[str, Any]] = [{**asdict(record), "tags": list(record.tags.items())} for record in records]
    marks = {_FINGERPRINT: fingerprint(examples).encode(), _CONTENTS: digest_of(records).encode()}
    table = pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata(marks))
    with whole_file(path) as part, part.open("wb") as file:
        pq.write_table(table, file)
    return path


def read_shard(folder: Path, number: int) -> list[Record]:
    """The records of a shard. UserError if its file is missing, unreadable or not as it was written."""
    path = shard_path(folder, number)
    try:
        stored = (pq.read_schema(path).metadata or {}).get(_CONTENTS, b"").decode()
        rows = pq.read_table(path, schema=_SCHEMA).to_pylist(maps_as_pydicts="strict")
    except _UNREADABLE as error:
        raise UserError(_unreadable(path, error)) from error
    values: list[dict[str, Any]] = [{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    records = [Record(**row) for row in values]
    if digest_of(records) != stored:
        raise UserError(_unreadable(path, "its records are not those that were written"))
    return records


def check_shard(folder: Path, number: int, examples: Sequence[Example]) -> None:
    """Raise UserError if the file of a shard is unreadable or was made from other examples."""
    path = shard_path(folder, number)
    try:
        stored = (pq.read_schema(path).metadata or {}).get(_FINGERPRINT, b"").decode()
    except _UNREADABLE as error:
        raise UserError(_unreadable(path, error)) from error
    if stored != fingerprint(examples):
        first, last = examples[0].example_id, examples[-1].example_id
        raise UserError(
            f"{path} was made from other data than the present examples {first} to {last}: "
            "restore the data, or use another folder for the records"
        )


def _unreadable(path: Path, error: object) -> str:
    return f"{path}: not a readable file of records ({error}): remove it, then its examples are sampled again"
