"""srpo.core.steps: schemas read from TOML, and values that a schema refuses."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest

from srpo.core.step_presets import PAPER, PAPER_STEPS
from srpo.core.steps import StepSchema, StepSpec

TOML = """
[[steps]]
name = "think"
header = '^Think:'
sources = ["skip"]
reward = 0.5
[[steps]]
name = "answer"
header = '^Answer:'
answer = '(yes|no)'
options = ["Yes", "No"]
sources = ["gold", "rule"]
reward = 2
"""


def test_a_schema_of_another_length_comes_from_toml() -> None:
    schema = StepSchema(StepSpec(**table) for table in tomllib.loads(TOML)["steps"])
    assert schema.num_steps == 2
    assert schema.max_reward == 2.0
    assert schema.options == ((), ("Yes", "No"))
    parsed = schema.parse_text("Think: a lot\nof text\nAnswer: maybe no, maybe YES!\nBye")
    assert parsed.answers == ("a lot of text", "Yes")
    assert parsed.char_ends == (21, 53)


def test_the_paper_s_coefficients() -> None:
    assert [spec.reward for spec in PAPER_STEPS] == [0.2, 0.2, 0.2, 0.2, 1.0]
    assert PAPER.max_reward == pytest.approx(1.8, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Step 1"}, "lower-case"),
        ({"header": ""}, "header is empty"),
        ({"header": "(a"}, "not a regular expression"),
        ({"header": "a*"}, "matches the empty text"),
        ({"answer": "[a"}, "not a regular expression"),
        ({"header": "(" * 5000 + ")" * 5000}, "not a regular expression"),
        ({"answer": "(a{99999999999999})"}, "not a regular expression"),
        ({"answer": "a"}, "exactly one"),
        ({"answer": "(a)(b)"}, "exactly one"),
        ({"options": ["a", "A "]}, "differ by more"),
        ({"options": [" "]}, "non-empty"),
        ({"options": "abc"}, "write a list"),
        ({"sources": "gold"}, "write a list"),
        ({"sources": []}, "some of gold"),
        ({"sources": ["human"]}, "some of gold, judge, rule, skip"),
        ({"sources": ["gold", "gold"]}, "at most once"),
        ({"sources": ["skip", "gold"]}, "put it last"),
        ({"sources": ["rule"]}, "give options"),
        ({"reward": -1.0}, "at least 0"),
        ({"reward": float("nan")}, "finite"),
    ],
)
def test_a_step_that_could_not_work_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepSpec(**{"name": "a", "header": "^A:", **change})


def test_a_schema_that_could_not_work_is_refused() -> None:
    step = StepSpec("a", "^A:")
    with pytest.raises(ValueError, match="at least one step"):
        StepSchema([])
    with pytest.raises(ValueError, match="two steps are called 'a'"):
        StepSchema([step, replace(step, header="^B:")])
    with pytest.raises(ValueError, match="no step can earn"):
        StepSchema([replace(step, sources=("skip",))])
