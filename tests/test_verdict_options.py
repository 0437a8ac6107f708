"""Last steps with other answers than L1..L4: refused at the start wherever verdicts are scored, and no error anywhere else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import srpo.compare
import srpo.evaluate
from srpo.core.batch import Rollout
from srpo.core.config.evaluation import CompareConfig, EvaluateConfig
from srpo.core.config.train import Config, DataConfig
from srpo.core.errors import UserError
from srpo.core.settings import dump_toml, load
from srpo.core.step_presets import PAPER_STEPS
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.readers import load_examples, write_examples
from srpo.data.strata import tags_with_grade
from srpo.scores.evaluation import results_dict
from srpo.training.checks import check_settings

OTHERS = [("R1", "R2", "R3", "R4"), ("L1", "L2", "L3", "L4", "L5"), ("G0", "G1", "G2"), ("yes", "no"), ("4", "3", "2", "1")]


def steps(options: tuple[str, ...]) -> Any:
    return (*PAPER_STEPS[:-1], replace(PAPER_STEPS[-1], options=options, answer=rf"\b({'|'.join(options)})\b"))


def example(label: str | None) -> Example:
    return Example("e", "q", "query", "title", gold=(None, None, None, None, label))


@pytest.mark.parametrize("options", OTHERS)
def test_programs_that_score_verdicts_refuse_them(options: tuple[str, ...], tmp_path: Path) -> None:
    cfg = Config(data=DataConfig(train="pairs.jsonl", eval="eval.jsonl"), steps=steps(options))
    wrong = next(option for option in options if option not in ("L1", "L2", "L3", "L4"))
    message = f"the last step, 'verdict', allows the answer '{wrong}': only verdicts L1, L2, L3 and L4"
    with pytest.raises(UserError, match=message):
        check_settings(cfg)
    check_settings(replace(cfg, data=DataConfig(train="pairs.jsonl")))  # training alone reads no grade
    toml, data, predictions = tmp_path / "run.toml", tmp_path / "data.jsonl", tmp_path / "predictions.jsonl"
    toml.write_text(dump_toml(cfg))
    write_examples(data, [example(options[0])])
    predictions.write_text(json.dumps({"example_id": "e", "prediction": 1}))
    files = ["--data", str(data), "--config", str(toml)]
    with pytest.raises(UserError, match=message):
        srpo.evaluate.main(load(EvaluateConfig, ["--predictions", str(predictions), *files]))
    with pytest.raises(UserError, match=message):
        srpo.compare.main(load(CompareConfig, ["--a", str(predictions), "--b", str(predictions), *files]))


@pytest.mark.parametrize("label", ["R1", "G0", "yes", "no", "x", "L5", "L0", "", "1", None])
def test_a_label_that_is_no_grade_is_none(label: str | None) -> None:
    assert example(label).grade is None and tags_with_grade(example(label)) == {}


@pytest.mark.parametrize("options", [("l4", "l3", "l2", "l1"), ("L1", "L4"), ()])
def test_what_spells_grades_is_scored_right(options: tuple[str, ...]) -> None:
    """The accuracy of the verdict is that of the last step, because one rule compares answers."""
    schema = StepSchema(steps(options))
    labels, given = ("L4", "L3", "L1", "L1"), ("L4", "L1", "L1", None)
    spelled = [next((option for option in options if option.upper() == answer), answer) for answer in given]
    rollouts = [Rollout.from_answers("e", (None, None, None, None, answer)) for answer in spelled]
    results = results_dict(rollouts, [example(label) for label in labels], schema)
    assert results["accuracy"] == results["step_accuracy"][-1] == 0.5
    assert results["confusion"][0] == [1, 0, 0, 0, 1] and results["confusion"][2] == [1, 0, 0, 0, 0]


def test_a_grade_that_the_last_step_does_not_know_is_refused(tmp_path: Path) -> None:
    """Its label could equal no answer, so every response would earn nothing."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"example_id": "e", "query_id": "q", "query": "a", "title": "b", "grade": 3}))
    schema = StepSchema(steps(("R1", "R2", "R3", "R4")))
    with pytest.raises(UserError, match=r"line 1: grade or label is L3, but the last step allows R1, R2, R3, R4"):
        load_examples(path, schema.num_steps, options=schema.options)
    lower = StepSchema(steps(("l1", "l2", "l3", "l4")))
    assert load_examples(path, lower.num_steps, options=lower.options)[0].grade == 3
