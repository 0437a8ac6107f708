"""Solve-rate estimate of each example: it follows the policy's scores and ages (4.2.1).

The weight w of an old estimate falls with its age, the optimizer steps since the example's last score; a new score has 1 - w:

    w = (1 - new_weight) * max(0, 1 - age / max_age)        estimate <- w * estimate + (1 - w) * score

At age `max_age` an estimate has aged out: its weight is 0, and it no longer keeps its example from being drawn.

Paper: 4.2.1 lets the selection follow the policy and does not say how. With new_weight 1 the estimate is the last score.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from srpo.core.errors import UserError


class SolveRateState(TypedDict):
    """JSON-able state. Its size grows with the number of examples scored so far, not with the data."""

    step: int
    rows: list[int]
    estimates: list[float]
    seen_at: list[int]


class SolveRates:
    """Estimates of all examples of a run, one row each, shared by the stages of a curriculum.

    Ages are counted in `step`, the number of optimizer steps that `tick` has begun. UserError for no examples, a repeated
    example_id, or settings out of range.
    """

    def __init__(self, example_ids: Sequence[str], *, new_weight: float, max_age: int):
        if not example_ids:
            raise UserError("the sampler has no examples: check data.train")
        if not 0 < new_weight <= 1:
            raise ValueError(f"sampler.new_weight is {new_weight}: set it above 0 and to at most 1")
        if max_age < 0:
            raise ValueError(f"sampler.max_age is {max_age}: set it to 0 (no example is skipped) or more")
        self._row_of = {example_id: row for row, example_id in enumerate(example_ids)}
        if len(self._row_of) < len(example_ids):
            twice = Counter(example_ids).most_common(1)[0][0]
            raise UserError(f"example_id {twice!r} occurs more than once: give every pair its own")
        self._new_weight, self._max_age = new_weight, max_age
        self.step = 0
        self.estimates = np.zeros(len(example_ids))  # [rows] in 0..1; meaningless while seen_at is -1
        self.seen_at = np.full(len(example_ids), -1)  # [rows] step of the last score, -1: never scored

    def rows(self, example_ids: Sequence[str]) -> np.ndarray:
        """[len(example_ids)] int64, row of each example. ValueError for an unknown id."""
        unknown = next((name for name in example_ids if name not in self._row_of), None)
        if unknown is not None:
            raise ValueError(f"example_id {unknown!r} is not in this sampler: observe only examples that it drew")
        return np.array([self._row_of[name] for name in example_ids], dtype=np.int64)

    def tick(self) -> None:
        """Begin an optimizer step: every estimate becomes one step older."""
        self.step += 1

    def observe(self, example_ids: Sequence[str], scores: Sequence[float]) -> None:
        """Move the estimate of each example towards its new score. ValueError for an unknown id or a score that is not finite."""
        rows = self.rows(example_ids)
        for example_id, row, score in zip(example_ids, rows.tolist(), scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(f"the score of {example_id} is {score}: give a finite group score")
            old = self._weight(int(self.seen_at[row]))
            self.estimates[row] = old * self.estimates[row] + (1 - old) * score
            self.seen_at[row] = self.step

    def _weight(self, seen_at: int) -> float:
        """Weight w of an old estimate against a new score."""
        age = self.step - seen_at
        return (1 - self._new_weight) * (1 - age / self._max_age) if seen_at >= 0 and age < self._max_age else 0.0

    def inside(self, rows: np.ndarray, low: float, high: float) -> np.ndarray:
        """[R] bool: the example has been scored and its estimate lies strictly between low and high."""
        estimates = self.estimates[rows]
        return (self.seen_at[rows] >= 0) & (estimates > low) & (estimates < high)

    def skipped(self, rows: np.ndarray, low: float, high: float) -> np.ndarray:
        """[R] bool: the estimate lies outside the window and has not aged out."""
        seen_at = self.seen_at[rows]
        return (seen_at >= 0) & (self.step - seen_at < self._max_age) & ~self.inside(rows, low, high)

    def stats(self, rows: np.ndarray, low: float, high: float) -> dict[str, int]:
        """Counts over `rows`: num_unseen, num_too_hard (estimate <= low), num_in_window, num_too_easy (estimate >= high) and
        num_skipped."""
        seen, estimates = self.seen_at[rows] >= 0, self.estimates[rows]
        return {
            "num_unseen": int((~seen).sum()),
            "num_too_hard": int((seen & (estimates <= low)).sum()),
            "num_in_window": int(self.inside(rows, low, high).sum()),
            "num_too_easy": int((seen & (estimates >= high)).sum()),
            "num_skipped": int(self.skipped(rows, low, high).sum()),
        }

    def state_dict(self) -> SolveRateState:
        """The clock and every estimate."""
        rows = np.flatnonzero(self.seen_at >= 0)
        return {
            "step": self.step,
            "rows": rows.tolist(),
            "estimates": self.estimates[rows].tolist(),
            "seen_at": self.seen_at[rows].tolist(),
        }

    def load_state_dict(self, state: SolveRateState) -> None:
        """Resume from a `state_dict` made with the same examples in the same order."""
        self.step = state["step"]
        self.estimates[:], self.seen_at[:] = 0.0, -1
        self.estimates[state["rows"]] = state["estimates"]
        self.seen_at[state["rows"]] = state["seen_at"]
