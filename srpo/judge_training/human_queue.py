"""The queue for human verification (4.3.1): mined cases as JSON lines that a human edits, read back as right verdicts.

A line is one case. The human writes into its field "human" one entry per step: "correct", "incorrect", or null if undecidable.
A line whose field is empty ([], "" or null) is not verified.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from srpo.core.errors import UserError
from srpo.core.jsonl import json_lines, json_object
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.prompts import build_prompt
from srpo.judge_training.hard_cases import Case
from srpo.rewards.verdicts import WORDS

Labels = tuple[bool | None, ...]  # [J]
_KEYS = ("id", "example_id", "response", "labels", "human")  # that are read back
COUNTS = ("verified", "corrected", "unverified", "unverified_used", "dropped")  # counts of `verified_cases`, as num_*


def queue_lines(cases: Iterable[Case], examples: dict[str, Example], schema: StepSchema) -> str:
    """The text of a queue file, one line per case in the order of `cases`, hardest first."""
    return "".join(json.dumps(_row(c, examples[c.example_id], schema), ensure_ascii=False) + "\n" for c in cases)


def _row(case: Case, example: Example, schema: StepSchema) -> dict[str, Any]:
    return {
        "id": case.case_id,
        "example_id": case.example_id,
        "query": example.query,
        "item": build_prompt(example, "{item}"),
        "response": case.response,
        "steps": [spec.name for spec in schema.specs],
        "judge": [_word(case.verdict(j)) for j in range(schema.num_steps)],
        "votes": list(case.shares),
        "num_votes": list(case.num_votes),
        "labels": [_word(label) for label in case.labels],
        "disagrees": [schema.specs[j].name for j in range(schema.num_steps) if case.disagrees(j)],
        "solve_rate": case.solve_rate,
        "judge_wrote": case.reason,
        "human": [],
    }


def _word(verdict: bool | None) -> str | None:
    return None if verdict is None else WORDS[verdict]


def fill_in(queue: str, verdicts: Iterable[Sequence[bool | None]]) -> str:
    """The text of a queue with `verdicts` in the field "human" of each line; for the simulated annotator."""
    lines = enumerate(queue.split("\n"), start=1)  # not splitlines: a response may contain U+2028 and the like
    rows = [json_object(line.encode(), f"the queue, line {number}", "the line that was mined") for number, line in lines if line]
    return "".join(
        json.dumps({**row, "human": [_word(v) for v in human]}, ensure_ascii=False) + "\n"
        for row, human in zip(rows, verdicts, strict=True)
    )


@dataclass(frozen=True)
class QueueLine:
    """One line of a queue, read back."""

    example_id: str
    response: str
    labels: Labels  # `Case.labels`: from an annotator or a gold label
    human: Labels | None  # None if the line is not filled in
    where: str  # file and line, for error messages


def read_queue(path: str | Path, schema: StepSchema) -> dict[str, QueueLine]:
    """Case id -> its line. Blank lines are ignored.

    UserError with file and line for a malformed line, an unknown verdict, a wrong number of steps, or a repeated id.
    """
    read: dict[str, QueueLine] = {}
    for where, row in json_lines(path, f"an object with {', '.join(_KEYS)}"):
        if missing := [key for key in _KEYS if key not in row]:
            raise UserError(f"{where}: not a line of judge_queue.jsonl, {missing[0]!r} is missing: give {', '.join(_KEYS)}")
        case_id, human, texts = row["id"], row["human"], (row["example_id"], row["response"])
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: example_id or response is no string: restore both from judge_queue.jsonl")
        labels = _labels(row["labels"], "labels", where, schema)
        if not isinstance(case_id, str) or case_id in read:
            raise UserError(f"{where}: id is {case_id!r}, not a string or already used: keep one line per case")
        verdicts = _labels(human, "human", where, schema) if human not in ([], "", None) else None
        read[case_id] = QueueLine(*texts, labels, verdicts, where)
    return read


def _labels(words: Any, key: str, where: str, schema: StepSchema) -> Labels:
    if not isinstance(words, list) or len(words) != schema.num_steps:
        got = f"{len(words)} verdicts" if isinstance(words, list) else repr(words)
        names = ", ".join(spec.name for spec in schema.specs)
        raise UserError(f"{where}: {key} has {got}: give a list of {schema.num_steps}, one per step ({names})")
    labels: list[bool | None] = []
    for word in words:
        folded = word.strip().casefold() if isinstance(word, str) else word
        if folded is not None and (not isinstance(folded, str) or folded not in WORDS):
            raise UserError(f"{where}: {key} has {word!r}: write correct, incorrect, or null if undecidable")
        labels.append(None if folded is None else folded == WORDS[True])
    return tuple(labels)


def verified_cases(
    queue: str | Path, verified: str | Path, schema: StepSchema, unverified: Literal["drop", "use"]
) -> tuple[dict[str, tuple[QueueLine, Labels]], dict[str, int]]:
    """(case id -> (its line in `queue`, the right verdicts [J]); numbers of cases num_verified, num_corrected, ... (`COUNTS`)).

    The human's verdicts in `verified` replace the labels of the queue; a step with null is not trained. A case that is not filled
    in or missing from `verified` is dropped, or with "use" keeps its labels. A case without any verdict is dropped.
    UserError with file and line for a case that is not in the queue, as in `read_queue`, or if no case is left.
    """
    cases, filled = read_queue(queue, schema), read_queue(verified, schema)
    for case_id, line in filled.items():
        if case_id not in cases:
            raise UserError(f"{line.where}: case {case_id!r} is not in {queue}: give the edited copy of this queue")
    chosen: dict[str, tuple[QueueLine, Labels]] = {}
    numbers: dict[str, int] = dict.fromkeys((f"num_{what}" for what in COUNTS), 0)
    for case_id, line in cases.items():
        human = filled[case_id].human if case_id in filled else None
        right = line.labels if human is None else human
        numbers["num_unverified" if human is None else "num_verified"] += 1
        if (human is None and unverified == "drop") or all(label is None for label in right):
            numbers["num_dropped"] += 1
            continue
        numbers["num_unverified_used"] += human is None
        numbers["num_corrected"] += right != line.labels
        chosen[case_id] = line, right
    if not chosen:
        raise UserError(
            f"none of the {len(cases)} cases of {queue} has a verdict to train on: fill in the field human in {verified}, "
            "or take the machine's labels with --unverified use"
        )
    return chosen, numbers
