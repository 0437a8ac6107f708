"""`Example`: one query-item pair with whatever is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field

# The paper's classes (5.1.2): 1 Irrelevant, 2 Mismatch, 3 Related, 4 Excellent. A grade is the class number.
GRADES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Example:
    """One (query, item) pair.

    `gold[j]` is the label of step j that a *reward* may read (the paper's gt_j: S3, S4 and the verdict), in the canonical
    spelling of the step's options; None where there is none. `truth[j]` is what a human annotator would hold step j against
    (S1, S2 have one in the catalogue world): only simulated annotators and evaluation read it, never a reward. Both have one
    entry per step.
    """

    example_id: str
    query_id: str
    query: str
    title: str
    fields: dict[str, str] = field(default_factory=dict)  # further product fields shown to the model, in order: brand, color, ...
    gold: tuple[str | None, ...] = ()
    truth: tuple[str | None, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)  # strata: query_type, domain, grade, difficulty, ...

    @property
    def grade(self) -> int | None:
        """The human grade 1..4 as told by the last gold label ("L3" -> 3); None where the pair is not graded."""
        last = self.gold[-1] if self.gold else None
        return None if last is None else int(last[1:])
