"""The user's own tables: columns by name or mapping, in every format, and ids that are made."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.step_presets import PAPER, StepsConfig
from srpo.data.examples import Example
from srpo.data.readers import load_examples, read_examples, write_examples

SHARED = Path(os.environ.get("SRPO_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
DUMP = SHARED / "esci_us"

COLUMNS = {
    "query": "q",
    "title": "name",
    "label": "judgement",
    "fields.brand": "Brand",
    "tags.domain": "shop",
    "gold.category_match": "category ok",
    "truth.query_intent": "meant",
}
FORMATS = ("csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "parquet")
OWN = {"query": "q", "title": "name"}
NAMES = tuple(COLUMNS.values())
SCALE = StepsConfig().schema(Grades(names=("Irrelevant", "Partial", "Exact"), labels={"nope": "Irrelevant"}))


def write_table(path: Path, names: tuple[str, ...], rows: list[list[str]]) -> Path:
    """A table in the format of the suffix, as other programs write it; an empty text is null where there is null."""
    if path.name.endswith((".csv", ".tsv", ".gz")):
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "wt", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t" if ".tsv" in path.name else ",").writerows([names, *rows])
        return path
    dicts = [{name: value or None for name, value in zip(names, row, strict=True)} for row in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(dicts, schema=pa.schema([(name, pa.string()) for name in names])), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in dicts), encoding="utf-8")
    return path


def random_rows(rng: random.Random, num: int) -> list[list[str]]:
    pieces = [
        "red",
        "Größe",
        "007",
        "NA",
        "null",
        'a "quoted" word',
        "a, b; c\td|e",
        "two\nlines",
        "true",
        "1.0",
        "漢字",
        "'",
        "  x  ",
    ]

    def text() -> str:
        return " ".join(rng.choices(pieces, k=rng.randint(1, 3)))

    labels = ["L1", "l2 ", "3", "4.0", "E", "i"]
    return [
        [text(), f"{text()} {i}", rng.choice(labels), *(rng.choice(["", text()]) for _ in range(2)),
         rng.choice(["", "match", "Related"]), rng.choice(["", text()])]
        for i in range(num)
    ]  # fmt: skip


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    rows = random_rows(random.Random(), 40)
    first, *others = (
        load_examples(write_table(tmp_path / f"pairs.{suffix}", NAMES, rows), PAPER, columns=COLUMNS) for suffix in FORMATS
    )
    assert all(examples == first for examples in others)
    for row, example in zip(rows, first, strict=True):
        assert [example.query, example.title] == row[:2]
        assert example.grade == PAPER.grades.read(row[2])
        assert [example.fields.get("brand", ""), example.tags.get("domain", "")] == row[3:5]
        assert (example.gold[2] or "") == row[5].lower() and (example.truth[0] or "") == row[6]


def test_a_table_whose_columns_are_named_like_keys_needs_no_mapping(tmp_path: Path) -> None:
    names = (" example_id", "query_id ", "query", "title", "fields.brand", "grade", "gold.attribute_match", "tags.domain")
    path = write_table(tmp_path / "pairs.csv", names, [["007", "1", "red shoes", "Runner", "NA", "4", "Unclear", ""]])
    gold = (None, None, None, "unclear", "L4")
    wanted = Example("007", "1", "red shoes", "Runner", {"brand": "NA"}, gold, (None,) * 5, {"grade": "L4"})
    assert load_examples(path, PAPER) == [wanted]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_further_columns_are_fields_or_left_out_as_the_setting_says(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"pairs.{suffix}", ("query", "name", "Brand", "price"), [["q", "t", "Acme", "9.50"]])
    with pytest.raises(UserError, match=r"unknown key 'Brand': product fields go into 'fields'.*fields\.Brand=Brand maps it"):
        load_examples(path, PAPER, columns={"title": "name"})
    (shown,) = load_examples(path, PAPER, columns={"title": "name", "fields.maker": "Brand", "fields": "*"})
    assert shown.fields == {"maker": "Acme", "price": "9.50"}
    (hidden,) = load_examples(path, PAPER, columns={"title": "name", "fields.maker": "Brand", "ignore": "*"})
    assert hidden.fields == {"maker": "Acme"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_column_may_fill_two_keys(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"pairs.{suffix}", ("q", "title", "brand"), [["shoes", "Runner", "Acme"]])
    columns = {"query": "q", "fields.brand": "brand", "tags.brand": "brand", "truth.query_intent": "q"}
    (example,) = load_examples(path, PAPER, columns=columns)
    assert (example.fields, example.tags, example.truth[0]) == ({"brand": "Acme"}, {"brand": "Acme"}, "shoes")


def test_numbers_of_typed_formats_are_the_texts_that_csv_has(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "title": "t", "size": 7, "price": 9.5, "stock": 12.0, "new": True, "rating": None, "points": 2},
        {"query": "q", "title": "u", "size": 8, "price": 0.25, "stock": None, "new": False, "rating": 4.5, "points": 0},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    schema = StepsConfig().schema(Grades(labels={str(i): f"L{i + 1}" for i in range(4)}))
    for path in tmp_path.iterdir():
        first, second = load_examples(path, schema, columns={"grade": "points", "fields": "*"})
        assert first.fields == {"size": "7", "price": "9.5", "stock": "12", "new": "true"} and first.grade == "L3"
        assert second.fields == {"size": "8", "price": "0.25", "new": "false", "rating": "4.5"} and second.grade == "L1"


def test_made_ids_are_those_of_the_contents(tmp_path: Path) -> None:
    rows = random_rows(random.Random(), 30)
    rows += [[f" {row[0].swapcase()}  ", f"other {row[1]}", *row[2:]] for row in rows]
    examples = load_examples(write_table(tmp_path / "pairs.csv", NAMES, rows), PAPER, columns=COLUMNS)
    known = {(e.query, e.title): (e.example_id, e.query_id) for e in examples}
    assert len({example_id for example_id, _ in known.values()}) == len(rows)
    by_query: dict[str, set[str]] = {}
    for example in examples:
        by_query.setdefault(" ".join(example.query.casefold().split()), set()).add(example.query_id)
    assert all(len(ids) == 1 for ids in by_query.values()) and len(set.union(*by_query.values())) == len(by_query)
    random.Random(1).shuffle(rows)
    again = load_examples(write_table(tmp_path / "pairs.jsonl", NAMES, rows[:20]), PAPER, columns=COLUMNS)
    assert all((e.example_id, e.query_id) == known[e.query, e.title] for e in again)


def test_a_made_id_is_the_same_on_every_machine(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", ("query", "title", "fields.brand"), [["Red  shoes", "Runner", "Acme"]])
    (example,) = load_examples(path, PAPER)
    assert (example.example_id, example.query_id) == ("ce281caa1082159d", "ea9addb87ec054ac")


def test_an_item_id_makes_a_readable_example_id(tmp_path: Path) -> None:
    rows = [["q1", "shoes", "Runner", "B1"], ["q1", "shoes", "Runner", "B2"]]
    path = write_table(tmp_path / "pairs.csv", ("query_id", "query", "title", "sku"), rows)
    assert [e.example_id for e in load_examples(path, PAPER, columns={"item_id": "sku"})] == ["q1-B1", "q1-B2"]
    with pytest.raises(UserError, match=r"line 3: the same query and item as in .*pairs\.csv, line 2: remove one of the rows"):
        load_examples(path, PAPER, columns={"ignore": "*"})


def test_words_are_grades_of_another_scale(tmp_path: Path) -> None:
    rows = [["a", "t", "exact"], ["a", "u", " Nope "], ["b", "t", "2"]]
    path = write_table(tmp_path / "pairs.csv", ("query", "title", "label"), rows)
    assert [e.grade for e in load_examples(path, SCALE)] == ["Exact", "Irrelevant", "Partial"]


def test_what_a_table_gives_is_written_and_read_again(tmp_path: Path) -> None:
    path = write_table(tmp_path / "pairs.tsv", NAMES, random_rows(random.Random(), 10))
    examples = load_examples(path, PAPER, columns=COLUMNS)
    write_examples(tmp_path / "own.jsonl", examples)
    assert load_examples(tmp_path / "own.jsonl", PAPER) == examples


@pytest.mark.parametrize("suffix", ["csv", "tsv.gz", "parquet"])
def test_a_table_is_streamed(tmp_path: Path, suffix: str) -> None:
    """3,000 pairs of 4 kB each, 12 MB in all, are streamed in a few MB."""
    rows = [[f"query {i // 9}", f"item {i}", f"{i} " + "x" * 4000] for i in range(3000)]
    path = write_table(tmp_path / f"pairs.{suffix}", ("q", "title", "fields.text"), rows)
    del rows
    tracemalloc.start()
    assert sum(1 for _ in read_examples(path, PAPER, columns={"query": "q"})) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


@pytest.mark.skipif(not DUMP.is_dir(), reason=f"no ESCI dump at {DUMP}; set SRPO_SHARED_DATA to the folder that has esci_us")
def test_real_pairs_as_a_table_of_any_names(tmp_path: Path) -> None:
    """The ESCI dump as a semicolon-separated table of other names is the dump, but for what only its own reader knows."""
    dump = load_examples(DUMP, PAPER)
    with (tmp_path / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, delimiter=";", quoting=random.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        out.writerow(["Anfrage", "Nr", "Produkt", "Name", "brand", "color", "category", "text", "Urteil"])
        for e in dump:
            item = e.example_id.removeprefix(f"{e.query_id}-")
            fields = (e.fields.get(name, "") for name in ("brand", "color", "category", "text"))
            out.writerow([e.query, e.query_id, item, e.title, *fields, e.grade])
    columns = {"query": "Anfrage", "query_id": "Nr", "item_id": "Produkt", "title": "Name", "label": "Urteil", "fields": "*"}
    table = load_examples(tmp_path / "pairs.csv", PAPER, columns=columns)
    assert table == [replace(e, tags={"grade": str(e.grade)}) for e in dump]
    with (tmp_path / "pairs.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file, delimiter=";"))) == len(dump) + 1
    del columns["query_id"], columns["item_id"]
    made = load_examples(tmp_path / "pairs.csv", PAPER, columns=columns)
    assert len({e.query_id for e in made}) == len({e.query.casefold() for e in dump}) and len(
        {e.example_id for e in made}
    ) == len(dump)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"qurey": "q"}, r"columns has the key 'qurey': the nearest is 'query'"),
        ({"price": "q"}, r"columns has the key 'price': keys are example_id"),
        ({"gold.verdit": "q"}, r"no step is named 'verdit': the nearest is 'verdict'"),
        ({"truth.brand": "q"}, r"no step is named 'brand': the steps are query_intent"),
        ({"fields.": "q"}, r"columns has the key 'fields\.'"),
        ({"ignore": "label"}, r"columns has ignore=label: write ignore=\*"),
        ({"title": "*"}, r"columns has title=\*: name a column of the file"),
        ({"title": ""}, r"columns has title=: name a column"),
        ({"fields": "*", "ignore": "*"}, r"columns has fields=\* and ignore=\*: keep one"),
        ({"query": "qq"}, r"pairs\.csv, line 1: no column 'qq' \(columns query=qq\): the nearest is 'q'"),
        ({"query": "Suchanfrage"}, r"line 1: no column 'Suchanfrage' \(columns query=Suchanfrage\): the columns are q, title"),
        ({}, r"pairs\.csv, line 1: no column 'query': name the one .* as query=COLUMN \(the columns are q, title, label\)"),
        ({"fields": "*"}, r"pairs\.csv, line 1: no column 'query': name the one that holds it in the setting columns"),
        ({"query": "q", "title": "label"}, r"the column 'title' is not used, because title is read from 'label'"),
        ({"query": "q", "tags": "label", "tags.a": "label"}, r"'tags' and tags\.a are both given"),
    ],
)
def test_mappings_that_cannot_work(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    path = write_table(tmp_path / "pairs.csv", ("q", "title", "label"), [["a", "t", "1"]])
    with pytest.raises(UserError, match=message) as caught:
        load_examples(path, PAPER, columns=columns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"q": "a", "b": "x"}, {**OWN, "fields": "*"}, r"line 2: 'name' \(columns title=name\) is missing"),
        ({"q": "a", "name": "u"}, {**OWN, "tags.shop": "shp"}, r"no row has 'shp' \(columns tags\.shop=shp\)"),
        ({"q": "a", "name": "u", "a": [1]}, {**OWN, "fields": "*"}, r"line 2: fields\.a is \[1\]: write it"),
        ({"q": "a", "name": 3}, OWN, r"line 2: 'title' is 3: write a non-empty string"),
        ({"q": "a", "name": "u", "qid": 1}, {**OWN, "query_id": "qid", "example_id": "id"}, r"lacks an example_id"),
        ({"q": "a", "name": "u", "query": "b"}, OWN, r"line 2: the column 'query' is not used"),
    ],
)  # fmt: skip
def test_mapped_objects_that_cannot_work(tmp_path: Path, row: dict, columns: dict[str, str], message: str) -> None:
    first = {"q": "z", "name": "t"} | ({"id": 5, "qid": 1} if "example_id" in columns else {})
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(first) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        load_examples(path, PAPER, columns=columns)
