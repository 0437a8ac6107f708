"""Scores on scales of 2 to 10 grades: equal to scikit-learn's, and the same whatever the data call the grades."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from srpo.compare import main as compare
from srpo.core.batch import Rollout
from srpo.core.config.evaluation import BootstrapConfig, CompareConfig
from srpo.core.grades import PAPER_GRADES, Grades
from srpo.core.settings import load
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.rows import example_from_row, row_from_example
from srpo.data.world import World
from srpo.scores.evaluation import results_dict, score_rows
from srpo.scores.paired import compare_systems
from srpo.scores.plots import draw_confusion
from srpo.scores.responses import verdict_only
from srpo.scores.tables import before_after_table, results_table
from srpo.scores.tally import verdict_scores

NAMES = ("bad", "poor", "not good", "fair", "good", "very good", "great", "best", "top", "perfect")
SCORES = ("macro_f1", "accuracy", "good_f1")


def scored(grades: Grades, true: Sequence[int], predicted: Sequence[int | None], **options: Any) -> dict[str, Any]:
    """Results of verdicts by index, None for a response without a readable one."""
    examples = [Example(f"e{i}", f"q{i % 7}", "", "", gold=(grades.names[t],)) for i, t in enumerate(true)]
    rollouts = [Rollout.from_answers(f"e{i}", (None if p is None else grades.names[p],)) for i, p in enumerate(predicted)]
    return results_dict(rollouts, examples, verdict_only(grades), **options)


@pytest.mark.parametrize("num", [2, 3, 4, 5, 10])
@pytest.mark.parametrize("draw", range(6))
def test_scores_of_any_scale_equal_scikit_learn(num: int, draw: int) -> None:
    names = NAMES[:num]
    good = tuple(random.sample(names, random.randint(1, num - 1))) if draw % 2 else ()
    grades = Grades(names, good=good)
    classes = random.sample(range(num), random.randint(1, num))  # absent classes, too
    guesses = [*random.sample(range(num), random.randint(0, num)), None]
    true = [random.choice(classes) for _ in range(random.randint(1, 80))]
    predicted = [random.choice([t, *guesses]) for t in true]
    filled = [num if p is None else p for p in predicted]  # no verdict: a class of its own, outside the averages
    results = scored(grades, true, predicted)
    absent: dict[str, Any] = {"zero_division": 0}
    each: dict[str, Any] = {"labels": range(num), "average": None, **absent}
    positive = {names.index(name) for name in good} if good else set(range((num + 1) // 2, num))
    np.testing.assert_allclose(results["class_f1"], f1_score(true, filled, **each), rtol=0, atol=1e-12)
    macro = f1_score(true, filled, labels=range(num), average="macro", **absent)
    good_f1 = f1_score([t in positive for t in true], [p in positive for p in filled], pos_label=True, **absent)
    expected = {"macro_f1": macro, "good_f1": good_f1, "accuracy": accuracy_score(true, filled)}
    assert {key: results[key] for key in SCORES} == pytest.approx(expected, rel=0, abs=1e-12)
    np.testing.assert_array_equal(results["confusion"], confusion_matrix(true, filled, labels=range(num + 1))[:num])
    assert verdict_scores(np.array(results["confusion"]), grades.good_classes)["good_f1"] == results["good_f1"]


@pytest.mark.parametrize("num", [2, 3, 5, 10])
def test_tables_and_plots_name_every_grade(num: int) -> None:
    grades = Grades(NAMES[:num])
    true = [i % num for i in range(60)]
    before, after = (
        scored(grades, true, [random.choice([t, None, 0]) for t in true], bootstrap=BootstrapConfig(num_draws=20))
        for _ in range(2)
    )
    schema = verdict_only(grades)
    assert [name for name, _ in score_rows(schema, after)[:num]] == [f"Class {name} F1" for name in grades.names]
    for table in (results_table(after, schema), before_after_table(before, after, schema)):
        lines = table.splitlines()
        starts = [line.split("  ")[0] for line in lines if line.startswith(("Class", "Good", "Accuracy", "Macro"))]
        assert starts == [*(f"Class {name} F1" for name in grades.names), "Good F1", "Accuracy", "Macro F1"]
        after_scores = lines[[line.startswith("Macro F1") for line in lines].index(True) + 1]
        assert not after_scores.startswith("S1")  # a rule separates the scores of the verdict from those of the steps
    figure = Figure()
    axes = figure.add_subplot()
    draw_confusion(axes, after, grades.names, "", show_unparsed=True)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(grades.names)
    assert [label.get_text() for label in axes.get_xticklabels()] == [*grades.names, "none"]
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {0.0 if num < 5 else 30.0}  # side by side, or tilted


def test_a_comparison_counts_right_verdicts_of_another_scale() -> None:
    grades = Grades(("no", "perhaps", "yes"))
    schema = verdict_only(grades)
    examples = [Example(f"e{i}", f"q{i}", "", "", gold=(grades.names[i % 3],)) for i in range(30)]
    right = [Rollout.from_answers(e.example_id, e.gold) for e in examples]
    wrong = [Rollout.from_answers(e.example_id, ("no",)) for e in examples]
    results = compare_systems(wrong, right, examples, schema, bootstrap=BootstrapConfig(num_draws=50))
    assert results["difference"]["accuracy"]["difference"] == pytest.approx(2 / 3)
    assert [f1["difference"] for f1 in results["difference"]["class_f1"]] == pytest.approx([0.5, 1, 1])
    assert (results["mcnemar"]["num_only_a_right"], results["mcnemar"]["num_only_b_right"]) == (0, 20)


def test_pages_are_compared_on_another_scale(tmp_path: Path) -> None:
    """Judgments in words, numbers and labels; the items of the best of three grades are good."""
    judgments = [("q1", "i0", "no"), ("q1", "i1", 3), ("q1", "i2", "YES"), ("q2", "i0", 2.0), ("q2", "i1", True), ("q2", "i2", 1)]
    files = {
        "j": [{"query_id": q, "item_id": i, "grade": g} for q, i, g in judgments],
        "p": [
            {"system": s, "query_id": q, "item_ids": ids}
            for s, ids in (("A", ["i0", "i2"]), ("B", ["i1", "i2"]))
            for q in ("q1", "q2")
        ],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    toml = tmp_path / "run.toml"
    toml.write_text('[grades]\nnames = ["no", "perhaps", "yes"]\nlabels = { true = "yes", false = "no" }\n')
    argv = ["--pages.file", str(tmp_path / "p"), "--pages.judgments", str(tmp_path / "j"), "--bootstrap.num-draws", "0"]
    compare(load(CompareConfig, [*argv, "--config", str(toml), "--out", str(tmp_path / "c.json")]))
    online = json.loads((tmp_path / "c.json").read_text())["online"]
    # classes of the shown items: A (1, 3) and (2, 1), B (3, 3) and (3, 1)
    assert (online["item_goodrate"]["a"], online["item_goodrate"]["b"]) == (0.25, 0.75)
    assert online["gsb"]["good"] == 1.0


# ---- one set of pairs, coded in many ways --------------------------------------------------------------------------------------

WORDS = ("irrelevant", "not quite relevant", "relevant", "highly relevant")
Coding = tuple[Grades, Callable[[int], Any]]  # the scale, and the value in the data of the class 1 to 4
FOUR: dict[str, Coding] = {
    "names": (Grades(), lambda c: f"L{c}"),
    "numbers": (Grades(), lambda c: c),
    "floats": (Grades(), float),
    "numbers as texts": (Grades(), str),
    "esci": (Grades(), lambda c: "ICSE"[c - 1]),
    "from 0, by labels": (Grades(labels={str(i): f"L{i + 1}" for i in range(4)}), lambda c: c - 1),
    "from 0, by names": (Grades(("0", "1", "2", "3")), lambda c: c - 1),
    "from 0, as floats": (Grades(("0", "1", "2", "3")), lambda c: float(c - 1)),
    "words": (Grades(WORDS), lambda c: WORDS[c - 1].upper()),
    "numbers of words": (Grades(WORDS), lambda c: c),
    "words by labels": (Grades(labels=dict(zip(WORDS, PAPER_GRADES, strict=True))), lambda c: WORDS[c - 1]),
    "esci of words": (Grades(WORDS, labels=dict(zip("ICSE", WORDS, strict=True))), lambda c: "icse"[c - 1]),
}
NO_YES = ("no", "yes")
TWO: dict[str, Coding] = {
    "booleans": (Grades(NO_YES, labels={"true": "yes", "false": "no"}), lambda c: c > 2),
    "names true and false": (Grades(("False", "True")), lambda c: c > 2),
    "0 and 1": (Grades(NO_YES, labels={"0": "no", "1": "yes"}), lambda c: int(c > 2)),
    "words": (Grades(NO_YES), lambda c: "Yes" if c > 2 else "No"),
    "1 and 2": (Grades(NO_YES), lambda c: 1 + (c > 2)),
}
PAIRS = [row_from_example(example) for example in World(7).examples("wild", 200)]
CLASSES = [int(row["gold"][-1][1:]) for row in PAIRS]


def coded(coding: Coding, key: str = "grade") -> tuple[StepSchema, list[Example]]:
    """The pairs with the grades of a coding, read from rows."""
    grades, code = coding
    schema = StepsConfig().schema(grades)
    rows = [
        {**row, "gold": [*row["gold"][:-1], None], "truth": None, "tags": {}, key: code(c)}
        for row, c in zip(PAIRS, CLASSES, strict=True)
    ]
    return schema, [example_from_row(row, "here", schema) for row in rows]


def responses(schema: StepSchema, verdicts: Sequence[int | None]) -> list[Rollout]:
    """Responses written and parsed in the form of the schema, with the verdicts of these indices."""
    rollouts = []
    for row, verdict in zip(PAIRS, verdicts, strict=True):
        answers = ("a", "b", "match", "unclear", "none" if verdict is None else schema.grades.names[verdict])
        rollouts.append(Rollout.from_answers(row["example_id"], schema.parse_text(schema.write(answers)).answers))
    return rollouts


def shape(example: Example, grades: Grades) -> Any:
    """The example with the class in place of the grade."""
    index = grades.index(example.grade)
    assert example.tags == {"grade": example.grade}
    return example.example_id, example.query, example.title, example.fields, example.gold[:-1], index


def unnamed(results: dict[str, Any]) -> dict[str, Any]:
    """The results without the names of grades."""
    parts = {tag: {value: unnamed(part) for value, part in values.items()} for tag, values in results.get("by", {}).items()}
    plain = {key: {**(results[key] or {}), "grade": ""} for key in ("majority", "top_verdict")}
    return {**results, **plain} | ({"by": parts} if "by" in results else {})


def test_codings_of_four_grades_mean_the_same() -> None:
    verdicts = [random.choice([c - 1, c - 1, random.randrange(4), None]) for c in CLASSES]
    seen, numbers = [], []
    for name, coding in FOUR.items():
        for key in ("grade", "label"):
            schema, examples = coded(coding, key)
            seen.append([shape(example, schema.grades) for example in examples])
            assert [e[-1] + 1 for e in seen[-1]] == CLASSES, name
            if schema.grades.names == PAPER_GRADES:
                assert examples == coded(FOUR["names"])[1], name
        numbers.append(
            unnamed(results_dict(responses(schema, verdicts), examples, schema, bootstrap=BootstrapConfig(num_draws=20)))
        )
    assert all(other == seen[0] for other in seen) and all(other == numbers[0] for other in numbers)
    assert 0 < numbers[0]["accuracy"] < 1


def test_codings_of_two_grades_mean_the_same_and_are_good_and_not_good() -> None:
    verdicts = [random.choice([c - 1, random.randrange(4), None]) for c in CLASSES]
    four = results_dict(responses(coded(FOUR["names"])[0], verdicts), coded(FOUR["names"])[1], coded(FOUR["names"])[0])
    halves = [None if v is None else int(v > 1) for v in verdicts]
    numbers = []
    for coding in TWO.values():
        schema, examples = coded(coding)
        assert [schema.grades.index(e.grade) for e in examples] == [int(c > 2) for c in CLASSES]
        numbers.append(unnamed(results_dict(responses(schema, halves), examples, schema)))
    assert all(other == numbers[0] for other in numbers)
    assert numbers[0]["class_f1"][1] == numbers[0]["good_f1"] == four["good_f1"]


def test_three_and_five_grades_keep_what_they_share_with_four() -> None:
    """Three grades merge the two worst; five have one more that no pair and no response has."""
    verdicts = [random.choice([c - 1, random.randrange(4), None]) for c in CLASSES]
    schema, examples = coded(FOUR["names"])
    four = results_dict(responses(schema, verdicts), examples, schema)
    three_grades = Grades(("bad", "related", "excellent"), good=("related", "excellent"))
    schema, examples = coded((three_grades, lambda c: three_grades.names[max(0, c - 2)]))
    three = results_dict(responses(schema, [None if v is None else max(0, v - 1) for v in verdicts]), examples, schema)
    assert three["class_f1"][1:] == four["class_f1"][2:] and three["good_f1"] == four["good_f1"]
    five_grades = Grades(("spam", *PAPER_GRADES), good=("L3", "L4"))
    schema, examples = coded((five_grades, lambda c: c + 1))
    five = results_dict(responses(schema, [None if v is None else v + 1 for v in verdicts]), examples, schema)
    assert five["class_f1"] == [0.0, *four["class_f1"]] and five["accuracy"] == four["accuracy"]
    assert five["good_f1"] == four["good_f1"] and five["macro_f1"] == pytest.approx(four["macro_f1"] * 4 / 5, abs=1e-12)
    assert five["consistency"] == four["consistency"] and five["step_accuracy"] == four["step_accuracy"]
