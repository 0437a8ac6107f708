"""The file of query sources that the official ESCI release has beside its examples and products."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from srpo.core.errors import UserError

_STEM = "shopping_queries_dataset_sources"
_COLUMNS = ("query_id", "source")
_FIX = "expected the columns query_id and source: fetch it again or remove the file"


def query_key(query_id: object) -> str:
    """A query_id as the key of `read_sources`: 10, " 10 " and "10.0", which a column with missing values holds, are "10"."""
    return re.sub(r"^(\d+)\.0+$", r"\1", str(query_id).strip())


def read_sources(folder: Path, queries: set[str]) -> dict[str, str]:
    """{`query_key`: query_source} of the sources file in a folder; empty without one, or without `queries`.

    Columns other than query_id and source are ignored. UserError for a file that is no .csv, a header without these columns or
    with a column twice, a line without them, a query with two sources, and files that have none of the `queries`.
    """
    files = [file for file in sorted(folder.iterdir()) if file.name.lower().startswith(_STEM)]
    sources: dict[str, str] = {}
    for file in files:
        if file.suffix.lower() != ".csv":
            raise UserError(f"{file}: not a .csv file, so it is not read: unpack it to {_STEM}.csv, or remove it")
        _read(file, sources)
    if files and queries and queries.isdisjoint(sources):
        raise UserError(
            f"{files[0]}: none of the {len(queries):,} queries of the examples has a source, such as query {min(queries)}: "
            "fetch the file of the same release, or remove it"
        )
    return sources


def _read(file: Path, sources: dict[str, str]) -> None:
    """Add the sources of a file to `sources`."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, strict=True, skipinitialspace=True)
            names = [name.strip() for name in next(rows, [])]
            if twice := [name for i, name in enumerate(names) if name and name in names[:i]]:
                raise UserError(f"{file}, line 1: the column {twice[0]!r} is there twice: keep one of them")
            if not {*_COLUMNS} <= {*names}:
                raise UserError(f"{file}, line 1: the header is {','.join(names)[:80]!r}: {_FIX}")
            at_id, at_source = map(names.index, _COLUMNS)
            for row in filter(None, rows):
                where = f"{file}, line {rows.line_num}"
                if len(row) != len(names) or not row[at_id].strip() or not row[at_source].strip():
                    raise UserError(f"{where}: a row without, or with further, values: {_FIX}")
                key, source = query_key(row[at_id]), row[at_source].strip()
                if sources.setdefault(key, source) != source:
                    raise UserError(f"{where}: query {key} has a second source: keep one")
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable CSV file ({error}): fetch it again or remove the file") from error
