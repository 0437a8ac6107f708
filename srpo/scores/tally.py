"""Counts of each evaluated response, and the scores that follow from any sum of such counts.

All results of an evaluation are functions of these sums, so that a subset, all pairs and each draw of the bootstrap are scored by
the same code.

Letters of shapes: N responses, C grades, J reasoning steps, K = C (C + 1) + 6 + 2 J counts; "..." stands for any leading shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from srpo.core.batch import Rollout
from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.steps import StepSchema, same_answer
from srpo.data.examples import Example

# Shares of responses by whether the verdict is right and whether all steps before it are right; they add up to 1.
CONSISTENCY = (
    "verdict_right_steps_right",
    "verdict_right_steps_wrong",
    "verdict_wrong_steps_right",
    "verdict_wrong_steps_wrong",
)


@dataclass(frozen=True)
class Layout:
    """Columns of the counts: the confusion matrix [C x (C + 1)], `parses`, `CONSISTENCY`, `all_checked`, right [J], known [J]."""

    num_grades: int  # C
    num_steps: int  # J
    good: tuple[int, ...]  # indices of the grades that count as good

    @classmethod
    def of(cls, schema: StepSchema) -> Layout:
        return cls(len(schema.grades.names), schema.num_steps, schema.grades.good_classes)

    @property
    def confusion(self) -> slice:
        return slice(0, self.num_grades * (self.num_grades + 1))

    @property
    def parses(self) -> int:
        return self.confusion.stop

    @property
    def consistency(self) -> slice:
        return slice(self.parses + 1, self.parses + 1 + len(CONSISTENCY))

    @property
    def all_checked(self) -> int:
        return self.consistency.stop

    @property
    def right(self) -> slice:
        return slice(self.all_checked + 1, self.all_checked + 1 + self.num_steps)

    @property
    def known(self) -> slice:
        return slice(self.right.stop, self.right.stop + self.num_steps)


def parses(rollout: Rollout) -> bool:
    """True if every step has an answer; `parse_rate` is the share of such responses."""
    return all(answer is not None for answer in rollout.answers)


def true_grades(examples: Sequence[Example], grades: Grades) -> list[int]:
    """[N] index, from 0, of the human grade of each example. Raises UserError if one has none."""
    indices = []
    for example in examples:
        index = grades.index(example.grade)
        if index is None:
            given = "no grade" if example.grade is None else f"the grade {example.grade!r}"
            raise UserError(f"{example.shown} has {given}: give every evaluated pair one of {', '.join(grades.names)}")
        indices.append(index)
    return indices


def reference(example: Example, step: int) -> str | None:
    """The right answer to step j, which responses are compared with: `gold[j]`, else `truth[j]`, else None."""
    gold = example.gold[step] if example.gold else None
    return gold if gold is not None or not example.truth else example.truth[step]


def tally(rollouts: Sequence[Rollout], examples: Sequence[Example], schema: StepSchema) -> NDArray[np.int64]:
    """Counts of each response [N, K], 0 or 1, in the columns of `Layout`; rollout i answers example i, which must have a grade.

    `CONSISTENCY` is all 0 if no step before the verdict has a reference. Answers are compared as sets of facts
    (`srpo.core.steps.same_answer`); a missing answer is wrong.
    """
    at, num_steps = Layout.of(schema), schema.num_steps
    counts = np.zeros((len(rollouts), at.known.stop), dtype=np.int64)
    for row, rollout, example, grade in zip(counts, rollouts, examples, true_grades(examples, schema.grades), strict=True):
        predicted = schema.grades.index(rollout.answers[-1])
        row[grade * (at.num_grades + 1) + (at.num_grades if predicted is None else predicted)] = 1
        row[at.parses] = parses(rollout)
        references = [reference(example, j) for j in range(num_steps)]
        right = [same_answer(answer, truth) for answer, truth in zip(rollout.answers, references, strict=True)]
        row[at.right] = right
        row[at.known] = known = [truth is not None for truth in references]
        if any(known[:-1]):
            steps_right = all(right[j] for j in range(num_steps - 1) if known[j])
            row[at.consistency.start + 2 * (predicted != grade) + (not steps_right)] = 1
            row[at.all_checked] = all(known[:-1])
    return counts


def confusion_of(counts: NDArray, at: Layout) -> NDArray:
    """The confusion matrix [..., C, C + 1] of counts [..., K]: true grade, predicted grade (the last: no verdict)."""
    return counts[..., at.confusion].reshape(*counts.shape[:-1], at.num_grades, at.num_grades + 1)


def consistency_counts(counts: NDArray[np.int64], at: Layout) -> tuple[int, int]:
    """(responses with a checked step before the verdict, responses with all these steps checked) of summed counts [K]."""
    return int(counts[at.consistency].sum()), int(counts[at.all_checked])


def scores(counts: NDArray, at: Layout, drawn_from: NDArray | None = None) -> dict[str, NDArray[np.float64]]:
    """Scores of counts [..., K]: those of `verdict_scores`, `step_accuracy` [..., J], `parse_rate` [...], `consistency` [..., 4].

    Fractions, NaN if nothing was counted; `consistency` is in the order of CONSISTENCY. drawn_from: counts [K] of all pairs, if
    `counts` are those of draws from them.
    """
    shares = counts[..., at.consistency]
    expected = None if drawn_from is None else confusion_of(drawn_from, at)
    return {
        **verdict_scores(confusion_of(counts, at), at.good, expected),
        "step_accuracy": _ratio(counts[..., at.right], counts[..., at.known]),
        "parse_rate": _ratio(counts[..., at.parses], counts[..., at.confusion].sum(-1)),
        "consistency": _ratio(shares, shares.sum(-1, keepdims=True)),
    }


def verdict_scores(
    confusion: NDArray, good: Sequence[int] = (2, 3), drawn_from: NDArray | None = None
) -> dict[str, NDArray[np.float64]]:
    """`macro_f1`, `accuracy`, `good_f1` [...] and `class_f1` [..., C] of confusion matrices [..., C, C + 1] (5.1.2), fractions.

    The F1 of a class that is neither true nor predicted is 0, and macro F1 is always the mean over all C, as scikit-learn has it
    with all labels and zero_division=0. Good F1 takes the classes `good` as one positive class. The accuracy of no pairs is NaN.

    drawn_from: the confusion matrix [C, C + 1] that the matrices were resampled from. A draw without a true pair of a class that
    all pairs have says nothing of that class: its F1, and the macro F1 of that draw, are NaN. So are those of another system on
    the same draw, which has the same true classes.
    """
    square = confusion[..., :-1]
    hits = np.diagonal(square, axis1=-2, axis2=-1)
    num_true, num_predicted = confusion.sum(-1), square.sum(-2)
    class_f1 = _ratio(2 * hits, num_true + num_predicted, if_empty=0.0)
    positive = list(good)
    good_hits = square[..., positive, :][..., positive].sum((-2, -1))
    good_f1 = _ratio(2 * good_hits, num_true[..., positive].sum(-1) + num_predicted[..., positive].sum(-1), if_empty=0.0)
    if drawn_from is not None:
        expected = drawn_from.sum(-1)
        class_f1 = np.where((num_true == 0) & (expected > 0), np.nan, class_f1)
        good_f1 = np.where((num_true[..., positive].sum(-1) == 0) & (expected[positive].sum() > 0), np.nan, good_f1)
    return {
        "macro_f1": class_f1.sum(-1) / class_f1.shape[-1],
        "accuracy": _ratio(hits.sum(-1), num_true.sum(-1)),
        "good_f1": good_f1,
        "class_f1": class_f1,
    }


def _ratio(part: NDArray, total: NDArray, if_empty: float = np.nan) -> NDArray[np.float64]:
    empty = total == 0
    return np.where(empty, if_empty, part / np.where(empty, 1, total))
