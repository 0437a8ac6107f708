"""The best evaluation: the largest value, the earliest of equal ones, and how many evaluations came after it."""

from __future__ import annotations

import random

import pytest
import small_world as small

from srpo.core.config.train import Config, TrainConfig
from srpo.core.errors import UserError
from srpo.core.metrics import METRICS, SCORES, filled
from srpo.data.examples import Example
from srpo.training.best import Best, best_of, check_best, check_best_has_values, evaluated

NAME = "eval/macro_f1"


def test_the_largest_value_wins_and_of_equal_ones_the_earliest() -> None:
    for _ in range(200):
        values = [random.choice([0.1, 0.2, 0.3]) for _ in range(random.randint(1, 8))]
        best = None
        for step, value in enumerate(values, start=1):
            best = evaluated(best, NAME, 10 * step, value)
        first = values.index(max(values))
        assert best == Best(NAME, 10 * (first + 1), max(values), len(values) - first - 1)
        rows = [{"step": 10 * step, NAME: value} for step, value in enumerate(values, start=1)]
        assert best_of([{"step": 5, "reward/total": 1.0}, *rows], NAME, range(1000)) == best


def test_a_score_that_is_new_begins_with_the_evaluations_whose_checkpoints_are_there() -> None:
    rows = [{"step": step, NAME: value} for step, value in ((2, 0.9), (4, 0.3), (6, 0.5), (8, 0.5), (10, 0.7))]
    assert best_of(rows, NAME, {4, 5, 6, 8}) == Best(NAME, 6, 0.5, 2)
    assert best_of(rows, NAME, {3}) is None and best_of(rows, "eval/accuracy", {4}) is None


def test_patience_counts_evaluations() -> None:
    for stalled in range(5):
        ends = [Best(NAME, 1, 0.5, stalled).ends(TrainConfig(patience=patience)) for patience in range(4)]
        assert ends == [False, stalled >= 1, stalled >= 2, stalled >= 3]


def test_every_evaluation_metric_is_a_score_or_a_count() -> None:
    """A metric whose smaller values are better, or that says nothing of the policy, must not be in SCORES."""
    others = {"eval/num_examples", "eval/majority_accuracy", "eval/top_verdict_frac"}
    assert {key for key in METRICS if key.startswith("eval/")} - set(SCORES) == others
    assert set(SCORES) < METRICS.keys()
    assert filled("eval/class_f1/{class}", ["a"], 4) == [f"eval/class_f1/{grade}" for grade in "1234"]
    assert filled("eval/step_accuracy/{step}", ["a", "b"], 4) == ["eval/step_accuracy/a", "eval/step_accuracy/b"]


def with_train(**train: object) -> Config:
    return small.changed(Config(), {"data": {"eval": "eval.jsonl"}, "train": train})


@pytest.mark.parametrize("name", ["eval/macro_f1", "eval/class_f1/2", "eval/step_accuracy/verdict"])
def test_scores_are_taken(name: str) -> None:
    check_best(with_train(best=name, patience=2, eval_every=5))
    check_best(with_train(best=name))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (with_train(best="macro_f1"), "train.best is 'macro_f1'.*the nearest is 'eval/macro_f1'"),
        (with_train(best="eval/num_examples"), "train.best is 'eval/num_examples', which is no score"),
        (with_train(best="eval/step_accuracy/itm"), "the nearest is 'eval/step_accuracy/item'"),
        (with_train(best="reward/total"), "which is no score"),
        (with_train(patience=3), "train.patience is 3 and train.best is not set"),
        (with_train(best=NAME, patience=3), "train.patience is 3 and train.eval_every 0"),
        (small.changed(with_train(best=NAME), {"data": {"eval": ""}}), "neither data.eval nor data.eval_frac is set"),
    ],
)
def test_others_are_refused_with_the_fix(cfg: Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_best(cfg)


def test_the_accuracy_of_a_step_without_labels_is_refused() -> None:
    gold = ("x", None, None, None, "L3")
    examples = [Example(example_id="1", query_id="q", query="a", title="b", gold=gold)]
    check_best_has_values(with_train(best="eval/step_accuracy/query_intent"), examples)
    check_best_has_values(with_train(best=NAME), examples)
    with pytest.raises(UserError, match=r"no evaluated example has a right answer to that step"):
        check_best_has_values(with_train(best="eval/step_accuracy/item"), examples)
