"""The queue for human verification, written, edited and read back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from srpo.core.step_presets import PAPER, PAPER_STEPS
from srpo.data.examples import Example
from srpo.judge_training.hard_cases import Case
from srpo.judge_training.human_queue import fill_in, queue_lines, read_queue, verified_cases

SCHEMA = PAPER
EXAMPLES = {n: Example(n, "q", "boots", "Boots", fields={"brand": "Acme"}) for n in "abc"}
CASES = [
    Case(
        "a", "the response \u2028 to a", (True, False, None, None, True), (0.5, None, 1.0, 0.0, 0.75), (4, 0, 4, 4, 4), 0.5, "x"
    ),
    Case("b", "to b", (None,) * 5, (0.5,) * 5, (2,) * 5, 0.5),
    Case("c", "to c", (False,) * 5, (0.5,) * 5, (2,) * 5, 0.5),
]
IDS = [case.case_id for case in CASES]


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    path = tmp_path / "judge_queue.jsonl"
    path.write_text(queue_lines(CASES, EXAMPLES, SCHEMA), encoding="utf-8")
    return path


def edited(queue: Path, changes: dict[int, Any]) -> Path:
    """A copy of the queue in which each change replaces a line (a text) or updates its object (a dict)."""
    lines = queue.read_text(encoding="utf-8").split("\n")
    for i, change in changes.items():
        lines[i] = change if isinstance(change, str) else json.dumps({**json.loads(lines[i]), **change})
    path = queue.with_name("verified.jsonl")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_line_says_all_that_a_human_needs(queue: Path) -> None:
    row = json.loads(queue.read_text(encoding="utf-8").split("\n")[0])
    assert (row["query"], row["item"], row["response"]) == ("boots", "Boots\nbrand: Acme", "the response \u2028 to a")
    assert row["judge"] == ["incorrect", None, "correct", "incorrect", "correct"]
    assert row["labels"] == ["correct", "incorrect", None, None, "correct"]
    assert row["votes"] == [0.5, None, 1.0, 0.0, 0.75] and row["disagrees"] == ["query_intent", "item"]
    assert row["human"] == [] and row["judge_wrote"] == "x" and row["steps"] == [s.name for s in PAPER_STEPS]


def test_the_round_trip(queue: Path) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    verdicts = [tuple(rng.choice((True, False, None)) for _ in range(5)) for _ in CASES]
    queue.with_name("verified.jsonl").write_text(fill_in(queue.read_text(encoding="utf-8"), verdicts), encoding="utf-8")
    read = read_queue(queue.with_name("verified.jsonl"), SCHEMA)
    assert [line.human for line in read.values()] == verdicts and list(read) == IDS, seed
    assert [line.labels for line in read.values()] == [case.labels for case in CASES]
    assert [line.response for line in read.values()] == [case.response for case in CASES]
    assert [line.human for line in read_queue(queue, SCHEMA).values()] == [None] * 3


def test_humans_overrule_labels_and_the_rest_is_dropped_or_used(queue: Path) -> None:
    words = [" Correct", "INCORRECT", None, "correct", "incorrect"]
    verified = edited(queue, {0: {"human": words}, 1: {"human": ""}, 2: {"human": None}})
    chosen, numbers = verified_cases(queue, verified, SCHEMA, "drop")
    assert {k: right for k, (_, right) in chosen.items()} == {IDS[0]: (True, False, None, True, False)}
    assert numbers == {
        "num_verified": 1,
        "num_corrected": 1,
        "num_unverified": 2,
        "num_unverified_used": 0,
        "num_dropped": 2,
    }
    chosen, numbers = verified_cases(queue, verified, SCHEMA, "use")
    assert {k: right for k, (_, right) in chosen.items()} == {IDS[0]: (True, False, None, True, False), IDS[2]: (False,) * 5}
    assert (numbers["num_unverified_used"], numbers["num_dropped"]) == (1, 1)  # the case of b has no label
    missing = edited(queue, {0: {"human": words}, 1: "", 2: "\n"})  # lines taken out
    assert verified_cases(queue, missing, SCHEMA, "use")[0].keys() == chosen.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON list, not an object: write an object with id, example_id"),
        ('{"id": "x"}', "not a line of judge_queue.jsonl"),
        ({"human": ["correct"] * 4}, r"human has 4 verdicts: give a list of 5, one per step \(query_intent, item"),
        ({"human": "correct"}, "human has 'correct': give a list of 5"),
        ({"human": ["correct", "right", None, None, None]}, "human has 'right': write correct, incorrect, or null"),
        ({"human": [True, None, None, None, None]}, "human has True: write correct, incorrect, or null"),
        ({"human": [["correct"], None, None, None, None]}, r"human has \['correct'\]: write correct, incorrect, or null"),
        ({"labels": ["yes"] * 5}, "labels has 'yes'"),
        ({"id": "somebody-else", "human": ["correct"] * 5}, r"case 'somebody-else' is not in .*judge_queue\.jsonl"),
        ({"id": IDS[0]}, r"id is 'a-\w+', not a string or already used"),
        ({"id": ["x"]}, r"id is \['x'\], not a string"),
    ],
)
def test_a_bad_line_is_named(queue: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"verified\.jsonl, line 2: {message}"):
        verified_cases(queue, edited(queue, {1: change}), SCHEMA, "drop")


def test_a_file_that_nobody_has_filled_in(queue: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 3 cases .* fill in the field human .* --unverified use"):
        verified_cases(queue, queue, SCHEMA, "drop")
