"""Majority and most common verdict beside every score, against scikit-learn, and the warning of a policy that collapsed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from sklearn.metrics import accuracy_score, f1_score

from srpo.core.batch import Rollout
from srpo.core.grades import Grades
from srpo.core.metrics import evaluation_metrics
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.scores.evaluation import collapse, results_dict
from srpo.scores.tables import results_table


def results(schema: StepSchema, true: Sequence[str], said: Sequence[str | None]) -> dict:
    examples = [Example(str(i), f"q{i % 5}", "query", "title", gold=(grade,)) for i, grade in enumerate(true)]
    rollouts = [Rollout.from_answers(str(i), (verdict,)) for i, verdict in enumerate(said)]
    return results_dict(rollouts, examples, schema)


@pytest.mark.parametrize("num_grades", [2, 3, 4, 10])
def test_the_majority_is_scored_as_a_system_that_always_answers_it(num_grades: int) -> None:
    grades = Grades(tuple(f"g{i}" for i in range(num_grades)))
    schema = StepsConfig(preset="verdict").schema(grades)
    true = random.choices(grades.names, weights=[i + 1 for i in range(num_grades)], k=200)
    said = random.choices([*grades.names, None], k=200)
    found = results(schema, true, said)
    most = max(true.count(name) for name in grades.names)
    majority = [name for name in grades.names if true.count(name) == most][-1]
    always = [majority] * 200
    f1 = f1_score(true, always, labels=list(grades.names), average="macro", zero_division=0)  # type: ignore[arg-type]
    assert found["majority"]["grade"] == majority
    assert found["majority"]["accuracy"] == pytest.approx(accuracy_score(true, always), abs=1e-12)
    assert found["majority"]["macro_f1"] == pytest.approx(f1, abs=1e-12)
    read = [verdict for verdict in said if verdict is not None]
    share = max(read.count(name) for name in grades.names) / len(read)
    assert found["top_verdict"]["share"] == pytest.approx(share)
    metrics = evaluation_metrics(found, schema.names)
    assert metrics["eval/majority_accuracy"] == found["majority"]["accuracy"]
    assert metrics["eval/top_verdict_frac"] == found["top_verdict"]["share"]


def test_a_collapse_is_told_from_data_of_one_grade() -> None:
    schema = StepsConfig(preset="verdict").schema(Grades(("no", "maybe", "yes")))
    mixed = ["yes"] * 60 + ["no"] * 40
    assert collapse(results(schema, mixed, ["yes"] * 96 + ["no"] * 4)).startswith(
        "96 % of the verdicts are yes, the grade of 60 % of the pairs: the policy no longer tells grades apart. Balance"
    )
    assert not collapse(results(schema, mixed, ["yes"] * 94 + ["no"] * 6))
    assert not collapse(results(schema, ["yes"] * 90 + ["no"] * 10, ["yes"] * 100))
    unread = results(schema, mixed, [None] * 100)
    assert unread["top_verdict"] is None and not collapse(unread)
    assert "always answering yes: accuracy 60.0, macro F1 25.0" in results_table(unread, schema)
    assert "eval/top_verdict_frac" not in evaluation_metrics(unread, schema.names)
