"""Scores of evaluated responses, as pure functions: the paper's offline metrics (5.1.2) and the accuracy of each reasoning step.

Paper: it does not say what a response without a readable verdict counts as. Here it is a fifth predicted class that is never
right: a miss of its true class, and a false alarm of none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from srpo.batch import Rollout
from srpo.data.examples import GRADES, Example
from srpo.steps import StepSchema, same_answer

Results = Mapping[str, Any]  # what `results_dict` returns and `results.json` holds as before and after


def evaluate_predictions(grades_true: Sequence[int], grades_pred: Sequence[int | None]) -> dict[str, Any]:
    """`{macro_f1, accuracy, good_f1, class_f1: [4], confusion: [4][5]}` of predicted grades 1..4, None where none could be read.

    Fractions. The F1 of a class that is neither true nor predicted is 0, and macro F1 is always the mean over all four (5.1.2).
    Good F1 takes classes 3 and 4 as one positive class. confusion[t][p] counts pairs of grade t+1 predicted p+1, with p = 4 for
    no verdict. Raises ValueError for no pairs, for lists of different length and for a grade outside 1..4.
    """
    if not grades_true or len(grades_true) != len(grades_pred):
        raise ValueError(f"{len(grades_true)} grades and {len(grades_pred)} predictions: give one of each per pair, at least one")
    if outside := sorted({*grades_true, *(p for p in grades_pred if p is not None)} - {*GRADES}):
        raise ValueError(f"grade {outside[0]} is not one of 1, 2, 3, 4 (1 Irrelevant .. 4 Excellent)")
    confusion = np.zeros((4, 5), dtype=np.int64)
    np.add.at(confusion, ([t - 1 for t in grades_true], [4 if p is None else p - 1 for p in grades_pred]), 1)
    num_true, num_predicted, hits = confusion.sum(1), confusion.sum(0)[:4], confusion.diagonal()
    class_f1 = [_f1(*counts) for counts in zip(hits.tolist(), num_true.tolist(), num_predicted.tolist(), strict=True)]
    good = slice(2, 4)
    return {
        "macro_f1": sum(class_f1) / len(class_f1),
        "accuracy": int(hits.sum()) / len(grades_true),
        "good_f1": _f1(int(confusion[good, good].sum()), int(num_true[good].sum()), int(num_predicted[good].sum())),
        "class_f1": class_f1,
        "confusion": confusion.tolist(),
    }


def _f1(hits: int, num_true: int, num_predicted: int) -> float:
    return 2 * hits / (num_true + num_predicted) if num_true + num_predicted else 0.0


def predicted_grade(rollout: Rollout) -> int | None:
    """The grade 1..4 that the last step's answer names ("L3" -> 3), None where it names none."""
    answer = rollout.answers[-1] or ""
    return int(answer[1:]) if answer in {f"L{grade}" for grade in GRADES} else None


def parses(rollout: Rollout) -> bool:
    """Whether every step has an answer: what `parse_rate` counts."""
    return all(answer is not None for answer in rollout.answers)


def step_accuracy(rollouts: Sequence[Rollout], examples: Sequence[Example], schema: StepSchema) -> list[float | None]:
    """Fraction of right answers of each step, [J]; None where no example has a reference for that step.

    Rollout i answers example i. The reference is `gold[j]`, else `truth[j]`; examples with neither do not count for step j.
    Answers are compared by `srpo.steps.same_answer`: as sets of facts. A missing answer is wrong.
    """
    accuracy: list[float | None] = []
    for j in range(schema.num_steps):
        pairs = [(r.answers[j], _reference(e, j)) for r, e in zip(rollouts, examples, strict=True)]
        right = [same_answer(answer, reference) for answer, reference in pairs if reference is not None]
        accuracy.append(sum(right) / len(right) if right else None)
    return accuracy


def _reference(example: Example, step: int) -> str | None:
    gold = example.gold[step] if example.gold else None
    return gold if gold is not None or not example.truth else example.truth[step]


def results_dict(
    rollouts: Sequence[Rollout], examples: Sequence[Example], schema: StepSchema, *, by: str = "query_type"
) -> dict[str, Any]:
    """The results of an evaluation, JSON-able; rollout i answers example i.

    `{macro_f1, accuracy, good_f1, class_f1: [4], step_accuracy: [J], parse_rate, num_examples}` as fractions (a step accuracy is
    None where no example has a reference), and `confusion: [4][5]`. Where examples carry the tag `by`, the same for each of its
    values under `by_{tag}`. Raises ValueError for no examples, a pair without a grade, and rollouts of other examples.
    """
    if [r.example_id for r in rollouts] != [e.example_id for e in examples]:
        raise ValueError("rollouts and examples are of different pairs: give one rollout per example, in the same order")
    results = _results(rollouts, examples, schema)
    values = [example.tags.get(by) for example in examples]
    groups = sorted({value for value in values if value is not None})
    if groups:
        results[f"by_{by}"] = {}
    for group in groups:
        chosen = [i for i, value in enumerate(values) if value == group]
        results[f"by_{by}"][group] = _results([rollouts[i] for i in chosen], [examples[i] for i in chosen], schema)
    return results


def _results(rollouts: Sequence[Rollout], examples: Sequence[Example], schema: StepSchema) -> dict[str, Any]:
    scores = evaluate_predictions(true_grades(examples), [predicted_grade(rollout) for rollout in rollouts])
    return {
        **{key: scores[key] for key in ("macro_f1", "accuracy", "good_f1", "class_f1")},
        "step_accuracy": step_accuracy(rollouts, examples, schema),
        "parse_rate": sum(map(parses, rollouts)) / len(rollouts),
        "num_examples": len(examples),
        "confusion": scores["confusion"],
    }


def true_grades(examples: Sequence[Example]) -> list[int]:
    """The human grade of each example; ValueError where one has none."""
    grades = []
    for example in examples:
        if example.grade is None:
            raise ValueError(f"{example.example_id} has no grade: evaluation needs the last entry of gold (L1..L4) of every pair")
        grades.append(example.grade)
    return grades


def score_rows(schema: StepSchema, *results: Results) -> list[tuple[str, list[float | None]]]:
    """(name, its value in each of `results`) of every score, in the order of the paper's Table 1, then the steps; fractions."""
    names: list[tuple[str, str, int | None]] = [(f"Class {grade} F1", "class_f1", grade - 1) for grade in GRADES]
    names += [("Good F1", "good_f1", None), ("Accuracy", "accuracy", None), ("Macro F1", "macro_f1", None)]
    names += [(f"S{j} {spec.name.replace('_', ' ')}", "step_accuracy", j - 1) for j, spec in enumerate(schema.specs, start=1)]
    names += [("Responses that parse", "parse_rate", None)]
    return [(name, [r[key] if index is None else r[key][index] for r in results]) for name, key, index in names]
