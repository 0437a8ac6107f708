"""Files of judged pairs: read as a stream of `Example`, and written. The schema and the formats are in docs/data.md.

Reading is strict: a row that violates the schema raises UserError with its file, its line and the fix, because silently dropping
a grade or ignoring a column costs more than a run that does not start.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
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
from srpo.data import delimited, esci, wands
from srpo.data.columns import Columns
from srpo.data.examples import Example
from srpo.data.parquet import column_names, parquet_rows
from srpo.data.rows import example_from_row, row_from_example
from srpo.data.splits import QuerySplit, split_by_query

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")  # of the files that are written
_READ = (*delimited.SUFFIXES, *SUFFIXES)
_TEXTS = pa.map_(pa.string(), pa.string())
_PARQUET_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("example_id", "query_id", "query", "title")),
        ("fields", _TEXTS),
        ("gold", pa.list_(pa.string())),
        ("truth", pa.list_(pa.string())),
        ("tags", _TEXTS),
    ]
)
_ROWS_PER_GROUP = 4096
_SHOWN = 5  # repeated rows that a message lists
_WANT = "one JSON object per line, with query and title"
_SPLIT_SEED = 0  # of data.eval_frac: no setting, so that every run holds out the same queries
_Rows = Iterator[tuple[str, dict[str, Any]]]


def read_examples(
    path: str | Path,
    schema: StepSchema,
    *,
    columns: Mapping[str, str] | None = None,
    eval_frac: float = 0.0,
    held_out: bool = False,
    check_duplicates: bool = True,
) -> Iterator[Example]:
    """Stream the examples of a file, a folder of shards (in the order of their names), an ESCI release or WANDS, in stored order.

    `schema` has the steps that `gold` and `truth` have entries of, with the possible answers, and the grades. `columns` maps keys
    of the schema to columns of the files (`srpo.data.columns`). `eval_frac` above 0 leaves out the queries that data.eval_frac
    holds out, or with `held_out` all others; the path is then read twice.
    Memory does not grow with the data, except for an 8-byte hash of each example_id to detect duplicates (about 70 MB per
    million; none with `check_duplicates=False`), and for the products of ESCI and WANDS.
    Raises UserError at once for a path with nothing to read; while streaming, for the first bad row, a duplicate example_id, or
    a path without examples.
    """
    known = Columns(columns or {}, schema)
    stream = _examples(_rows(path, schema, known), path, schema, known, check_duplicates)
    if not eval_frac:
        return stream
    split = QuerySplit(read_examples(path, schema, columns=columns, check_duplicates=False), eval_frac, _SPLIT_SEED)
    return (example for example in stream if split.holds_out(example) == held_out)


def load_examples(
    path: str | Path, schema: StepSchema, limit: int = 0, columns: Mapping[str, str] | None = None
) -> list[Example]:
    """All examples of a path, or the first `limit`, as a list. Other arguments and errors as in `read_examples`."""
    return list(islice(read_examples(path, schema, columns=columns), limit or None))


def load_parts(
    path: str | Path, schema: StepSchema, eval_frac: float, columns: Mapping[str, str] | None = None
) -> tuple[list[Example], list[Example]]:
    """(examples to train on, held-out examples) of a path, as `read_examples` streams them."""
    return split_by_query(read_examples(path, schema, columns=columns), eval_frac, _SPLIT_SEED)


def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Stream examples to a .jsonl, .jsonl.gz or .parquet file and return how many. The file appears only when it is complete.

    The same examples give the same bytes. UserError for another suffix or if there are no examples.
    """
    path = Path(path)
    suffix = _suffix(path, SUFFIXES)
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


def _suffix(path: Path, known: tuple[str, ...] = _READ) -> str:
    return next((suffix for suffix in known if path.name.endswith(suffix)), "")


def _examples(rows: _Rows, path: str | Path, schema: StepSchema, columns: Columns, check_duplicates: bool) -> Iterator[Example]:
    seen: set[int] = set()
    first: bool | None = None  # whether the first row has an example_id
    for where, row in rows:
        example = example_from_row(row, where, schema)
        has_id = "example_id" in row
        if first is None:
            first = has_id
        elif has_id != first:
            verb = "has" if has_id else "lacks"
            raise UserError(f"{where}: this row {verb} an example_id, unlike the rows before it: give all rows one, or none")
        if check_duplicates:
            key = _key(example)
            if key in seen:
                raise UserError(_second_time(path, schema, columns, example, where, has_id))
            seen.add(key)
        yield example
    if first is None:
        raise UserError(f"{path} has no examples: give a file that is not empty, or options after the path that match some rows")
    columns.check_seen(str(path))


