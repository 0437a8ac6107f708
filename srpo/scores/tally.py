"""Counts of each evaluated response, and the scores that follow from any sum of such counts.

All results of an evaluation are functions of these sums, so that a subset, all pairs and each draw of the bootstrap are scored by
the same code.

Letters of shapes: N responses, J reasoning steps, K = 26 + 2 J counts; "..." stands for any leading shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from srpo.core.batch import Rollout
from srpo.core.errors import UserError
from srpo.core.steps import StepSchema, same_answer
from srpo.data.examples import GRADES, Example, grade_of

NUM_CLASSES = len(GRADES)
NO_VERDICT = NUM_CLASSES  # column of the confusion matrix for a response whose verdict cannot be read
# Shares of responses by whether the verdict is right and whether all steps before it are right; they add up to 1.
CONSISTENCY = (
    "verdict_right_steps_right",
    "verdict_right_steps_wrong",
    "verdict_wrong_steps_right",
    "verdict_wrong_steps_wrong",
)

_CONFUSION = slice(0, NUM_CLASSES * (NUM_CLASSES + 1))
_PARSES = _CONFUSION.stop
_CONSISTENCY = slice(_PARSES + 1, _PARSES + 1 + len(CONSISTENCY))
_ALL_STEPS_CHECKED = _CONSISTENCY.stop
_STEPS = _ALL_STEPS_CHECKED + 1  # start of right [J], known [J]


def predicted_grade(rollout: Rollout) -> int | None:
    """The grade 1..4 that the last step's answer names ("L3" -> 3), None if it names none."""
    return grade_of(rollout.answers[-1])


def check_verdicts(schema: StepSchema) -> None:
    """Raise UserError if the last step allows an answer other than L1..L4, the verdicts that all scores are computed from."""
    spec = schema.specs[-1]
    others = [option for option in spec.options if grade_of(option) is None]
    if others:
        raise UserError(
            f"the last step, {spec.name!r}, allows the answer {others[0]!r}: only verdicts L1, L2, L3 and L4 can be scored. "
            "Spell its options so, or leave out what scores them: data.eval in training, srpo.evaluate and srpo.compare"
        )


def parses(rollout: Rollout) -> bool:
    """True if every step has an answer; `parse_rate` is the share of such responses."""
    return all(answer is not None for answer in rollout.answers)


def true_grades(examples: Sequence[Example]) -> list[int]:
    """The human grade of each example. Raises UserError if one has none."""
    grades = []
    for example in examples:
        if example.grade is None:
            raise UserError(f"{example.example_id} has no grade: set the last entry of gold to L1..L4 in every evaluated pair")
        grades.append(example.grade)
    return grades


def reference(example: Example, step: int) -> str | None:
    """The right answer to step j, which responses are compared with: `gold[j]`, else `truth[j]`, else None."""
    gold = example.gold[step] if example.gold else None
    return gold if gold is not None or not example.truth else example.truth[step]


def tally(rollouts: Sequence[Rollout], examples: Sequence[Example], schema: StepSchema) -> NDArray[np.int64]:
    """Counts of each response [N, K], 0 or 1; rollout i answers example i, which must have a grade.

    In order: its cell of the confusion matrix [4 x 5]; whether it parses; its case of `CONSISTENCY` [4], all 0 if no step before
    the verdict has a reference; whether all of these steps have one; for each step, whether it is right [J] and whether that is
    known [J]. Answers are compared as sets of facts (`srpo.core.steps.same_answer`); a missing answer is wrong.
    Raises UserError as `check_verdicts`.
    """
    check_verdicts(schema)
    num_steps = schema.num_steps
    counts = np.zeros((len(rollouts), _STEPS + 2 * num_steps), dtype=np.int64)
    for row, rollout, example, grade in zip(counts, rollouts, examples, true_grades(examples), strict=True):
        predicted = predicted_grade(rollout)
        row[(grade - 1) * (NUM_CLASSES + 1) + (NO_VERDICT if predicted is None else predicted - 1)] = 1
        row[_PARSES] = parses(rollout)
        references = [reference(example, j) for j in range(num_steps)]
        right = [same_answer(answer, truth) for answer, truth in zip(rollout.answers, references, strict=True)]
        row[_STEPS : _STEPS + num_steps] = right
        row[_STEPS + num_steps :] = known = [truth is not None for truth in references]
        if any(known[:-1]):
            steps_right = all(right[j] for j in range(num_steps - 1) if known[j])
            row[_CONSISTENCY.start + 2 * (predicted != grade) + (not steps_right)] = 1
            row[_ALL_STEPS_CHECKED] = all(known[:-1])
    return counts


