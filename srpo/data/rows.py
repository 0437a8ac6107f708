"""Validation of data rows: a dict of the schema in docs/data.md becomes an `Example`, or a UserError with the fix."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

from srpo.core.errors import UserError
from srpo.data.esci import GOLD_OF_LABEL
from srpo.data.examples import GRADES, Example, grade_from

REQUIRED = ("example_id", "query_id", "query", "title")
_KEYS = (*REQUIRED, "fields", "gold", "truth", "tags", "grade", "label")
_VERDICTS = tuple(f"L{grade}" for grade in GRADES)


def example_from_row(row: dict[str, Any], where: str, num_steps: int, options: Sequence[Sequence[str]] = ()) -> Example:
    """The example of a row of the schema.

    `where` (file and line) begins every error message. `gold` and `truth` get `num_steps` entries. `options[j]`, if not empty,
    are the possible answers of step j: labels take their spelling, any other label is an error. A row with `grade` or `label`
    gets the tag "grade"; a tag "grade" of the row itself is spelled as the answer that it names. UserError for a missing or
    unknown key, a wrong type, a wrong number of steps, a tag "grade" that names no answer, or a grade, label, gold verdict and
    tag that disagree.
    """
    for key in REQUIRED:
        if key not in row:
            raise UserError(f"{where}: {key!r} is missing: a row needs {', '.join(REQUIRED)} (docs/data.md)")
    for key in row:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            fix = f"did you mean {near[0]!r}?" if near else "product fields go into 'fields', strata into 'tags'"
            raise UserError(f"{where}: unknown key {key!r}: {fix}")
    gold = _answers(row, "gold", where, num_steps, options)
    tags = _strings(row, "tags", where)
    verdict = _verdict(row, where)
    if verdict is not None:
        if options and options[-1] and verdict.casefold() not in map(str.casefold, options[-1]):
            raise UserError(f"{where}: grade or label is {verdict}, but the last step allows {', '.join(options[-1])}: use gold")
        if gold[-1] not in (None, verdict):
            raise UserError(f"{where}: the last entry of gold is {gold[-1]!r} but grade or label is {verdict}: keep one of them")
        gold = (*gold[:-1], verdict)
    if tag := tags.pop("grade", "").strip():
        tags["grade"] = _grade_tag(tag, gold[-1], options[-1] if options else (), where)
    elif verdict is not None:
        tags["grade"] = verdict
    return Example(
        example_id=_identifier(row, "example_id", where),
        query_id=_identifier(row, "query_id", where),
        query=_text(row, "query", where),
        title=_text(row, "title", where),
        fields=_strings(row, "fields", where),
        gold=gold,
        truth=_answers(row, "truth", where, num_steps, options),
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


def _answers(
    row: dict[str, Any], key: str, where: str, num_steps: int, options: Sequence[Sequence[str]]
) -> tuple[str | None, ...]:
    """One label or None per step, spelled as in the step's options."""
    value = row.get(key)
    if value is None:
        return (None,) * num_steps
    if not isinstance(value, list) or len(value) != num_steps:
        got = f"has {len(value)} entries" if isinstance(value, list) else f"is {_shown(value)}"
        raise UserError(f"{where}: {key!r} {got}: write a list of {num_steps}, one per step (null if unknown)")
    answers = list(value)
    for j, entry in enumerate(value):
        if entry is None:
            continue
        if not isinstance(entry, str) or not entry.strip():
            raise UserError(f"{where}: entry {j + 1} of {key!r} is {_shown(entry)}: write a non-empty string or null")
        if options and options[j]:
            answers[j] = next((option for option in options[j] if option.casefold() == entry.casefold()), None)
            if answers[j] is None:
                raise UserError(f"{where}: entry {j + 1} of {key!r} is {entry!r}: step {j + 1} allows {', '.join(options[j])}")
    last = answers[-1]
    if last is not None and re.fullmatch(r"[lL]\s*\d+", last) and last not in _VERDICTS:
        raise UserError(f"{where}: the verdict of {key!r} is {last!r}: write {', '.join(_VERDICTS)}")
    return tuple(answers)


def _grade_tag(tag: str, label: str | None, options: Sequence[str], where: str) -> str:
    """The answer of the last step, or else the verdict, that a tag "grade" names, as it is spelled there; "4", "4.0" and "E" name
    "L4".

    UserError for a tag that names none, or another than `label`.
    """
    answers = [*options, *(verdict for verdict in _VERDICTS if verdict not in options)]
    if label is not None and label not in answers:
        answers.append(label)
    number = re.fullmatch(r"[lL]?\s*(\d+)(?:\.0+)?", tag)
    meant = f"L{number[1]}" if number else GOLD_OF_LABEL.get(tag.upper(), tag)
    named = next((answer for text in (tag, meant) for answer in answers if answer.casefold() == text.casefold()), None)
    if named is None:
        raise UserError(
            f"{where}: the tag grade is {tag!r}, which is none of {', '.join(answers)}: write one of them, or rename the tag"
        )
    if label is not None and named.casefold() != label.casefold():
        raise UserError(f"{where}: the tag grade is {tag!r} but the last entry of gold {label!r}: keep one of them")
    return named


def _verdict(row: dict[str, Any], where: str) -> str | None:
    """The verdict, "L1" to "L4", of `grade` (1 to 4) or `label` (E, S, C, I); None if the row has neither."""
    label, grade = row.get("label"), grade_from(row.get("grade"))
    if grade is None and row.get("grade") is not None:
        raise UserError(f"{where}: 'grade' is {_shown(row['grade'])}: write 1, 2, 3 or 4 (4 is the best)")
    if label is not None and (not isinstance(label, str) or label not in GOLD_OF_LABEL):
        raise UserError(f"{where}: 'label' is {_shown(label)}: write one of {', '.join(GOLD_OF_LABEL)}")
    of_grade = None if grade is None else f"L{grade}"
    of_label = None if label is None else GOLD_OF_LABEL[label]
    if of_grade and of_label and of_grade != of_label:
        raise UserError(f"{where}: grade {grade} and label {label} disagree (E, S, C, I are 4, 3, 2, 1): keep one of them")
    return of_grade or of_label
