"""WANDS, made here in the shape of the release: three tab-separated files with quoted values."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.step_presets import PAPER, StepsConfig
from srpo.data.readers import load_examples, load_parts, read_examples
from srpo.data.wands import GRADES

SCHEMA = StepsConfig().schema(Grades(names=GRADES))
QUERY = [["query_id", "query", "query_class"], ["0", "salon chair", "Massage Chairs"], ["208", 'fawkes 36" blue vanity', ""]]
RATINGS = ("rating_count", "average_rating", "review_count")
PRODUCT = [
    ["product_id", "product_name", "product_class", "category hierarchy", "product_description", "product_features", *RATINGS],
    [
        "7",
        "spa chair",
        "Massage Chairs|Recliners",
        "Furniture / Office / Chairs",
        "wide , soft & <b>warm</b> " * 40,
        "a:1|b : 2",
        "15.0",
        "4.5",
        "15.0",
    ],
    ["12", 'tall 36" vanity', "", "", "", "", "", "", ""],
]
LABEL = [
    ["id", "query_id", "product_id", "label"],
    ["0", "0", "7", "Exact"],
    ["1", "0", "12", "Irrelevant"],
    ["2", "208", "12", "Partial"],
]


def release(folder: Path, **files: list[list[str]]) -> Path:
    for name, rows in ({"query": QUERY, "product": PRODUCT, "label": LABEL} | files).items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
    return folder


def test_pairs_are_joined(tmp_path: Path) -> None:
    first, second, third = load_examples(release(tmp_path), SCHEMA)
    assert (first.example_id, first.query_id, first.query, first.title, first.grade) == (
        "0",
        "0",
        "salon chair",
        "spa chair",
        "Exact",
    )
    assert first.fields["class"] == "Massage Chairs|Recliners" and first.fields["category"] == "Furniture / Office / Chairs"
    assert first.fields["text"].startswith("wide , soft & warm wide") and 200 < len(first.fields["text"]) <= 300
    assert first.tags == {"query_class": "Massage Chairs", "grade": "Exact"}
    assert (second.title, second.fields, second.grade) == ('tall 36" vanity', {}, "Irrelevant")
    assert (third.query, third.tags) == ('fawkes 36" blue vanity', {"grade": "Partial"})


def test_it_can_be_split_by_query(tmp_path: Path) -> None:
    queries = [QUERY[0], *([str(i), f"query {i}", ""] for i in range(40))]
    labels = [LABEL[0], *([str(i), str(i % 40), "7" if i < 40 else "12", GRADES[i % 3]] for i in range(80))]
    train, held_out = load_parts(release(tmp_path, query=queries, label=labels), SCHEMA, 0.3)
    assert len(train) + len(held_out) == 80 and {e.query for e in train}.isdisjoint(e.query for e in held_out)


def test_another_scale_is_told_what_to_set(tmp_path: Path) -> None:
    release(tmp_path)
    with pytest.raises(UserError, match=r'is WANDS.*has no Irrelevant: set grades\.names = \["Irrelevant", "Partial", "Exact"\]'):
        read_examples(tmp_path, PAPER)
    own = StepsConfig().schema(Grades(labels={"exact": "L4", "partial": "L2", "irrelevant": "L1"}))
    assert [e.grade for e in load_examples(tmp_path, own)] == ["L4", "L1", "L2"]
    with pytest.raises(UserError, match="is WANDS, whose columns are known: remove the setting columns"):
        read_examples(tmp_path, SCHEMA, columns={"query": "query"})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"label": [*LABEL, ["3", "9", "7", "Exact"]]}, r"label\.csv, line 5: query_id '9' is not in query\.csv"),
        ({"label": [*LABEL, ["3", "0", "8", "Exact"]]}, r"label\.csv, line 5: product_id '8' is not in product\.csv"),
        ({"label": [*LABEL, ["3", "0", "7", "Exactly"]]}, r"label\.csv, line 5: 'label' is \"Exactly\".*the nearest is 'exact'"),
        ({"label": [*LABEL, ["2", "0", "7", "Exact"]]}, r"label\.csv, line 5: example_id '2' occurs a second time"),
        ({"query": [*QUERY, QUERY[1]]}, r"query\.csv, line 4: query_id '0' is there a second time"),
        ({"product": [["product_id", "name"], ["7", "x"]]}, r"product\.csv, line 1: no column 'product_name'"),
    ],
)  # fmt: skip
def test_a_release_that_does_not_fit(tmp_path: Path, files: dict[str, list[list[str]]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_examples(release(tmp_path, **files), SCHEMA)
