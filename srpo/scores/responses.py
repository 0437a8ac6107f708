"""Existing responses, read from a `rollouts.jsonl` or a file of predictions and prepared for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from srpo.core.batch import Rollout, read_rollouts
from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.jsonl import json_lines
from srpo.core.steps import StepSchema, StepSpec
from srpo.data.examples import Example


@dataclass(frozen=True)
class Responses:
    """The responses of one system: rollout i answers example i, under `schema`."""

    rollouts: list[Rollout]
    examples: list[Example]
    schema: StepSchema
    num_others: int = 0  # rollouts of pairs that are not among the examples, which are left out


def verdict_only(grades: Grades) -> StepSchema:
    """The schema of predictions that consist of a verdict alone."""
    return StepSchema([StepSpec("verdict", r"\S")], grades)


def read_predictions(path: Path, schema: StepSchema) -> dict[str, tuple[str | None, ...]]:
    """{example_id: answers} of a JSON Lines file: one answer, the verdict ("L3"), or with "answers" all J.

    A line is `{"example_id": "...", "prediction": "L3"}`, in any spelling that `schema.grades` reads, or null for no verdict; an
    optional `"answers"` [J] gives the answer of every step, the last equal to the prediction. Either all lines have answers or
    none; other keys are ignored. Raises UserError with file and line for an invalid or repeated line, and for an empty file.
    """
    predictions: dict[str, tuple[str | None, ...]] = {}
    want = '{"example_id": "...", "prediction": 1}'
    for where, row in json_lines(path, want):
        if missing := {"example_id", "prediction"} - row.keys():
            raise UserError(f"{where}: {min(missing)!r} is missing: each line must be {want}")
        example_id, prediction = row["example_id"], schema.grades.read(row["prediction"])
        if not isinstance(example_id, str) and type(example_id) is not int:
            raise UserError(f"{where}: example_id is {example_id!r}: give a string or an integer")
        if prediction is None and row["prediction"] is not None:
            raise UserError(
                f"{where}: prediction is {row['prediction']!r}: {schema.grades.expected(row['prediction'])}, or null for none"
            )
        if str(example_id) in predictions:
            raise UserError(f"{where}: a second prediction of {example_id!r}: keep one per example")
        answers = (prediction,)
        if row.get("answers") is not None:
            answers = _answers(row["answers"], prediction, schema, where)
        if predictions and len(answers) != len(next(iter(predictions.values()))):
            raise UserError(f"{where}: some lines have answers and some have none: give answers in all lines or in none")
        predictions[str(example_id)] = answers
    if not predictions:
        raise UserError(f"{path} is empty: give at least one prediction")
    return predictions


def _answers(answers: Any, verdict: str | None, schema: StepSchema, where: str) -> tuple[str | None, ...]:
    """The answers of a line, spelled like the options of their steps."""
    texts = isinstance(answers, list) and all(answer is None or isinstance(answer, str) for answer in answers)
    if not texts or len(answers) != schema.num_steps:
        raise UserError(
            f"{where}: answers are {answers!r}: give a list of {schema.num_steps} strings, one per step, null for none "
            "(the steps are those of --config)"
        )
    canonical = []
    for spec, answer in zip(schema.specs, answers, strict=True):
        spelling = None if answer is None else spec.canonical(answer)
        if answer is not None and spelling is None:
            options = ", ".join(spec.options) or "a text"
            raise UserError(f"{where}: {answer!r} is no answer to {spec.name}: give {options}, or null")
        canonical.append(spelling)
    if canonical[-1] != verdict:
        raise UserError(f"{where}: prediction is {verdict}, but the last answer {canonical[-1]}: give the same verdict")
    return tuple(canonical)


def from_predictions(
    predictions: Mapping[str, Sequence[str | None]], examples: Sequence[Example], schema: StepSchema, limit: int = 0
) -> Responses:
    """Responses made of predictions, for all examples or the first `limit`; predictions of verdicts alone get `verdict_only`.

    Raises UserError if an example has no prediction, and for a prediction of a pair that is not among `examples`.
    """
    if unknown := sorted(predictions.keys() - {example.example_id for example in examples}):
        raise UserError(f"{len(unknown)} predictions have no example in the data, such as {unknown[0]}: remove them")
    chosen = list(examples[: limit or None])
    check_all_there(predictions, chosen, "prediction")
    all_answers = [tuple(predictions[example.example_id]) for example in chosen]
    rollouts = [
        Rollout.from_answers(example.example_id, answers, group=i)
        for i, (example, answers) in enumerate(zip(chosen, all_answers, strict=True))
    ]
    ready = Responses(rollouts, chosen, schema)
    return ready if all(len(answers) == schema.num_steps for answers in all_answers) else verdicts_alone(ready)


def verdicts_alone(responses: Responses) -> Responses:
    """The same responses reduced to their verdicts, under `verdict_only`."""
    return Responses(
        [replace(r, step_ends=r.step_ends[-1:], answers=r.answers[-1:]) for r in responses.rollouts],
        [replace(e, gold=e.gold[-1:], truth=()) for e in responses.examples],
        verdict_only(responses.schema.grades),
        responses.num_others,
    )


def from_rollouts(rollouts: Iterable[Rollout], examples: Sequence[Example], schema: StepSchema) -> Responses:
    """Responses made of rollouts, in the order of the file; several rollouts of one pair all count.

    Rollouts of other pairs are left out and counted. Raises UserError if an example has no rollout, or a rollout another number
    of steps than `schema`, or a verdict that is no grade of it.
    """
    by_id = {example.example_id: example for example in examples}
    kept, num_others = [], 0
    for rollout in rollouts:
        if rollout.example_id not in by_id:
            num_others += 1
        elif len(rollout.answers) != schema.num_steps:
            raise UserError(
                f"the rollout of {rollout.example_id} has {len(rollout.answers)} steps, the settings have {schema.num_steps}: "
                "set --config to the TOML that it was sampled with"
            )
        elif (verdict := rollout.answers[-1]) is not None and schema.grades.index(verdict) is None:
            raise UserError(
                f"the rollout of {rollout.example_id} has the verdict {verdict!r}, the settings have the grades "
                f"{', '.join(schema.grades.names)}: set --config to the TOML that it was sampled with"
            )
        else:
            kept.append(rollout)
    check_all_there({rollout.example_id for rollout in kept}, examples, "rollout")
    return Responses(kept, [by_id[rollout.example_id] for rollout in kept], schema, num_others)


def check_all_there(have: Iterable[str], examples: Sequence[Example], what: str) -> None:
    """Raise UserError if an example's id is not in `have`; the message calls the missing thing `what`."""
    missing = {example.example_id for example in examples} - set(have)
    if missing:
        raise UserError(f"{len(missing)} of {len(examples)} examples have no {what}, such as {min(missing)}: add one for each")