def confusion_of(counts: NDArray) -> NDArray:
    """The confusion matrix [..., 4, 5] of counts [..., K]: true class, predicted class (the last: no verdict)."""
    return counts[..., _CONFUSION].reshape(*counts.shape[:-1], NUM_CLASSES, NUM_CLASSES + 1)


def consistency_counts(counts: NDArray[np.int64]) -> tuple[int, int]:
    """(responses with a checked step before the verdict, responses with all these steps checked) of summed counts [K]."""
    return int(counts[_CONSISTENCY].sum()), int(counts[_ALL_STEPS_CHECKED])


def scores(counts: NDArray, drawn_from: NDArray | None = None) -> dict[str, NDArray[np.float64]]:
    """Scores of counts [..., K]: those of `verdict_scores`, `step_accuracy` [..., J], `parse_rate` [...], `consistency` [..., 4].

    Fractions, NaN if nothing was counted; `consistency` is in the order of CONSISTENCY. drawn_from: counts [K] of all pairs, if
    `counts` are those of draws from them.
    """
    num_steps = (counts.shape[-1] - _STEPS) // 2
    steps = counts[..., _STEPS:]
    shares = counts[..., _CONSISTENCY]
    return {
        **verdict_scores(confusion_of(counts), None if drawn_from is None else confusion_of(drawn_from)),
        "step_accuracy": _ratio(steps[..., :num_steps], steps[..., num_steps:]),
        "parse_rate": _ratio(counts[..., _PARSES], counts[..., _CONFUSION].sum(-1)),
        "consistency": _ratio(shares, shares.sum(-1, keepdims=True)),
    }


def verdict_scores(confusion: NDArray, drawn_from: NDArray | None = None) -> dict[str, NDArray[np.float64]]:
    """`macro_f1`, `accuracy`, `good_f1` [...] and `class_f1` [..., 4] of confusion matrices [..., 4, 5] (5.1.2), fractions.

    The F1 of a class that is neither true nor predicted is 0, and macro F1 is always the mean over all four, as scikit-learn has
    it with labels=[1, 2, 3, 4] and zero_division=0. Good F1 takes classes 3 and 4 as one positive class. The accuracy of no pairs
    is NaN.

    drawn_from: the confusion matrix [4, 5] that the matrices were resampled from. A draw without a true pair of a class that all
    pairs have says nothing of that class: its F1, and the macro F1 of that draw, are NaN. So are those of another system on the
    same draw, which has the same true classes.
    """
    square = confusion[..., :NUM_CLASSES]
    hits = np.diagonal(square, axis1=-2, axis2=-1)
    num_true, num_predicted = confusion.sum(-1), square.sum(-2)
    class_f1 = _ratio(2 * hits, num_true + num_predicted, if_empty=0.0)
    good = slice(2, NUM_CLASSES)
    good_hits = square[..., good, good].sum((-2, -1))
    good_f1 = _ratio(2 * good_hits, num_true[..., good].sum(-1) + num_predicted[..., good].sum(-1), if_empty=0.0)
    if drawn_from is not None:
        expected = drawn_from.sum(-1)
        class_f1 = np.where((num_true == 0) & (expected > 0), np.nan, class_f1)
        good_f1 = np.where((num_true[..., good].sum(-1) == 0) & (expected[good].sum() > 0), np.nan, good_f1)
    return {
        "macro_f1": class_f1.sum(-1) / NUM_CLASSES,
        "accuracy": _ratio(hits.sum(-1), num_true.sum(-1)),
        "good_f1": good_f1,
        "class_f1": class_f1,
    }


def _ratio(part: NDArray, total: NDArray, if_empty: float = np.nan) -> NDArray[np.float64]:
    empty = total == 0
    return np.where(empty, if_empty, part / np.where(empty, 1, total))
