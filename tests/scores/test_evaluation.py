from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from judged_pairs import SHARES, flat, random_examples, random_rollouts, slow_interval, slow_scores, verdict_results
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from srpo.core.batch import Rollout
from srpo.core.config.evaluation import BootstrapConfig
from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.scores.evaluation import consistency_rows, results_dict, score_rows
from srpo.scores.paired import compare_systems
from srpo.scores.tally import parses

SCHEMA = PAPER
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
    filled = [p or 9 for p in pred]  # no verdict is a fifth class for scikit-learn, which averages over `labels` only

    scores = verdict_results(true, pred)
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
    scores = verdict_results([4, 4, 1], [4, None, 1])
    assert scores["class_f1"] == [1.0, 0.0, 0.0, pytest.approx(2 / 3)]
    assert scores["good_f1"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == pytest.approx(2 / 3)


def test_good_f1_forgives_confusion_of_classes_3_and_4():
    scores = verdict_results([3, 4, 1, 2], [4, 3, 2, 1])
    assert (scores["good_f1"], scores["accuracy"]) == (1.0, 0.0)


def test_predicted_grade_and_parse():
    def predicted(last: str | None) -> list[int]:
        return results_dict([rollout(0, *RIGHT[:4], last)], [example(0)], SCHEMA)["confusion"][3]

    assert predicted("L4") == [0, 0, 0, 1, 0]
    for last in (None, "L5", "4", "excellent"):
        assert predicted(last) == [0, 0, 0, 0, 1]
    assert parses(rollout(0, *RIGHT))
    assert not parses(rollout(0, None, *RIGHT[1:]))


def test_step_accuracy_prefers_gold_takes_truth_else_and_counts_missing_as_wrong():
    examples = [
        example(0),
        example(1, gold=(None, None, "related", None, "L4")),
        example(2, gold=(None,) * 4 + ("L1",), truth=()),
    ]
    rollouts = [
        rollout(0, "Color not red;  shoes/boots", None, "match", "match", "L4"),
        rollout(1, "shoes/boots", "shoes/boots; color blue", "match", "Match", "L3"),
        rollout(2, *RIGHT[:4], "L1"),
    ]
    assert results_dict(rollouts, examples, SCHEMA)["step_accuracy"] == [0.5, 0.5, 0.5, 1.0, pytest.approx(2 / 3)]


def test_step_without_any_reference_is_unknown_and_consistency_with_it():
    examples = [example(0, gold=(None, None, None, None, "L4"), truth=())]
    results = results_dict([rollout(0, *RIGHT)], examples, SCHEMA)
    assert results["step_accuracy"] == [None, None, None, None, 1.0]
    assert results["consistency"] is None
    assert consistency_rows(results) == []


def test_consistency_of_reasons_and_verdict():
    partly = {"gold": (None, None, "match", None, "L4"), "truth": ()}
    examples = [example(0), example(1), example(2), example(3), example(4, **partly), example(5, gold=RIGHT[4:], truth=())]
    examples[5] = example(5, gold=(None,) * 4 + ("L4",), truth=())  # cannot be checked
    rollouts = [
        rollout(0, *RIGHT),
        rollout(1, RIGHT[0], None, *RIGHT[2:]),  # verdict right, a step wrong
        rollout(2, *RIGHT[:4], "L1"),  # verdict wrong, all steps right
        rollout(3, *RIGHT[:3], "conflict", None),
        rollout(4, "x", "y", "match", "z", "L4"),  # every step with a reference is right
        rollout(5, *RIGHT),
    ]
    consistency = results_dict(rollouts, examples, SCHEMA)["consistency"]
    assert [consistency[kind] for kind in SHARES] == [0.4, 0.2, 0.2, 0.2]
    assert (consistency["num_examples"], consistency["num_fully_checked"]) == (5, 4)


@pytest.mark.parametrize("seed", range(12))
def test_results_and_intervals_equal_resampled_rows(seed: int):
    """All scores against plain Python that resamples the rows of the queries and scores them with scikit-learn."""
    rng = random.Random(seed)
    num_queries = rng.choice([1, 2, 5, 12])
    examples = random_examples(rng, rng.randint(2, 40), num_queries)
    rollouts = random_rollouts(rng, examples)
    settings = BootstrapConfig(num_draws=25, level=0.8, seed=seed)
    results = results_dict(rollouts, examples, SCHEMA, bootstrap=settings)
    parts = {"": list(range(len(examples)))}
    parts |= {
        v: [i for i, e in enumerate(examples) if e.tags.get("query_type") == v] for v in results["by"].get("query_type", {})
    }
    assert results["untagged"].get("query_type", 0) == len(examples) - sum(len(rows) for v, rows in parts.items() if v)
    for value, rows in parts.items():
        scores = results["by"]["query_type"][value] if value else results
        expected = slow_scores([rollouts[i] for i in rows], [examples[i] for i in rows])
        assert flat(scores) == pytest.approx(flat(expected))
        assert scores["num_examples"] == len(rows)
        checked = scores["consistency"] or {"num_examples": 0, "num_fully_checked": 0}
        assert [checked[key] for key in ("num_examples", "num_fully_checked")] == [
            expected["num_checked"],
            expected["num_fully_checked"],
        ]
        assert not scores["consistency"] or sum(checked[kind] for kind in SHARES) == pytest.approx(1)

        queries = list(dict.fromkeys(examples[i].query_id for i in rows))
        drawn = []
        generator = np.random.default_rng(seed)
        for _ in range(settings.num_draws if len(queries) > 1 else 0):
            again = [
                i for c in generator.integers(len(queries), size=len(queries)) for i in rows if examples[i].query_id == queries[c]
            ]
            everything = [examples[i] for i in rows]
            drawn.append(flat(slow_scores([rollouts[i] for i in again], [examples[i] for i in again], everything)))
        confidence = scores["confidence"]
        assert confidence["num_queries"] == len(queries)
        for key, interval in flat(confidence).items():
            assert interval == pytest.approx(slow_interval([draw[key] for draw in drawn], 0.8)), key


@pytest.mark.parametrize("num_right", [500, 350])
def test_a_draw_without_a_rare_class_is_left_out(num_right: int):
    """A third of all draws lack the one pair of class 2; they say nothing about its F1."""
    rng = random.Random(num_right)
    grades = [2, *rng.choices([1, 3, 4], k=499)]
    examples = [example(i, grade) for i, grade in enumerate(grades)]
    rollouts = [rollout(i, *RIGHT[:4], f"L{g}" if i < num_right else None) for i, g in enumerate(grades)]
    results = results_dict(rollouts, examples, SCHEMA, bootstrap=BootstrapConfig(num_draws=400))
    low, high = results["confidence"]["macro_f1"]
    assert results["confidence"]["class_f1"][1] == [1.0, 1.0]
    if num_right == 500:
        assert results["macro_f1"] == low == high == 1.0
    else:
        assert results["macro_f1"] - 0.05 < low < results["macro_f1"] < high
    # The same system against one that errs on class 3 alone: the missing draws are missing for both.
    other = [rollout(i, *RIGHT[:4], None if g == 3 else f"L{g}") for i, g in enumerate(grades)]
    difference = compare_systems(other, rollouts, examples, SCHEMA, bootstrap=BootstrapConfig(num_draws=400))["difference"]
    assert difference["class_f1"][1]["interval"] == [0.0, 0.0] and difference["class_f1"][1]["equal_frac"] == 1
    if num_right == 500:
        assert difference["macro_f1"]["interval"] == [0.25, 0.25] and difference["macro_f1"]["b_higher_frac"] == 1


def test_a_class_that_no_pair_has_counts_as_0_in_every_draw():
    examples = [example(i, 4 - i % 2) for i in range(40)]
    rollouts = [rollout(i, *RIGHT[:4], f"L{4 - i % 2}") for i in range(40)]
    results = results_dict(rollouts, examples, SCHEMA, bootstrap=BootstrapConfig(num_draws=100))
    assert results["macro_f1"] == 0.5 and results["confidence"]["macro_f1"] == [0.5, 0.5]


def test_results_dict_has_the_promised_keys_and_a_part_for_each_value_of_a_tag():
    tags = [{"query_type": "negation" if i % 2 else "plain", "domain": "shoes"} for i in range(8)]
    examples = [example(i, 1 + i % 4, tags=tags[i]) for i in range(8)]
    rollouts = [rollout(i, *RIGHT[:4], f"L{1 + i % 4}" if i < 6 else None) for i in range(8)]
    results = results_dict(rollouts, examples, SCHEMA)
    promised = {"macro_f1", "accuracy", "good_f1", "class_f1", "step_accuracy", "parse_rate", "num_examples"}
    promised |= {"confusion", "consistency", "majority", "top_verdict"}
    assert set(results) == promised | {"by", "untagged"}  # no intervals where none are asked for
    assert (results["accuracy"], results["parse_rate"], results["num_examples"]) == (0.75, 0.75, 8)
    parts = results["by"]["query_type"]
    assert list(parts) == ["negation", "plain"]
    for part in parts.values():
        assert set(part) == promised
        assert (part["accuracy"], part["num_examples"]) == (0.75, 4)
    assert results["confusion"] == (np.array([p["confusion"] for p in parts.values()]).sum(0)).tolist()
    tagged = results_dict(rollouts, examples, SCHEMA, by=["domain", "no_such"], bootstrap=BootstrapConfig(num_draws=10))
    assert list(tagged["by"]) == ["domain"]
    assert tagged["by"]["domain"]["shoes"] == {key: tagged[key] for key in (*promised, "confidence")}
    assert "confidence" not in results_dict(rollouts, examples, SCHEMA, bootstrap=BootstrapConfig(num_draws=0))
    json.dumps(tagged, allow_nan=False)


def test_results_need_matching_graded_pairs():
    assert results_dict([rollout(0, *RIGHT)], [example(0)], SCHEMA)["by"] == {}
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
