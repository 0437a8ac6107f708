"""Validation of data rows: a dict of the schema in docs/data.md becomes an `Example`, or a UserError with the fix."""

from __future__ import annotations

import difflib
import json
from typing import Any

from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.steps import StepSchema
from srpo.core.text import fold
from srpo.data.examples import Example

REQUIRED = ("example_id", "query_id", "query", "title")
_KEYS = (*REQUIRED, "fields", "gold", "truth", "tags", "grade", "label")


def example_from_row(row: dict[str, Any], where: str, schema: StepSchema) -> Example:
    """The example of a row of the schema in docs/data.md.

    `where` (file and line) begins every error message. `gold` and `truth` get one entry per step of `schema`: labels of a step
    with options take their spelling, any other label is an error. A row with `grade` or `label`, in any spelling that
    `schema.grades` reads, gets the tag "grade"; a tag "grade" of the row itself is spelled as the grade that it names. UserError
    for a missing or unknown key, a wrong type, a wrong number of steps, a value that names no grade, or a grade, label, gold
    verdict and tag that disagree.
    """
    for key in REQUIRED:
        if key not in row:
            raise UserError(f"{where}: {key!r} is missing: a row needs {', '.join(REQUIRED)} (docs/data.md)")
    for key in row:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            fix = f"did you mean {near[0]!r}?" if near else "product fields go into 'fields', strata into 'tags'"
            raise UserError(f"{where}: unknown key {key!r}: {fix}")
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
    return Example(
        example_id=_identifier(row, "example_id", where),
        query_id=_identifier(row, "query_id", where),
        query=_text(row, "query", where),
        title=_text(row, "title", where),
        fields=_strings(row, "fields", where),
        gold=gold,
        truth=_answers(row, "truth", where, schema),
        tags=tags,
    )


def row_from_example(example: Example) -> dict[str, Any]:
    """The inverse of `example_from_row`."""
    row = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(example).items()}
    del row["attack"]  # no part of the data
    return row


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
            if grade is None:
                raise UserError(f"{where}: {key!r} is {_shown(value)}: {grades.expected(value)}")
            named[key] = grade
    if len({*named.values()}) > 1:
        raise UserError(f"{where}: grade {row['grade']} and label {row['label']} disagree: keep one of them")
    return next(iter(named.values()), None)
