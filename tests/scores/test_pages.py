from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srpo.core.config.evaluation import PagesConfig
from srpo.core.grades import Grades
from srpo.core.ranges import check_ranges
from srpo.data.examples import Example
from srpo.scores.pages import Page, Pages, judged_examples, read_judgments, read_pages, read_verdicts, shown_grades


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def page(system: str, query_id: str, *items: str, **more: Any) -> dict[str, Any]:
    return {"system": system, "query_id": query_id, "item_ids": list(items), **more}


def test_pages_of_two_systems_are_read_and_others_counted(tmp_path: Path):
    rows = [
        page("old", "q1", "i1", "i2", rating="mid", tags={"query_type": "plain"}),
        page("new", "q2", "i9"),
        page("new", "q1", "i2", rating="good"),
        page("other", "q1", "i1"),
        {"system": "old", "query_id": "q2", "item_ids": [7]},
    ]
    pages = read_pages(written(tmp_path / "p.jsonl", *rows), "old", "new")
    assert pages.a == {"q1": Page(("i1", "i2"), "mid", {"query_type": "plain"}), "q2": Page(("7",))}
    assert pages.b == {"q1": Page(("i2",), "good"), "q2": Page(("i9",))}
    assert list(pages.b) == ["q1", "q2"]
    assert (pages.key, pages.num_others) == ("item_ids", 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nonsense", "line 2: not JSON"),
        ([], "line 2: a JSON list, not an object: write an object with system, query_id"),
        ({"system": "a", "item_ids": ["i"]}, "line 2: each line must be"),
        (page("b", "q1", "i", rank=1), "line 2: each line must be"),
        ({"system": "b", "query_id": "q1"}, "line 2: give the list as either item_ids or example_ids"),
        (page("b", "q1", "i", example_ids=["i"]), "line 2: give the list as"),
        ({"system": "b", "query_id": "q1", "example_ids": ["i"]}, "line 2: some lists are item_ids"),
        (page("b", "q1"), "line 2: item_ids is \\[\\]: give a list of at least one"),
        ({"system": "b", "query_id": "q1", "item_ids": "i1"}, "line 2: item_ids is 'i1'"),
        (page("b", "q1", "i", "j", "i"), "line 2: 'i' is twice in the list"),
        (page("b", "q1", "i", rating="excellent"), "line 2: rating is 'excellent': give good, mid, poor, bad"),
        (page("b", "q1", "i", tags=["x"]), "line 2: tags are"),
        ({"system": "b", "query_id": None, "item_ids": ["i"]}, "line 2: query_id is None"),
        (page("a", "q1", "j"), "line 2: a second list of 'a' for query 'q1'"),
        (page("c", "q1", "j"), "no system 'b': it has a, c; set --name-a"),
        (page("b", "q2", "j"), "2 queries have a list of one system only, such as 'q1'"),
    ],
)
def test_bad_lists_name_file_and_line(tmp_path: Path, row: Any, message: str):
    with pytest.raises(ValueError, match=rf"p\.jsonl.*{message}"):
        read_pages(written(tmp_path / "p.jsonl", page("a", "q1", "i"), row), "a", "b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query_id": "q", "item_id": "i", "grade": 5}, "grade is 5"),
        ({"query_id": "q", "item_id": "i", "grade": "L0"}, "grade is 'L0': the grades are L1, L2, L3, L4; give other"),
        ({"query_id": "q", "item_id": "i", "grade": True}, "grade is True"),
        ({"query_id": "q", "item_id": "i", "grade": 2.5}, "grade is 2.5"),
        ({"query_id": "q", "item_id": "h", "grade": 1}, "a second grade of item 'h' for query 'q'"),
        ({"query_id": "q", "item_id": "i"}, "each line must be an object with query_id, item_id, grade"),
    ],
)
def test_judgments_are_read_strictly(tmp_path: Path, row: Any, message: str):
    path = written(tmp_path / "j.jsonl", {"query_id": "q", "item_id": "h", "grade": 3.0})
    assert read_judgments(path, Grades()) == {("q", "h"): 3}
    assert read_judgments(written(path, {"query_id": "q", "item_id": "h", "grade": "l3"}), Grades()) == {("q", "h"): 3}
    with pytest.raises(ValueError, match=f"line 2: {message}"):
        read_judgments(written(path, {"query_id": "q", "item_id": "h", "grade": 3}, row), Grades())


def test_verdicts_of_assessors(tmp_path: Path):
    rows = [{"query_id": "q1", "verdict": v, "assessor": i} for i, v in enumerate(("good", "same"))]
    rows.append({"query_id": 2, "verdict": "bad"})
    path = tmp_path / "v.jsonl"
    assert read_verdicts(written(path, *rows), ["q1", "2", "q3"]) == {"q1": ["good", "same"], "2": ["bad"]}
    for bad, message in (
        ({"query_id": "q1", "verdict": "good", "assessor": 0}, "a second verdict on query 'q1'"),
        ({"query_id": "q9", "verdict": "good"}, "query 'q9' has no pages"),
        ({"query_id": "q1", "verdict": "better"}, "verdict is 'better': give good, same, bad"),
        ({"query_id": "q1", "verdict": None}, "verdict is null"),
    ):
        with pytest.raises(ValueError, match=f"line 4: {message}"):
            read_verdicts(written(path, *rows, bad), ["q1", "2", "q3"])
    with pytest.raises(ValueError, match="is empty"):
        read_verdicts(written(path), ["q1"])


def test_shown_items_need_a_class_or_are_counted():
    pages = Pages({"q": Page(("i1", "i2", "i3", "i4"))}, {"q": Page(("i2", "i9"))}, "item_ids", 0)
    judgments = {("q", "i1"): 4, ("q", "i2"): 1, ("q", "i3"): 3, ("other", "i9"): 4}
    with pytest.raises(ValueError, match=r"1 of 5 shown items have no grade, such as 'i9' of query 'q'.*leave_out"):
        shown_grades(pages, judgments, 3, "refuse")
    assert shown_grades(pages, judgments, 3, "leave_out") == ({"q": [4, 1, 3]}, {"q": [1]}, 1)
    assert shown_grades(pages, judgments, 1, "refuse") == ({"q": [4]}, {"q": [1]}, 0)
    with pytest.raises(ValueError, match="1 pages have no judged item at all, such as one of query 'q'"):
        shown_grades(pages, {("q", "i1"): 4}, 3, "leave_out")


def test_grades_of_examples_are_judgments():
    examples = [Example("e1", "q1", "", "", gold=("L3",)), Example("e2", "q1", "", "", gold=(None,))]
    assert judged_examples(examples, Grades()) == {("q1", "e1"): 3}


@pytest.mark.parametrize(
    "changes", [{"top_n": 0}, {"verdict_margin": -0.1}, {"rating_bounds": (0.5, 0.6, 0.1)}, {"rating_bounds": (1.5, 0.6, 0.1)}]
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"pages\.{next(iter(changes))}.* is"):
        check_ranges(PagesConfig(**changes), prefix="pages.")
