"""`Example`: one query-item pair with its labels."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    # File and row of a pair whose ids are made of its contents, for messages; no part of the data
    where: str = field(default="", repr=False, compare=False)

    @property
    def shown(self) -> str:
        """The pair in a message: file and row if its id says nothing to the user, else the id."""
        return f"the pair in {self.where}" if self.where else f"example {self.example_id}"

    @property
    def grade(self) -> str | None:
        """The human grade, one of `grades.names`: the label of the last step; None if the pair has none."""
        return self.gold[-1] if self.gold else None
