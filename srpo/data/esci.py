"""The Shopping Queries Dataset (ESCI, Reddy et al. 2022) as rows of the schema in docs/data.md: official Parquet or joined dump.

Both are read into dicts that `srpo.data.rows` validates and turns into examples, like all other data.
"""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from srpo.core.errors import UserError
from srpo.data.parquet import plain_rows, record_batches

GOLD_OF_LABEL = {"E": "L4", "S": "L3", "C": "L2", "I": "L1"}  # exact, substitute, complement, irrelevant
TEXT_CHARS = 300  # most characters kept of the bullets or the description

_EXAMPLES, _PRODUCTS = "shopping_queries_dataset_examples", "shopping_queries_dataset_products"
_SOURCES = "shopping_queries_dataset_sources"
_EXAMPLE_COLUMNS = ["example_id", "query", "query_id", "product_id", "product_locale", "esci_label"]
_FILTER_COLUMNS = ["small_version", "large_version", "split"]
_PRODUCT_COLUMNS = ["product_id", "product_locale", "product_title", "product_brand", "product_color"]
_TEXT_COLUMNS = ["product_bullet_point", "product_description"]  # the field "text" is the first of them that is not empty
_TAG = re.compile(r"<(?=[A-Za-z/!])[^<>]*>")  # "<27 inch" opens none
_DUMP_REQUIRED = ("query_id", "query", "product_id", "title", "label")
_DUMP_FIELDS = ("brand", "color", "category", "text")


