"""Parquet files as rows of plain values. A file, column or value that cannot be read is a UserError with file and row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from srpo.core.errors import UserError

# Errors of pyarrow for bytes that are no text, a map with a key twice, and a time that Python has no value for.
_UNREADABLE = (pa.ArrowException, KeyError, ValueError, OverflowError)


def column_names(file: Path) -> list[str]:
    """The names of the columns of a file. UserError as in `parquet_rows`."""
    with _readable(file) as parquet:
        return parquet.schema_arrow.names


def parquet_rows(file: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, row N", row) of each row, of the named columns or all. Parquet has every column in every row: a null is left out,
    as if the row had no such key.

    UserError for a file that is not readable, a column or a field of one that is there twice, and a bad value, such as NaN.
    """
    first = 1
    for batch in record_batches(file, 1024, columns):
        numbers = range(first, first + batch.num_rows)
        may_be_nan = [field.name for field in batch.schema if field.type not in (pa.string(), pa.large_string(), pa.int64())]
        for number, row in zip(numbers, plain_rows(batch, file, numbers), strict=True):
            where = f"{file}, row {number}"
            for name in may_be_nan:
                _refuse_nan(row[name], name, where)
            yield where, {name: value for name, value in row.items() if value is not None}
        first += batch.num_rows


def _refuse_nan(value: object, name: str, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {name} is {value}: write null for a missing value, or leave the column out")
    inner = value.items() if isinstance(value, dict) else enumerate(value, 1) if isinstance(value, list) else ()
    for key, entry in inner:
        _refuse_nan(entry, f"{name}.{key}", where)


def record_batches(file: Path, size: int, columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """Record batches of at most `size` rows of the named columns, of all by default. UserError as in `parquet_rows`, and for a
    file that lacks a column."""
    with _readable(file) as parquet:
        names = parquet.schema_arrow.names
        if missing := [name for name in columns if name not in names]:
            raise UserError(f"{file} has no column {missing[0]!r}: it needs {', '.join(columns)}")
        # With threads and without a small buffer a row group of a million rows is held as a whole
        yield from parquet.iter_batches(batch_size=size, columns=list(columns) or None, use_threads=False)


@contextmanager
def _readable(file: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(file, buffer_size=1 << 16, pre_buffer=False) as parquet:
            if twice := _twice(parquet.schema_arrow):
                raise UserError(f"{file} has the column {twice!r} twice: keep one of them")
            yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({_line(error)}): write or fetch it again") from error


def plain_rows(batch: pa.RecordBatch, file: Path, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of a batch as dicts; `numbers` are those of its rows in `file`, for the error."""
    try:
        return batch.to_pylist(maps_as_pydicts="strict")
    except _UNREADABLE:
        for i, number in enumerate(numbers):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    column[i].as_py(maps_as_pydicts="strict")
                except _UNREADABLE as error:
                    raise UserError(
                        f"{file}, row {number}: column {name!r} cannot be read ({_line(error)}): write text as UTF-8, each "
                        "key of a map once, and times that a calendar has"
                    ) from error
        raise


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _twice(schema: pa.Schema | pa.DataType, path: str = "") -> str:
    """The dotted name of a column, or of a field inside one, that is there twice; "" if there is none."""
    fields = [schema.field(i) for i in range(len(schema.names) if isinstance(schema, pa.Schema) else schema.num_fields)]
    names = [field.name for field in fields]
    for i, field in enumerate(fields):
        if field.name in names[:i]:
            return path + field.name
        if deeper := _twice(field.type, f"{path}{field.name}."):
            return deeper
    return ""