def _second_time(path: str | Path, schema: StepSchema, columns: Columns, example: Example, where: str, has_id: bool) -> str:
    """The message for the first row with an example_id of an earlier row, and how many more there are.

    All rows are read again, so that none is held; a row that cannot be read ends the count.
    """
    earlier: tuple[str, Example] | None = None
    seen: set[int] = set()
    again: list[str] = []
    least = ""
    try:
        for place, row in _rows(path, schema, columns):
            other = example_from_row(row, place, schema)
            if earlier is None and other.example_id == example.example_id:
                earlier = place, other
            if (key := _key(other)) in seen:
                again.append(place)
            seen.add(key)
    except UserError:
        least = "at least "
    assert earlier and where in again, "the files were changed"
    file, _, _ = where.rpartition(", ")
    others = [place.removeprefix(f"{file}, ") for place in again if place != where]
    more = ""
    if others:
        shown = ", ".join(others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
        more = f"; {least}{len(others):,} more {'rows repeat' if len(others) > 1 else 'row repeats'} earlier ones: {shown}"
    return _repeated(example, where, *earlier, has_id) + more


def _key(example: Example) -> int:
    """8 bytes of a hash of the example_id."""
    return int.from_bytes(hashlib.blake2b(example.example_id.encode(), digest_size=8).digest(), "big")


def _repeated(example: Example, where: str, first: str, earlier: Example, has_id: bool) -> str:
    """The message for two rows with one example_id."""
    if has_id:
        return f"{where}: example_id {example.example_id!r} occurs a second time, after {first}: give every pair its own"
    pair = f"{where}: the same query and item as in {first}"
    if earlier.grade != example.grade:
        return f"{pair}, with the grade {example.grade or 'none'} instead of {earlier.grade or 'none'}: keep one of the rows"
    if (earlier.gold, earlier.truth, earlier.tags) != (example.gold, example.truth, example.tags):
        return f"{pair}, with other labels or tags: keep one of the rows"
    return f"{pair}: remove one of the rows, or tell the items apart by item_id or a further field (docs/data.md)"


def _rows(path: str | Path, schema: StepSchema, columns: Columns) -> _Rows:
    """("file, line N", row of the schema) of each row of a path. UserError at once if there is nothing to read."""
    path, esci_options = _split_options(path)
    if not path.exists():
        raise UserError(f"no such file or folder: {path}: check data.train and data.eval")
    released = "an official ESCI release" if esci.is_official(path) else "WANDS" if wands.is_wands(path) else ""
    if released and columns.mapping:
        raise UserError(f"{path} is {released}, whose columns are known: remove the setting columns")
    if esci.is_official(path):
        return esci.official_rows(path, esci_options or esci.EsciOptions())
    if esci_options is not None:
        raise UserError(f"{path} is not an official ESCI release: remove ?locale=, version= and split= from the path")
    if released:
        return wands.wands_rows(path, schema.grades)
    files = (
        sorted(p for p in path.iterdir() if _suffix(p) and p.is_file() and not p.name.startswith("."))
        if path.is_dir()
        else [path]
    )
    if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
        raise UserError(f"{path} is a spreadsheet: save it as CSV UTF-8")
    if not files or not _suffix(files[0]):
        raise UserError(
            f"nothing to read in {path}: expected {', '.join(_READ)}, an official ESCI release or WANDS (docs/data.md)"
        )
    tables = [file for file in files if _suffix(file, delimited.SUFFIXES)]
    if others := [file for file in files if file not in tables] if tables else []:
        raise UserError(f"{path} has {tables[0].name} and {others[0].name}: keep files of one kind in a folder of shards")
    return (row for file in files for row in _file_rows(file, columns))


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


def _file_rows(file: Path, columns: Columns) -> _Rows:
    if _suffix(file, delimited.SUFFIXES):
        table = delimited.Table(file)
        columns.table(table.names, table.where)
        return ((where, columns.row(row, where)) for where, row in table.rows())
    if _suffix(file) != ".parquet":
        return (_from_object(row, where, columns) for where, row in json_lines(file, _WANT))
    names = column_names(file)
    if not columns.mapping and esci.is_dump_row(names):
        return ((where, esci.from_dump(row, where)) for where, row in parquet_rows(file))
    return ((where, columns.row(row, where)) for where, row in parquet_rows(file, columns.table(names, str(file))))


def _from_object(row: dict[str, Any], where: str, columns: Columns) -> tuple[str, dict[str, Any]]:
    if not columns.mapping and esci.is_dump_row(row):
        return where, esci.from_dump(row, where)
    return where, columns.row(row, where)


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
