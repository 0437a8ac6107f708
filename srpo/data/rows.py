"""Validation of data rows: a dict of the schema in docs/data.md becomes an `Example`, or a UserError with the fix."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.steps import StepSchema
from srpo.core.text import fold
from srpo.data.columns import KEYS, NEEDED, unknown_key
from srpo.data.examples import Example


def example_from_row(row: dict[str, Any], where: str, schema: StepSchema) -> Example:
    """The example of a row of the schema in docs/data.md.

    `where` (file and line) begins every error message. `gold` and `truth` get one entry per step of `schema`: labels of a step
    with options take their spelling, any other label is an error. A row with `grade` or `label`, in any spelling that
    `schema.grades` reads, gets the tag "grade"; a tag "grade" of the row itself is spelled as the grade that it names. UserError
    for a missing or unknown key, a wrong type, a wrong number of steps, a value that names no grade, or a grade, label, gold
    verdict and tag that disagree. Missing ids are made from the row's contents: the same row has the same ids in any file and
    at any place in it.
    """
    for key in NEEDED:
        if key not in row:
            raise UserError(f"{where}: {key!r} is missing: a row needs {' and '.join(NEEDED)} (docs/data.md)")
    for key in row:
        if key not in KEYS:
            raise UserError(f"{where}: {unknown_key(key)}")
    gold = _answers(row, "gold", where, schema)
    tags = _strings(row, "tags", where)
    verdict = _verdict(row, where, schema.grades)
    if verdict is not None:
        if gold[-1] not in (None, verdict):
            raise UserError(f"{where}: the last entry of gold is {gold[-1]!r} but grade or label is {verdict}: keep one of them")
        gold = (*gold[:-1], verdict)
    if tag := tags.pop("grade", "").strip():
        tags["grade"] = _grade_tag(tag, gold[-1], schema.grades, where)
    elif verdict is not None:
        tags["grade"] = verdict
    query, title, fields = _text(row, "query", where), _text(row, "title", where), _strings(row, "fields", where)
    query_id = _identifier(row, "query_id", where) if "query_id" in row else _made_id(fold(query))
    return Example(
        example_id=_example_id(row, where, query_id, query, title, fields),
        query_id=query_id,
        query=query,
        title=title,
        fields=fields,
        gold=gold,
        truth=_answers(row, "truth", where, schema),
        tags=tags,
        where="" if "example_id" in row or row.keys() >= {"query_id", "item_id"} else where,
    )


def row_from_example(example: Example) -> dict[str, Any]:
    """The inverse of `example_from_row`."""
    row = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(example).items()}
    del row["attack"], row["where"]  # no part of the data
    return row


def _example_id(row: dict[str, Any], where: str, query_id: str, query: str, title: str, fields: dict[str, str]) -> str:
    """The row's own id; else QUERYID-ITEMID with an item_id; else a hash of query, title and fields."""
    if "example_id" in row:
        if "item_id" in row:
            raise UserError(f"{where}: example_id and item_id are both given: keep one, because item_id makes an example_id")
        return _identifier(row, "example_id", where)
    if "item_id" in row:
        return f"{query_id}-{_identifier(row, 'item_id', where)}"
    return _made_id(json.dumps([query_id, fold(query), title, *sorted(fields.items())]))


def _made_id(text: str) -> str:
    """The same id for the same text, everywhere."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _shown(value: object) -> str:
    return json.dumps(value, default=str)[:80]


def _identifier(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(row, key, where)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} is {_shown(value)}: write a non-empty string")
    return value


def _strings(row: dict[str, Any], key: str, where: str) -> dict[str, str]:
    """The object of strings at `key`, without its null entries; {} if the key is missing or null."""
    value = row.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f'{where}: {key!r} is {_shown(value)}: write an object of strings like {{"brand": "Acme"}}')
    for name, entry in value.items():
        if entry is not None and not isinstance(entry, str):
            raise UserError(f"{where}: {key}.{name} is {_shown(entry)}: write it as a string")
    return {name: entry for name, entry in value.items() if entry is not None}


def _answers(row: dict[str, Any], key: str, where: str, schema: StepSchema) -> tuple[str | None, ...]:
    """One label or None per step, spelled as in the step's options."""
    value, num_steps = row.get(key), schema.num_steps
    if value is None:
        return (None,) * num_steps
    if not isinstance(value, list) or len(value) != num_steps:
        got = f"has {len(value)} entries" if isinstance(value, list) else f"is {_shown(value)}"
        raise UserError(f"{where}: {key!r} {got}: write a list of {num_steps}, one per step (null if unknown)")
    answers = list(value)
    for j, (entry, options) in enumerate(zip(value, schema.options, strict=True)):
        if entry is None:
            continue
        if not isinstance(entry, str) or not entry.strip():
            raise UserError(f"{where}: entry {j + 1} of {key!r} is {_shown(entry)}: write a non-empty string or null")
        if options:
            known = next((option for option in options if fold(option) == fold(entry)), None)
            answers[j] = schema.grades.read(entry) if known is None and j + 1 == num_steps else known
            if answers[j] is None:
                raise UserError(f"{where}: entry {j + 1} of {key!r} is {entry!r}: step {j + 1} allows {', '.join(options)}")
    return tuple(answers)


def _grade_tag(tag: str, label: str | None, grades: Grades, where: str) -> str:
    """The grade that a tag "grade" names. UserError for a tag that names none, or another than `label`."""
    named = grades.read(tag)
    if named is None:
        raise UserError(f"{where}: the tag grade is {tag!r}: {grades.expected(tag)}, or rename the tag")
    if label is not None and named != label:
        raise UserError(f"{where}: the tag grade is {tag!r} but the last entry of gold {label!r}: keep one of them")
    return named


def _verdict(row: dict[str, Any], where: str, grades: Grades) -> str | None:
    """The grade that `grade` or `label` names; None if the row has neither."""
    named: dict[str, str] = {}
    for key in ("grade", "label"):
        if (value := row.get(key)) is not None:
            grade = grades.read(value)
            if grade is None and isinstance(value, str) and not value.strip():
                raise UserError(f"{where}: {key!r} is empty: give the pair a grade, or remove the row")
            if grade is None:
                raise UserError(f"{where}: {key!r} is {_shown(value)}: {grades.expected(value)}")
            named[key] = grade
    if len({*named.values()}) > 1:
        raise UserError(f"{where}: grade {row['grade']} and label {row['label']} disagree: keep one of them")
    return next(iter(named.values()), None)
