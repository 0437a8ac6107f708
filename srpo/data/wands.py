"""WANDS (Chen et al. 2022), Wayfair's judged pairs, as rows of the schema in docs/data.md: query.csv, product.csv, label.csv."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.data.delimited import Table
from srpo.data.product_text import plain_text

GRADES = ("Irrelevant", "Partial", "Exact")
TEXT_CHARS = 300  # most characters kept of a description
_FILES = ("query.csv", "product.csv", "label.csv")
_QUERY = ("query_id", "query", "query_class")
_PRODUCT = ("product_id", "product_name", "product_class", "category hierarchy", "product_description")
_LABEL = ("id", "query_id", "product_id", "label")


def is_wands(path: Path) -> bool:
    """Whether a folder has the three files of WANDS."""
    return path.is_dir() and all((path / name).is_file() for name in _FILES)


def wands_rows(folder: Path, grades: Grades) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line N", row) of every judged pair, joined with its query and its product.

    Labels are streamed; queries and products are held in memory, about 1 kB each. UserError if `grades` lacks a label of WANDS,
    for a file without a column, an id that is there twice, and a pair of an unknown query or product.
    """
    if unread := [name for name in GRADES if grades.read(name) is None]:
        names = ", ".join(f'"{name}"' for name in GRADES)
        raise UserError(
            f"{folder} is WANDS, and grades.names ({', '.join(grades.names)}) has no {unread[0]}: set grades.names = [{names}], "
            "or name a grade for each of them in grades.labels"
        )
    return _rows(folder)


def _rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    queries = _by_id(folder / "query.csv", _QUERY)
    products = _by_id(folder / "product.csv", _PRODUCT)
    for where, row in _table(folder / "label.csv", _LABEL):
        for name, known in (("query_id", queries), ("product_id", products)):
            if row[name] not in known:
                file = "query.csv" if name == "query_id" else "product.csv"
                raise UserError(f"{where}: {name} {row[name]!r} is not in {file}: use the three files of one release")
        query, query_class = queries[row["query_id"]]
        title, product_class, category, text = products[row["product_id"]]
        fields = {"class": product_class, "category": category, "text": plain_text(text, TEXT_CHARS)}
        yield (
            where,
            {
                "example_id": row["id"],
                "query_id": row["query_id"],
                "query": query,
                "title": title,
                "fields": {name: value for name, value in fields.items() if value},
                "label": row["label"],
                "tags": {"query_class": query_class} if query_class else {},
            },
        )


def _by_id(file: Path, columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The further columns by the first one. The texts are cut to what can be shown."""
    known: dict[str, tuple[str, ...]] = {}
    for where, row in _table(file, columns):
        key, *values = (row[name] for name in columns)
        if key in known:
            raise UserError(f"{where}: {columns[0]} {key!r} is there a second time: fetch the release again")
        known[key] = tuple(value[: 8 * TEXT_CHARS] for value in values)
    return known


def _table(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    table = Table(file)
    if missing := [name for name in columns if name not in table.names]:
        raise UserError(
            f"{table.where}: no column {missing[0]!r}: {file.name} of WANDS has {', '.join(columns)}; fetch the release again"
        )
    return table.rows()
