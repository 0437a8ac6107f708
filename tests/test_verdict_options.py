"""Last steps with other answers than L1 to L4: every program scores them, and a grade of another scale is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import srpo.compare
import srpo.evaluate
from srpo.core.batch import Rollout
from srpo.core.config.evaluation import CompareConfig, EvaluateConfig
from srpo.core.config.train import Config, DataConfig
from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.settings import dump_toml, load
from srpo.core.step_presets import PAPER_STEPS, StepsConfig
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.readers import load_examples, write_examples
from srpo.data.strata import tags_with_grade
from srpo.scores.evaluation import results_dict
from srpo.training.checks import check_settings

OTHERS = [("R1", "R2", "R3", "R4"), ("L1", "L2", "L3", "L4", "L5"), ("G0", "G1", "G2"), ("no", "yes"), ("1", "2", "3", "4")]


def steps(options: tuple[str, ...]) -> StepSchema:
    return StepsConfig().schema(Grades(options))


def example(label: str | None, name: str = "e") -> Example:
    return Example(name, "q", "query", "title", gold=(None, None, None, None, label), truth=(None,) * 5)


@pytest.mark.parametrize("options", OTHERS)
def test_programs_that_score_verdicts_take_them(options: tuple[str, ...], tmp_path: Path) -> None:
    """Every grade once, and the worst grade predicted for all: its F1 is 2 / (C + 1), all others are 0."""
    cfg = Config(data=DataConfig(train="pairs.jsonl", eval="eval.jsonl"), grades=Grades(options))
    check_settings(cfg)
    toml, data, predictions = tmp_path / "run.toml", tmp_path / "data.jsonl", tmp_path / "predictions.jsonl"
    toml.write_text(dump_toml(cfg))
    write_examples(data, [example(option, option) for option in options])
    predictions.write_text("".join(json.dumps({"example_id": o, "prediction": 1}) + "\n" for o in options))
    right = tmp_path / "right.jsonl"
    right.write_text("".join(json.dumps({"example_id": o, "prediction": o.lower()}) + "\n" for o in options))
    files = ["--data", str(data), "--config", str(toml), "--bootstrap.num-draws", "0"]
    out = tmp_path / "out"
    srpo.evaluate.main(load(EvaluateConfig, ["--predictions", str(predictions), "--out", str(out), *files]))
    scores = json.loads((out / "results.json").read_text())
    num = len(options)
    assert scores["class_f1"] == [pytest.approx(2 / (num + 1)), *[0.0] * (num - 1)]
    assert (scores["accuracy"], scores["macro_f1"], scores["good_f1"]) == pytest.approx((1 / num, 2 / (num + 1) / num, 0))
    assert scores["confusion"] == [[1] + [0] * num] * num
    both = ["--a", str(predictions), "--b", str(right), *files, "--out", str(tmp_path / "c.json")]
    srpo.compare.main(load(CompareConfig, both))
    compared = json.loads((tmp_path / "c.json").read_text())["offline"]
    assert compared["a"]["class_f1"] == scores["class_f1"] and compared["b"]["class_f1"] == [1.0] * num
    assert compared["b"]["macro_f1"] == compared["b"]["good_f1"] == 1.0


@pytest.mark.parametrize("label", ["R1", "G0", "yes", "no", "x", "L5", "L0", "1"])
def test_a_label_of_another_scale_is_refused_where_it_would_be_scored(label: str) -> None:
    rollouts = [Rollout.from_answers("e", (None, None, None, None, "L1"))]
    with pytest.raises(UserError, match=f"e has the grade '{label}': give every evaluated pair one of L1, L2, L3, L4"):
        results_dict(rollouts, [example(label)], steps(("L1", "L2", "L3", "L4")))
    assert example(label).grade == label and tags_with_grade(example(label)) == {"grade": label}
    assert example(None).grade is None and tags_with_grade(example(None)) == {}


@pytest.mark.parametrize("options", [("l1", "l2", "l3", "l4"), ("L1", "L2", "L3", "L4"), ()])
def test_what_spells_grades_is_scored_right(options: tuple[str, ...]) -> None:
    """The accuracy of the verdict is that of the last step, because one rule compares answers."""
    schema = StepSchema([*PAPER_STEPS[:-1], replace(PAPER_STEPS[-1], options=options)])
    labels, given = ("L4", "L3", "L1", "L1"), ("L4", "L1", "L1", None)
    spelled = [next((option for option in options if option.upper() == answer), answer) for answer in given]
    rollouts = [Rollout.from_answers("e", (None, None, None, None, answer)) for answer in spelled]
    results = results_dict(rollouts, [example(label) for label in labels], schema)
    assert results["accuracy"] == results["step_accuracy"][-1] == 0.5
    assert results["confusion"][0] == [1, 0, 0, 0, 1] and results["confusion"][2] == [1, 0, 0, 0, 0]


def test_a_grade_that_the_last_step_does_not_know_is_refused(tmp_path: Path) -> None:
    """Its label could equal no answer, so every response would earn nothing."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"example_id": "e", "query_id": "q", "query": "a", "title": "b", "grade": "L3"}))
    with pytest.raises(UserError, match="line 1: 'grade' is \"L3\": the grades are R1, R2, R3, R4; give other spellings"):
        load_examples(path, steps(("R1", "R2", "R3", "R4")))
    assert load_examples(path, steps(("l1", "l2", "l3", "l4")))[0].grade == "l3"
