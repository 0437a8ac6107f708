"""The Shopping Queries Dataset (ESCI, Reddy et al. 2022) as rows of the schema in docs/data.md: official Parquet or joined dump.

Both are read into dicts that `srpo.data.rows` validates and turns into examples, like all other data.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from srpo.core.errors import UserError
from srpo.data.esci_sources import query_key, read_sources
from srpo.data.parquet import plain_rows, record_batches
from srpo.data.product_text import plain_text

_LABELS = "ICSE"  # irrelevant, complement, substitute, exact; `srpo.core.grades` reads them
TEXT_CHARS = 300  # most characters kept of the bullets or the description

_EXAMPLES, _PRODUCTS = "shopping_queries_dataset_examples", "shopping_queries_dataset_products"
_EXAMPLE_COLUMNS = ["example_id", "query", "query_id", "product_id", "product_locale", "esci_label"]
_FILTER_COLUMNS = ["small_version", "large_version", "split"]
_PRODUCT_COLUMNS = ["product_id", "product_locale", "product_title", "product_brand", "product_color"]
_TEXT_COLUMNS = ["product_bullet_point", "product_description"]  # the field "text" is the first of them that is not empty
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
    Raises UserError for a missing file or column, a pair without a label or whose product is in no products file, and a file of
    query sources that cannot be read or has none of the queries.
    """
    folder = path if path.is_dir() else path.parent
    examples = sorted(folder.glob(f"{_EXAMPLES}*.parquet")) if path.is_dir() else [path]
    products = sorted(folder.glob(f"{_PRODUCTS}*.parquet"))
    if not products:
        raise UserError(
            f"{folder} has {examples[0].name} but no {_PRODUCTS}*.parquet: put the products file of the release into that folder"
        )
    products_wanted, queries = set(), set()
    for file in examples:
        for _, row in _selected(file, ["product_id", "product_locale", "query_id"], options):
            products_wanted.add(_key(row))
            queries.add(query_key(row["query_id"]))
    catalogue = _read_products(products, products_wanted)
    sources = read_sources(folder, queries)
    for file in examples:
        for number, row in _selected(file, _EXAMPLE_COLUMNS, options):
            where = f"{file}, row {number}"
            product = catalogue.get(_key(row))
            if product is None:
                raise UserError(
                    f"{where}: product {row['product_id']} ({row['product_locale']}) is not in "
                    f"{', '.join(p.name for p in products)}: use examples and products of the same release"
                )
            if row["esci_label"] is None:
                raise UserError(f"{where}: esci_label is null: fetch the release again, every pair of it has E, S, C or I")
            title, brand, color, text = product
            source = sources.get(query_key(row["query_id"]))
            tags = {"locale": row["product_locale"], "split": row["split"], "query_source": source}
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


def is_dump_row(row: Collection[str]) -> bool:
    """Whether a row comes from the joined dump (`query_id, query, product_id, title, ..., label`), not from our schema."""
    return "product_id" in row and "example_id" not in row


def from_dump(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of the dump as a row of our schema. UserError for a missing or unknown column, or if `grade` (3 to 0) is no number or
    contradicts `label`."""
    for name in _DUMP_REQUIRED:
        if row.get(name) is None:
            raise UserError(f"{where}: {name!r} is missing: a row of the ESCI dump has {', '.join(_DUMP_REQUIRED)}")
    if unknown := row.keys() - {*_DUMP_REQUIRED, *_DUMP_FIELDS, "grade", "query_source"}:
        raise UserError(
            f"{where}: the ESCI dump has no column {min(unknown)!r}: remove it; for another table with a product_id use the "
            "setting columns (docs/data.md)"
        )
    grade, label = row.get("grade"), str(row["label"])
    if grade is not None and type(grade) not in (int, float):
        raise UserError(f"{where}: grade is {json.dumps(grade, default=str)[:80]}: write 3, 2, 1 or 0, as the ESCI dump does")
    if grade is not None and label in _LABELS and grade != _LABELS.index(label):
        raise UserError(f"{where}: grade {grade!r} and label {label!r} disagree: in the ESCI dump E, S, C, I are 3, 2, 1, 0")
    return {
        "example_id": f"{row['query_id']}-{row['product_id']}",
        "query_id": row["query_id"],
        "query": row["query"],
        "title": row["title"],
        "fields": _texts(row, _DUMP_FIELDS),
        "label": row["label"],
        "tags": _texts(row, ("query_source",)),
    }


def _texts(row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The values of a row under these names that are neither null nor empty; integers become texts."""
    values = {name: str(row[name]) if type(row[name]) is int else row[name] for name in names if row.get(name) is not None}
    return {name: value for name, value in values.items() if value != ""}


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
    title, brand, color = (plain_text(row[f"product_{name}"] or "") for name in ("title", "brand", "color"))
    text = next(filter(None, (plain_text(row[name] or "", TEXT_CHARS) for name in _TEXT_COLUMNS)), "")
    return title, brand, color, text