def load_rollouts(path: Path) -> list[Rollout]:
    """All rollouts of a file. Raises UserError if it is not a rollouts.jsonl."""
    return [rollout for _, rollout in read_rollouts(path)]


def from_file(source: Path, examples: Sequence[Example], schema: StepSchema, limit: int = 0) -> Responses:
    """One response to each example, or to the first `limit`, in their order, from a rollouts.jsonl, predictions, or the folder of
    an evaluation.

    Raises UserError for any other file, and if an example has no response or several.
    """
    if source.is_dir():
        source = source / "rollouts.jsonl"
    if not source.is_file():
        raise UserError(f"no such file: {source}: name a rollouts.jsonl, a file of predictions, or the folder of an evaluation")
    with source.open("rb") as file:
        is_rollouts = b'"response_ids"' in file.readline()
    if not is_rollouts:
        return from_predictions(read_predictions(source, schema), examples, schema, limit)
    examples = examples[: limit or None]
    responses = from_rollouts(load_rollouts(source), examples, schema)
    first: dict[str, Rollout] = {}
    for rollout in responses.rollouts:
        if rollout.example_id in first:
            raise UserError(f"{source} has several rollouts of {rollout.example_id}: keep one per example")
        first[rollout.example_id] = rollout
    return replace(responses, rollouts=[first[example.example_id] for example in examples], examples=list(examples))
