"""Judgments: an annotator's verdict on each step of a response, read from a file or made by the simulated annotator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srpo.core.batch import Rollout
from srpo.core.errors import UserError
from srpo.core.jsonl import json_lines
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.judge_training.reasons import simulated_reasons
from srpo.rewards.judge import OracleJudge

_WANT = '{"example_id": ..., "response": ..., "verdicts": [true, ...]}'


@dataclass(frozen=True)
class Judgment:
    """One response with an annotator's verdict, and perhaps reason, on each of its steps."""

    example_id: str
    response: str
    verdicts: tuple[bool | None, ...]  # [J]
    reasons: tuple[str | None, ...]  # [J]


def read_judgments(path: str | Path, num_steps: int) -> Iterator[Judgment]:
    """Stream the judgments of a JSON Lines file. UserError with file and line for a malformed one, and for a second judgment of
    a response."""
    seen: set[tuple[str, str]] = set()
    for where, row in json_lines(path, _WANT):
        judgment = _judgment(row, where, num_steps)
        key = judgment.example_id, judgment.response
        if key in seen:
            raise UserError(f"{where}: a second judgment of the same response to {judgment.example_id!r}: keep one")
        seen.add(key)
        yield judgment


def _judgment(row: dict[str, Any], where: str, num_steps: int) -> Judgment:
    for key in ("example_id", "response", "verdicts"):
        if key not in row:
            raise UserError(f"{where}: {key!r} is missing: write {_WANT}")
    example_id, response, verdicts = row["example_id"], row["response"], row["verdicts"]
    if type(example_id) not in (str, int):
        raise UserError(f"{where}: example_id is {example_id!r}: give a string or an integer")
    if not isinstance(response, str):
        raise UserError(f"{where}: response is {response!r}: give the text that was judged")
    if not (
        isinstance(verdicts, list) and len(verdicts) == num_steps and all(v is None or isinstance(v, bool) for v in verdicts)
    ):
        raise UserError(f"{where}: verdicts is {verdicts!r}: give {num_steps} of true, false or null, one per step")
    reasons = row.get("reasons") or [None] * num_steps
    if not (isinstance(reasons, list) and len(reasons) == num_steps and all(r is None or isinstance(r, str) for r in reasons)):
        raise UserError(f"{where}: reasons is {reasons!r}: give {num_steps} texts, one per step, null for none")
    return Judgment(str(example_id), response, tuple(verdicts), tuple(reasons))


def simulate_judgments(
    rollouts: Iterable[Rollout],
    examples: dict[str, Example],
    schema: StepSchema,
    error_rate: float,
    seed: int,
    with_reasons: bool = True,
) -> list[Judgment]:
    """A simulated annotator's judgment of each distinct sampled response.

    error_rate: probability that a verdict is wrong (`OracleJudge`). Rollouts whose example is not in `examples` are skipped.
    """
    unique = list({(r.example_id, r.text): r for r in rollouts if r.example_id in examples}.values())
    verdicts = OracleJudge(error_rate, seed, schema).judge(unique, [examples[r.example_id] for r in unique])
    unknown = (None,) * schema.num_steps
    judgments = []
    for rollout, row in zip(unique, verdicts, strict=True):
        truth = examples[rollout.example_id].truth or unknown
        reasons = simulated_reasons(rollout.answers, truth, row, schema) if with_reasons else unknown
        plain = tuple(None if v is None else bool(v) for v in row)
        judgments.append(Judgment(rollout.example_id, rollout.text, plain, reasons))
    return judgments


def as_rollout(example_id: str, response: str, schema: StepSchema) -> Rollout:
    """The response as a rollout without tokens, with the answers parsed from its text, for a judge to judge."""
    return Rollout.from_answers(example_id, schema.parse_text(response).answers, text=response)


def hold_out(
    judgments: Sequence[Judgment], examples: dict[str, Example], num_held_out: int
) -> tuple[list[Judgment], list[Judgment], int]:
    """(to train on, held out, number left out): the last `num_held_out` judgments are held out for evaluating the judge.

    Other judgments of a held-out query are left out, and counted: training on them would reveal the intent of the query.
    """
    cut = max(len(judgments) - num_held_out, 0)
    held_out = list(judgments[cut:])
    queries = {examples[j.example_id].query_id for j in held_out}
    shown = [j for j in judgments[:cut] if examples[j.example_id].query_id not in queries]
    return shown, held_out, cut - len(shown)
