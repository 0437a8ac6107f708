from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from srpo.batch import Rollout
from srpo.data.examples import Example
from srpo.evaluation import evaluate_predictions, parses, predicted_grade, results_dict, score_rows, step_accuracy
from srpo.steps import PAPER_STEPS, StepSchema

SCHEMA = StepSchema(PAPER_STEPS)
RIGHT = ("shoes/boots; color not red", "shoes/boots; color blue", "match", "match", "L4")


def example(i: int, grade: int | None = 4, **changes: Any) -> Example:
    gold = (None, None, "match", "match", None if grade is None else f"L{grade}")
    return replace(Example(f"e{i}", f"q{i}", "red boots", "Boots", gold=gold, truth=RIGHT), **changes)


def rollout(i: int, *answers: str | None) -> Rollout:
    return Rollout(f"e{i}", i, (1,), (2,), (0.0,), (0, 0, 0, 0, 1), answers, "", "stop", 0)


@pytest.mark.parametrize("seed", range(40))
def test_scores_equal_scikit_learn(seed: int):
    rng = random.Random(seed)
    classes = rng.sample([1, 2, 3, 4], rng.randint(1, 4))  # absent classes too
    guesses = [*rng.sample([1, 2, 3, 4], rng.randint(0, 4)), None]
    true = [rng.choice(classes) for _ in range(rng.randint(1, 60))]
    pred = [rng.choice([grade, *guesses]) for grade in true]
    filled = [p or 9 for p in pred]  # to scikit-learn, no verdict is one more class, left out of the labels averaged over

    scores = evaluate_predictions(true, pred)
    labels = [1, 2, 3, 4]
    absent: dict[str, Any] = {"zero_division": 0}
    each: dict[str, Any] = {"labels": labels, "average": None, **absent}
    np.testing.assert_allclose(scores["class_f1"], f1_score(true, filled, **each))
    assert scores["macro_f1"] == pytest.approx(f1_score(true, filled, labels=labels, average="macro", **absent))
    assert scores["accuracy"] == pytest.approx(accuracy_score(true, filled))
    good = f1_score([t >= 3 for t in true], [p in (3, 4) for p in pred], pos_label=True, **absent)
    assert scores["good_f1"] == pytest.approx(good)
    np.testing.assert_array_equal(scores["confusion"], confusion_matrix(true, filled, labels=[*labels, 9])[:4])


def test_no_verdict_is_a_miss_and_never_a_false_alarm():
    scores = evaluate_predictions([4, 4, 1], [4, None, 1])
    assert scores["class_f1"] == [1.0, 0.0, 0.0, pytest.approx(2 / 3)]
    assert scores["good_f1"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == pytest.approx(2 / 3)


def test_good_f1_forgives_confusion_of_classes_3_and_4():
    scores = evaluate_predictions([3, 4, 1, 2], [4, 3, 2, 1])
    assert (scores["good_f1"], scores["accuracy"]) == (1.0, 0.0)


@pytest.mark.parametrize(("true", "pred"), [([], []), ([1], []), ([0], [1]), ([1], [5])])
def test_bad_grades_are_refused(true: list[int], pred: list[int | None]):
    with pytest.raises(ValueError, match=r"give one of each|is not one of"):
        evaluate_predictions(true, pred)


def test_predicted_grade_and_parse():
    assert predicted_grade(rollout(0, *RIGHT)) == 4
    for last in (None, "L5", "4", "excellent"):
        assert predicted_grade(rollout(0, *RIGHT[:4], last)) is None
    assert parses(rollout(0, *RIGHT))
    assert not parses(rollout(0, None, *RIGHT[1:]))


def test_step_accuracy_prefers_gold_takes_truth_else_and_counts_missing_as_wrong():
    examples = [example(0), example(1, gold=(None, None, "related", None, "L4")), example(2, gold=(), truth=())]
    rollouts = [
        rollout(0, "Color not red;  shoes/boots", None, "match", "match", "L4"),
        rollout(1, "shoes/boots", "shoes/boots; color blue", "match", "Match", "L3"),
        rollout(2, *RIGHT),
    ]
    assert step_accuracy(rollouts, examples, SCHEMA) == [0.5, 0.5, 0.5, 1.0, 0.5]


def test_step_without_any_reference_is_unknown():
    examples = [example(0, gold=(None, None, None, None, "L4"), truth=())]
    assert step_accuracy([rollout(0, *RIGHT)], examples, SCHEMA) == [None, None, None, None, 1.0]


def test_results_dict_has_the_promised_keys_and_a_part_for_each_query_type():
    examples = [example(i, 1 + i % 4, tags={"query_type": "negation" if i % 2 else "plain"}) for i in range(8)]
    rollouts = [rollout(i, *RIGHT[:4], f"L{1 + i % 4}" if i < 6 else None) for i in range(8)]
    results = results_dict(rollouts, examples, SCHEMA)
    promised = {"macro_f1", "accuracy", "good_f1", "class_f1", "step_accuracy", "parse_rate", "num_examples", "confusion"}
    assert set(results) == promised | {"by_query_type"}
    assert (results["accuracy"], results["parse_rate"], results["num_examples"]) == (0.75, 0.75, 8)
    assert list(results["by_query_type"]) == ["negation", "plain"]
    for part in results["by_query_type"].values():
        assert set(part) == promised
        assert (part["accuracy"], part["num_examples"]) == (0.75, 4)
    assert results["confusion"] == (np.array([p["confusion"] for p in results["by_query_type"].values()]).sum(0)).tolist()


def test_results_need_matching_graded_pairs():
    assert "by_query_type" not in results_dict([rollout(0, *RIGHT)], [example(0)], SCHEMA)
    with pytest.raises(ValueError, match="in the same order"):
        results_dict([rollout(1, *RIGHT)], [example(0)], SCHEMA)
    with pytest.raises(ValueError, match="e0 has no grade"):
        results_dict([rollout(0, *RIGHT)], [example(0, grade=None)], SCHEMA)
    with pytest.raises(ValueError, match="at least one"):
        results_dict([], [], SCHEMA)


def test_score_rows_follow_the_schema():
    results = results_dict([rollout(0, *RIGHT)], [example(0, gold=(None, None, None, "match", "L4"), truth=())], SCHEMA)
    rows = score_rows(SCHEMA, results, {**results, "good_f1": 0.25})
    names = [row[0] for row in rows]
    assert names[:7] == ["Class 1 F1", "Class 2 F1", "Class 3 F1", "Class 4 F1", "Good F1", "Accuracy", "Macro F1"]
    assert names[7:12] == ["S1 query intent", "S2 item", "S3 category match", "S4 attribute match", "S5 verdict"]
    assert names[12:] == ["Responses that parse"]
    assert rows[4] == ("Good F1", [1.0, 0.25])
    assert rows[7] == ("S1 query intent", [None, None])
