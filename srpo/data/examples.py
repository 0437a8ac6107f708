"""`Example`: one query-item pair with its labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from srpo.core.steps import same_answer

# Class numbers of 5.1.2: 1 Irrelevant, 2 Mismatch, 3 Related, 4 Excellent.
GRADES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Example:
    """One (query, item) pair.

    `gold[j]` is the label of step j that a *reward* may read (gt_j of the paper: S3, S4 and the verdict), in the canonical
    spelling of the step's options; None if the step has no label. `truth[j]` is the right answer of step j as a human annotator
    knows it (the catalogue world has one for S1 and S2, too): only simulated annotators and evaluation read it, never a reward.
    Both have one entry per step.
    """

    example_id: str
    query_id: str
    query: str
    title: str
    fields: dict[str, str] = field(default_factory=dict)  # further product fields shown to the model, in order: brand, color, ...
    gold: tuple[str | None, ...] = ()
    truth: tuple[str | None, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)  # strata: query_type, domain, grade, difficulty, ...
    # Text after the title in the policy's prompt alone (data.adversarial_frac); no part of the data
    attack: str = field(default="", repr=False, compare=False)

    @property
    def grade(self) -> int | None:
        """The human grade, 1 to 4, from the last gold label ("L3" -> 3); None if the pair has none, or a label of other steps."""
        return grade_of(self.gold[-1]) if self.gold else None


def grade_from(value: Any) -> int | None:
    """The grade 1 to 4 that a value of a file is; None for any other. 4.0 is 4: a column of pandas with nulls holds floats."""
    return int(value) if type(value) in (int, float) and value in GRADES else None


def grade_of(verdict: str | None) -> int | None:
    """The grade 1 to 4 that a verdict names ("L3" -> 3), by the rule that compares answers; None for any other text."""
    return next((grade for grade in GRADES if same_answer(verdict, f"L{grade}")), None)
