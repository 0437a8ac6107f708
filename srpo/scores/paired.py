"""Two systems on the same pairs: the difference of every score with a paired interval, and an exact test of their verdicts.

Both systems are scored on the same draws of the queries, so that a difficulty of a query for both cancels in the difference.
Differences are B - A: A is the baseline, B the system under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srpo.core.batch import Rollout
from srpo.core.config.evaluation import BootstrapConfig
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.scores.bootstrap import cluster_sums, percentile_interval, resampled_sums
from srpo.scores.evaluation import parts_by, shaped
from srpo.scores.tally import Layout, scores, tally, true_grades

_ROUNDING = 1e-12  # differences of two scores up to this size count as 0


def compare_systems(
    rollouts_a: Sequence[Rollout],
    rollouts_b: Sequence[Rollout],
    examples: Sequence[Example],
    schema: StepSchema,
    *,
    by: Sequence[str] = ("query_type",),
    bootstrap: BootstrapConfig | None = None,
) -> dict[str, Any]:
    """How much better B is than A, JSON-able; response i of both systems answers example i.

    - `difference`: the `summarized` difference of each score, in the shape that the scores have in `evaluation.results_dict`.
      None for a step without a reference in any example, and for consistency if no steps can be checked.
    - `mcnemar`: `mcnemar` of the verdicts; `num_examples`, `num_queries`.
    - `by: {tag: {value: the same}}` for each tag of `by` that an example carries.

    Raises UserError if a pair has no grade, ValueError for no pairs, and if responses and examples are of different pairs.
    """
    pairs = [example.example_id for example in examples]
    if not pairs or any([r.example_id for r in rollouts] != pairs for rollouts in (rollouts_a, rollouts_b)):
        raise ValueError("give both systems one response to each of the same pairs, at least one, in the same order")
    settings = bootstrap or BootstrapConfig()
    tallies = [tally(rollouts, examples, schema) for rollouts in (rollouts_a, rollouts_b)]
    grades = true_grades(examples, schema.grades)
    right_a, right_b = (
        np.array([schema.grades.index(r.answers[-1]) == grade for r, grade in zip(rollouts, grades, strict=True)])
        for rollouts in (rollouts_a, rollouts_b)
    )
    queries = [example.query_id for example in examples]

    def compared(rows: list[int]) -> dict[str, Any]:
        sums = cluster_sums(np.hstack([counts[rows] for counts in tallies]), [queries[i] for i in rows])
        return {
            "num_examples": len(rows),
            "num_queries": len(sums),
            "difference": differences(sums, Layout.of(schema), settings),
            "mcnemar": mcnemar(right_a[rows], right_b[rows]),
        }

    parts = parts_by(examples, by)
    overall = compared(list(range(len(examples))))
    return {**overall, "by": {tag: {v: compared(rows) for v, rows in values.items()} for tag, values in parts.items()}}


def differences(sums: NDArray[np.float64], at: Layout, settings: BootstrapConfig) -> dict[str, Any]:
    """`summarized` difference of each score. `sums` [Q, 2 K]: sums over each query of the counts of A, then of those of B."""
    totals, draws = (np.split(counts, 2, axis=-1) for counts in (sums.sum(0), resampled_sums(sums, settings)))
    point_a, point_b = (scores(total, at) for total in totals)
    drawn_a, drawn_b = (scores(drawn, at, total) for drawn, total in zip(draws, totals, strict=True))
    # Row 0 is the difference on all queries; the other rows are the draws.
    rows = {key: np.concatenate([(point_b[key] - point_a[key])[None], drawn_b[key] - drawn_a[key]]) for key in point_a}
    return shaped(rows, lambda column: summarized(column[0], column[1:], settings.level))


def summarized(difference: float, draws: NDArray[np.float64], level: float) -> dict[str, Any] | None:
    """`{difference, interval, b_higher_frac, equal_frac}` of a difference and its draws [D]; None if the difference is NaN.

    `b_higher_frac` is the share of draws in which B scores higher, that is better; `equal_frac` is the share in which both score
    the same up to rounding. NaN draws are left out; if no draw remains, all but `difference` are None.
    """
    if np.isnan(difference):
        return None
    defined = draws[~np.isnan(draws)]
    return {
        "difference": float(difference),
        "interval": percentile_interval(defined, level),
        "b_higher_frac": float((defined > _ROUNDING).mean()) if defined.size else None,
        "equal_frac": float((np.abs(defined) <= _ROUNDING).mean()) if defined.size else None,
    }


def mcnemar(right_a: NDArray[np.bool_], right_b: NDArray[np.bool_]) -> dict[str, Any]:
    """`{num_only_a_right, num_only_b_right, p_value}`: McNemar's exact two-sided test of the verdicts [N] of two systems.

    Under the null hypothesis that both are right equally often, a pair that only one of them gets right belongs to either with
    probability 1/2. The test takes all pairs as independent, even those of one query; the interval of the accuracy's difference
    does not.
    """
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return {"num_only_a_right": only_a, "num_only_b_right": only_b, "p_value": sign_test(only_a, only_b)}


def sign_test(num_a: int, num_b: int) -> float:
    """Exact two-sided p-value of a to b throws of a fair coin: min(1, 2 P(X <= min(a, b))), X ~ Binomial(a + b, 1/2)."""
    total, least = num_a + num_b, min(num_a, num_b)
    tail = sum(accumulate(range(least), lambda ways, k: ways * (total - k) // (k + 1), initial=1))
    return min(1.0, 2 * tail / 2**total)