@dataclass(frozen=True)
class EsciOptions:
    """Rows of the official release to read; given after the path, as in `folder?locale=us&version=small&split=train`."""

    locale: str = "us"  # us | es | jp | all
    version: str = "large"  # large, or small: the subset of the ranking task
    split: str = "all"  # train | test | all

    def __post_init__(self):
        for name, allowed in (
            ("locale", ("us", "es", "jp", "all")),
            ("version", ("large", "small")),
            ("split", ("train", "test", "all")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"ESCI has no {name}={getattr(self, name)!r}: use one of {', '.join(allowed)}")


def is_official(path: Path) -> bool:
    """Whether `path` is an examples file of the official release, or a folder that has one."""
    if path.is_dir():
        return any(path.glob(f"{_EXAMPLES}*.parquet"))
    return path.name.startswith(_EXAMPLES) and path.suffix == ".parquet"


def official_rows(path: Path, options: EsciOptions) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, row N", row) of every judged pair of the official release, joined with its product by id and locale.

    Examples are streamed. Their products are held in memory, about 1.4 kB each, with text cut to `TEXT_CHARS`.
    Raises UserError for a missing file or column and for a pair whose product is in no products file.
    """
    folder = path if path.is_dir() else path.parent
    examples = sorted(folder.glob(f"{_EXAMPLES}*.parquet")) if path.is_dir() else [path]
    products = sorted(folder.glob(f"{_PRODUCTS}*.parquet"))
    if not products:
        raise UserError(
            f"{folder} has {examples[0].name} but no {_PRODUCTS}*.parquet: put the products file of the release into that folder"
        )
    keys = (_key(row) for file in examples for _, row in _selected(file, ["product_id", "product_locale"], options))
    catalogue = _read_products(products, set(keys))
    sources = _read_sources(folder)
    for file in examples:
        for number, row in _selected(file, _EXAMPLE_COLUMNS, options):
            where = f"{file}, row {number}"
            product = catalogue.get(_key(row))
            if product is None:
                raise UserError(
                    f"{where}: product {row['product_id']} ({row['product_locale']}) is not in "
                    f"{', '.join(p.name for p in products)}: use examples and products of the same release"
                )
            title, brand, color, text = product
            tags = {"locale": row["product_locale"], "split": row["split"], "query_source": sources.get(str(row["query_id"]))}
            yield (
                where,
                {
                    "example_id": row["example_id"],
                    "query_id": row["query_id"],
                    "query": row["query"],
                    "title": title or text or f"product {row['product_id']}",  # a few products of the release have no title
                    "fields": {name: value for name, value in (("brand", brand), ("color", color), ("text", text)) if value},
                    "label": row["esci_label"],
                    "tags": {name: value for name, value in tags.items() if value},
                },
            )


def is_dump_row(row: dict[str, Any]) -> bool:
    """Whether a row comes from the joined dump (`query_id, query, product_id, title, ..., label`), not from our schema."""
    return "product_id" in row and "example_id" not in row


def from_dump(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of the dump as a row of our schema. UserError for a missing or unknown column, or if `grade` (3 to 0) contradicts
    `label`."""
    for name in _DUMP_REQUIRED:
        if row.get(name) is None:
            raise UserError(f"{where}: {name!r} is missing: a row of the ESCI dump has {', '.join(_DUMP_REQUIRED)}")
    if unknown := row.keys() - {*_DUMP_REQUIRED, *_DUMP_FIELDS, "grade", "query_source"}:
        raise UserError(f"{where}: the ESCI dump has no column {min(unknown)!r}: remove it, or use the schema of docs/data.md")
    grade, label = row.get("grade"), str(row["label"])
    if grade is not None and label in GOLD_OF_LABEL and grade != "ICSE".index(label):
        raise UserError(f"{where}: grade {grade!r} and label {label!r} disagree: in the ESCI dump E, S, C, I are 3, 2, 1, 0")
    return {
        "example_id": f"{row['query_id']}-{row['product_id']}",
        "query_id": row["query_id"],
        "query": row["query"],
        "title": row["title"],
        "fields": {name: row[name] for name in _DUMP_FIELDS if row.get(name)},
        "label": row["label"],
        "tags": {"query_source": row["query_source"]} if row.get("query_source") else {},
    }


def _key(row: dict[str, Any]) -> str:
    return f"{row['product_locale']}/{row['product_id']}"


def _selected(file: Path, columns: list[str], options: EsciOptions) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of the rows that match the options."""
    first = 1
    for batch in record_batches(file, 16384, [*columns, *_FILTER_COLUMNS]):
        keep = np.ones(batch.num_rows, dtype=bool)
        for name, value in ((f"{options.version}_version", 1), ("product_locale", options.locale), ("split", options.split)):
            if value != "all":
                keep &= _equal(batch.column(name), value, f"{file}: column {name}")
        numbers = (first + np.flatnonzero(keep)).tolist()
        yield from zip(numbers, plain_rows(batch.filter(pa.array(keep)), file, numbers), strict=True)
        first += batch.num_rows


def _equal(column: pa.Array, value: str | int, where: str) -> np.ndarray:
    """[rows] bool: whether the column has this value; null has none. UserError if it has values of another kind."""
    try:
        return pc.fill_null(pc.call_function("equal", [column, pa.scalar(value)]), False).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise UserError(f"{where} has values of type {column.type}, not like {value!r}: fetch the release again") from error


def _read_products(files: list[Path], wanted: set[str]) -> dict[str, tuple[str, str, str, str]]:
    """(title, brand, color, text) of the wanted products, by "locale/product_id".

    UserError for a product that is there twice with different texts, and for a text that is no string.
    """
    catalogue: dict[str, tuple[str, str, str, str]] = {}
    for file in files:
        first = 1
        for batch in record_batches(file, 16384, _PRODUCT_COLUMNS + _TEXT_COLUMNS):
            numbers = range(first, first + batch.num_rows)
            for number, row in zip(numbers, plain_rows(batch, file, numbers), strict=True):
                if (key := _key(row)) not in wanted:
                    continue
                product = _product(row, f"{file}, row {number}")
                if catalogue.setdefault(key, product) != product:
                    raise UserError(
                        f"{file}, row {number}: product {row['product_id']} ({row['product_locale']}) is there a second time, "
                        f"with other texts: keep one file {_PRODUCTS}*.parquet of one release"
                    )
            first += batch.num_rows
    return catalogue


def _product(row: dict[str, Any], where: str) -> tuple[str, str, str, str]:
    for name in (*_PRODUCT_COLUMNS[2:], *_TEXT_COLUMNS):
        if row[name] is not None and not isinstance(row[name], str):
            raise UserError(f"{where}: {name} is {row[name]!r}: write it as a string")
    title, brand, color = (_clean(row[f"product_{name}"] or "") for name in ("title", "brand", "color"))
    text = next(filter(None, (_clean(row[name] or "", TEXT_CHARS) for name in _TEXT_COLUMNS)), "")
    return title, brand, color, text


def _read_sources(folder: Path) -> dict[str, str]:
    """query_id -> query_source, from the release's sources file in the same folder; empty without one.

    Other columns, such as an index, are ignored. UserError for a file without the columns query_id and source, a line without
    them, and a query with two sources.
    """
    sources: dict[str, str] = {}
    for file in sorted(folder.glob(f"{_SOURCES}*.csv")):
        fix = "expected the columns query_id and source: fetch it again or remove the file"
        try:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                rows = csv.DictReader(lines, strict=True)
                if sorted(set(rows.fieldnames or ()) & {"query_id", "source"}) != ["query_id", "source"]:
                    raise UserError(f"{file}, line 1: the header is {','.join(rows.fieldnames or ())[:80]!r}: {fix}")
                for row in rows:
                    query_id, source = row["query_id"], row["source"]
                    if not query_id or not source or None in row:
                        raise UserError(f"{file}, line {rows.line_num}: a row without, or with further, values: {fix}")
                    if sources.setdefault(query_id, source) != source:
                        raise UserError(f"{file}, line {rows.line_num}: query {query_id} has a second source: keep one")
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not a readable CSV file ({error}): fetch it again or remove the file") from error
    return sources


def _clean(text: str, limit: int = 0) -> str:
    """The text on one line, without markup: lines joined by " | ", at most `limit` characters, cut at a word (0: no limit)."""
    if limit:
        text = text[: 8 * limit]  # bounds the work for very long descriptions
    text = html.unescape(_TAG.sub(" ", text))
    text = " | ".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))
    if not limit or len(text) <= limit:
        return text
    cut = text[: limit + 1].rpartition(" ")[0]
    return (cut if len(cut) > limit // 2 else text[:limit]).rstrip(" |")
