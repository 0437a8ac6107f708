"""Files of judged pairs: read as a stream of `Example`, written, and split by query. The schema is in docs/data.md.

Reading is strict: a row that violates the schema raises UserError with its file, its line and the fix, because silently dropping
a grade or ignoring a column costs more than a run that does not start.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pyarrow as pa
import pyarrow.parquet as pq

from srpo.core.errors import UserError
from srpo.core.files import whole_file
from srpo.core.jsonl import json_lines
from srpo.core.steps import StepSchema
from srpo.data import esci
from srpo.data.examples import Example
from srpo.data.parquet import parquet_rows
from srpo.data.rows import REQUIRED, example_from_row, row_from_example

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_PARQUET_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in REQUIRED),
        ("fields", pa.map_(pa.string(), pa.string())),
        ("gold", pa.list_(pa.string())),
        ("truth", pa.list_(pa.string())),
        ("tags", pa.map_(pa.string(), pa.string())),
    ]
)
_ROWS_PER_GROUP = 4096
_WANT = f"one JSON object per line, with {', '.join(REQUIRED)}"


def read_examples(path: str | Path, schema: StepSchema, *, check_duplicates: bool = True) -> Iterator[Example]:
    """Stream the examples of a file, a folder of shards (in the order of their names) or an ESCI release, in stored order.

    `schema` has the steps that `gold` and `truth` have entries of, with the possible answers, and the grades.
    Memory does not grow with the data, except for an 8-byte hash of each example_id to detect duplicates (about 70 MB per
    million; none with `check_duplicates=False`), and for the products of an official ESCI release.
    Raises UserError at once for a path with nothing to read; while streaming, for the first bad row, a duplicate example_id, or
    a path without examples.
    """
    return _examples(_rows(path), str(path), schema, check_duplicates)


def load_examples(path: str | Path, schema: StepSchema, limit: int = 0) -> list[Example]:
    """All examples of a path, or the first `limit`, as a list. Other arguments and errors as in `read_examples`."""
    return list(islice(read_examples(path, schema), limit or None))


def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Stream examples to a .jsonl, .jsonl.gz or .parquet file and return how many. The file appears only when it is complete.

    The same examples give the same bytes. UserError for another suffix or if there are no examples.
    """
    path = Path(path)
    suffix = _suffix(path)
    if not suffix:
        raise UserError(f"cannot write {path}: the name has to end in {', '.join(SUFFIXES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        num_written = (
            _write_parquet(part, examples) if suffix == ".parquet" else _write_jsonl(part, examples, suffix.endswith(".gz"))
        )
        if not num_written:
            raise UserError(f"no examples to write to {path}")
    return num_written


