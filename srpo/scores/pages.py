"""Pages of search results, with grades and verdicts on them: the input files of the online metrics (5.1.2).

A page is the ranked list that one system shows for one query. All files are JSON Lines (docs/programs/compare.md); an invalid
line raises UserError with file and line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.jsonl import json_lines
from srpo.data.examples import Example

RATINGS = ("good", "mid", "poor", "bad")  # the four-point scale of a page, best first
VERDICTS = ("good", "same", "bad")  # of the system under test against the baseline


@dataclass(frozen=True)
class Page:
    """The page that one system shows for one query."""

    ids: tuple[str, ...]  # best first
    rating: str | None = None  # one of RATINGS, given by a person
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pages:
    """The pages of two systems for the same queries, in the order of A's."""

    a: dict[str, Page]  # query_id -> page
    b: dict[str, Page]
    key: str  # kind of the ids: "item_ids" or "example_ids"
    num_others: int  # lines of other systems, which are left out


def read_pages(path: Path, name_a: str, name_b: str) -> Pages:
    """The pages of the systems `name_a` and `name_b`. Raises UserError if only one of them has a page for a query."""
    pages: dict[str, dict[str, Page]] = {}
    keys: set[str] = set()
    num_others = 0
    for where, row in _rows(path, ("system", "query_id"), ("item_ids", "example_ids", "rating", "tags")):
        system, query_id = _text(row, "system", where), _text(row, "query_id", where)
        named = [key for key in ("item_ids", "example_ids") if key in row]
        if len(named) != 1:
            raise UserError(f"{where}: give the list as either item_ids or example_ids")
        keys.update(named)
        if len(keys) > 1:
            raise UserError(f"{where}: some lists are item_ids and some example_ids: use one of the two in the whole file")
        page = Page(_ids(row[named[0]], named[0], where), _one_of(row.get("rating"), RATINGS, "rating", where), _tags(row, where))
        if query_id in pages.setdefault(system, {}):
            raise UserError(f"{where}: a second list of {system!r} for query {query_id!r}: keep one")
        pages[system][query_id] = page
    for name in (name_a, name_b):
        if name not in pages:
            raise UserError(
                f"{path} has no system {name!r}: it has {', '.join(sorted(pages))}; set --name-a and --name-b to two of these"
            )
    a, b = pages[name_a], pages[name_b]
    if alone := sorted(a.keys() ^ b.keys()):
        raise UserError(f"{path}: {len(alone)} queries have a list of one system only, such as {alone[0]!r}: add the other's")
    num_others = sum(len(lists) for name, lists in pages.items() if name not in (name_a, name_b))
    return Pages(a, {query_id: b[query_id] for query_id in a}, keys.pop(), num_others)


def read_judgments(path: Path, grades: Grades) -> dict[tuple[str, str], int]:
    """{(query_id, item_id): class, from 1} of a file of judgments. Raises UserError for another grade and for a second one."""
    judgments: dict[tuple[str, str], int] = {}
    for where, row in _rows(path, ("query_id", "item_id", "grade"), ()):
        pair = _text(row, "query_id", where), _text(row, "item_id", where)
        if (grade := grades.index(grades.read(row["grade"]))) is None:
            raise UserError(f"{where}: grade is {row['grade']!r}: {grades.expected(row['grade'])}")
        if pair in judgments:
            raise UserError(f"{where}: a second grade of item {pair[1]!r} for query {pair[0]!r}: keep one")
        judgments[pair] = grade + 1
    return judgments


def judged_examples(examples: Sequence[Example], grades: Grades) -> dict[tuple[str, str], int]:
    """{(query_id, example_id): class, from 1} of the examples that have a grade."""
    classes = (((e.query_id, e.example_id), grades.index(e.grade)) for e in examples)
    return {pair: index + 1 for pair, index in classes if index is not None}