def split_by_query(examples: Iterable[Example], eval_frac: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, eval): about `eval_frac` of the queries are held out, and no query occurs in both parts.

    A hash of (seed, query text) decides, so adding data moves no old query. Pairs that share a query_id or a query text (up to
    case and spaces) are always in the same part, in any order of the examples. Both parts keep that order. UserError if a part
    would be empty.
    """
    examples = list(examples)
    if not 0.0 < eval_frac < 1.0:
        raise ValueError(f"eval_frac is {eval_frac}: give a fraction between 0 and 1")
    parent: dict[tuple[str, str], tuple[str, str]] = {}  # union-find over ("1", query text) and ("2", query_id)

    def find(node: tuple[str, str]) -> tuple[str, str]:
        while (above := parent.setdefault(node, node)) != node:
            parent[node] = parent[above]
            node = parent[node]
        return node

    for example in examples:
        # the smaller node becomes the root: always a query text, and the same one for any order of the examples
        low, high = sorted((find(("1", _normalized(example.query))), find(("2", example.query_id))))
        parent[high] = low
    held_out = {
        root: int.from_bytes(_digest(f"{seed}|{root[1]}"), "big") < eval_frac * 2**64
        for root in {find(("2", example.query_id)) for example in examples}
    }
    train, evaluation = [], []
    for example in examples:
        (evaluation if held_out[find(("2", example.query_id))] else train).append(example)
    if not train or not evaluation:
        raise UserError(
            f"eval_frac {eval_frac} with seed {seed} puts {len(train)} examples in train and {len(evaluation)} in eval "
            f"({len(held_out)} queries): give more queries, another eval_frac or another seed"
        )
    return train, evaluation


def _normalized(query: str) -> str:
    return " ".join(query.casefold().split())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def _examples(
    rows: Iterator[tuple[str, dict[str, Any]]], path: str, schema: StepSchema, check_duplicates: bool
) -> Iterator[Example]:
    seen: set[int] = set()
    example = None
    for where, row in rows:
        example = example_from_row(row, where, schema)
        if check_duplicates:
            key = int.from_bytes(_digest(example.example_id), "big")
            if key in seen:
                raise UserError(f"{where}: example_id {example.example_id!r} occurs a second time: give every pair its own")
            seen.add(key)
        yield example
    if example is None:
        raise UserError(f"{path} has no examples: give a file that is not empty, or options after the path that match some rows")


def _rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line N", row of the schema) of each row of a path. UserError at once if there is nothing to read."""
    path, esci_options = _split_options(path)
    if not path.exists():
        raise UserError(f"no such file or folder: {path}: check data.train and data.eval")
    if esci.is_official(path):
        return esci.official_rows(path, esci_options or esci.EsciOptions())
    if esci_options is not None:
        raise UserError(f"{path} is not an official ESCI release: remove ?locale=, version= and split= from the path")
    files = (
        sorted(p for p in path.iterdir() if _suffix(p) and p.is_file() and not p.name.startswith("."))
        if path.is_dir()
        else [path]
    )
    if not files or not _suffix(files[0]):
        raise UserError(f"nothing to read in {path}: expected {', '.join(SUFFIXES)} or an official ESCI release (docs/data.md)")
    return (row for file in files for row in _file_rows(file))


def _split_options(path: str | Path) -> tuple[Path, esci.EsciOptions | None]:
    if Path(path).exists() or "?" not in str(path):
        return Path(path), None
    bare, _, query = str(path).partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    chosen = dict(pairs)
    if not chosen or chosen.keys() - {"locale", "version", "split"}:
        raise UserError(
            f"cannot read the options {query!r} of {bare}: write ?locale=us&version=small&split=train, or a part of it"
        )
    if len(chosen) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in chosen if names.count(name) > 1)
        raise UserError(f"the options {query!r} of {bare} give {twice} more than once: keep one of them")
    return Path(bare), esci.EsciOptions(**chosen)


def _file_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    raw = parquet_rows(file) if _suffix(file) == ".parquet" else json_lines(file, _WANT)
    for where, row in raw:
        yield where, esci.from_dump(row, where) if esci.is_dump_row(row) else row


def _write_jsonl(path: Path, examples: Iterable[Example], compress: bool) -> int:
    num_written = 0
    with ExitStack() as stack:
        file = stack.enter_context(path.open("wb"))
        if compress:  # no file name and no time in the header, so that the same examples give the same bytes
            file = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0))
        for example in examples:
            file.write(json.dumps(row_from_example(example), ensure_ascii=False).encode() + b"\n")
            num_written += 1
    return num_written


def _write_parquet(path: Path, examples: Iterable[Example]) -> int:
    num_written = 0
    stream = iter(examples)
    with pq.ParquetWriter(path, _PARQUET_SCHEMA) as writer:
        while rows := [row_from_example(example) for example in islice(stream, _ROWS_PER_GROUP)]:
            for row in rows:
                row["fields"], row["tags"] = list(row["fields"].items()), list(row["tags"].items())
            writer.write_table(pa.Table.from_pylist(rows, schema=_PARQUET_SCHEMA))
            num_written += len(rows)
    return num_written