def read_verdicts(path: Path, queries: Sequence[str]) -> dict[str, list[str]]:
    """{query_id: verdicts (good, same, bad)}, one verdict per assessor. Raises UserError for a query without pages."""
    verdicts: dict[str, dict[str, str]] = {}
    known = set(queries)
    for where, row in _rows(path, ("query_id", "verdict"), ("assessor",)):
        query_id, assessor = _text(row, "query_id", where), str(row.get("assessor", ""))
        if query_id not in known:
            raise UserError(f"{where}: query {query_id!r} has no pages: remove the line, or add its lists to pages.file")
        if assessor in verdicts.setdefault(query_id, {}):
            raise UserError(f"{where}: a second verdict on query {query_id!r}: give each assessor a name of its own")
        verdict = _one_of(row["verdict"], VERDICTS, "verdict", where)
        if verdict is None:
            raise UserError(f"{where}: verdict is null: give {', '.join(VERDICTS)}, or remove the line")
        verdicts[query_id][assessor] = verdict
    return {query_id: list(by_assessor.values()) for query_id, by_assessor in verdicts.items()}


def shown_grades(
    pages: Pages, judgments: Mapping[tuple[str, str], int], top_n: int, unjudged: str
) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
    """({query_id: classes of the first `top_n` items of A's page}, the same of B's, number of these items without a class).

    Items without a class are left out if `unjudged` is "leave_out". Otherwise, and if a page would have no item left, raises
    UserError with their number.
    """
    grades: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    missing: list[tuple[str, str]] = []
    num_shown = 0
    for lists, graded in zip((pages.a, pages.b), grades, strict=True):
        for query_id, page in lists.items():
            shown = [(query_id, name) for name in page.ids[:top_n]]
            num_shown += len(shown)
            missing += [pair for pair in shown if pair not in judgments]
            graded[query_id] = [judgments[pair] for pair in shown if pair in judgments]
    if missing and unjudged == "refuse":
        query_id, name = missing[0]
        raise UserError(
            f"{len(missing):,} of {num_shown:,} shown items have no grade, such as {name!r} of query {query_id!r}: add grades, "
            "or set pages.unjudged to 'leave_out'"
        )
    if empty := [query_id for graded in grades for query_id, classes in graded.items() if not classes]:
        raise UserError(f"{len(empty):,} pages have no judged item at all, such as one of query {empty[0]!r}: add grades")
    return *grades, len(missing)


def _rows(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, object) of each line. Raises UserError for an empty file and for an unknown or missing key."""
    where = ""
    also = f", and optionally {', '.join(optional)}" if optional else ""
    want = f"an object with {', '.join(required)}{also}"
    for where, row in json_lines(path, want):
        if not row.keys() >= {*required} or row.keys() - {*required, *optional}:
            raise UserError(f"{where}: each line must be {want}")
        yield where, row
    if not where:
        raise UserError(f"{path} is empty: give at least one line")


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if type(row[key]) not in (str, int):
        raise UserError(f"{where}: {key} is {row[key]!r}: give a string or an integer")
    return str(row[key])


def _ids(value: Any, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or any(type(item) not in (str, int) for item in value):
        raise UserError(f"{where}: {key} is {value!r}: give a list of at least one string or integer")
    ids = tuple(map(str, value))
    if len(set(ids)) < len(ids):
        twice = next(name for i, name in enumerate(ids) if name in ids[:i])
        raise UserError(f"{where}: {twice!r} is twice in the list: keep one")
    return ids


def _tags(row: Mapping[str, Any], where: str) -> dict[str, str]:
    tags = row.get("tags") or {}
    if not isinstance(tags, dict) or any(not isinstance(value, str) for value in tags.values()):
        raise UserError(f"{where}: tags are {tags!r}: give an object of strings")
    return tags


def _one_of(value: Any, options: Sequence[str], key: str, where: str) -> str | None:
    if value is not None and value not in options:
        raise UserError(f"{where}: {key} is {value!r}: give {', '.join(options)}")
    return value
