"""Ranking by the probabilities of the grades: NDCG over the items of a query, and the area under the ROC curve.

An item is ranked by its expected grade, or by the probability of the best grade. A response without a readable verdict has no
probabilities and ranks last.

Letters: N pairs, C grades.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srpo.core.grades import Grades
from srpo.data.examples import Example
from srpo.scores.tally import true_grades

Probs = Sequence[Sequence[float] | None]  # [N][C], or None without a verdict


def ranking_scores(probs: Probs, examples: Sequence[Example], grades: Grades) -> dict[str, Any]:
    """Scores of ranking, JSON-able, as fractions:

    - `ndcg_expected`, `ndcg_best`: mean NDCG (gains `grades.gain`) of the queries whose items differ in their gains, ranked by
      the expected class and by the probability of the best grade; None without such a query;
    - `auc_best`, `auc_good`: probability that a pair of the best grade (of a good grade) has a higher probability of it than
      another pair, ties counted half; None if all pairs are, or none is; all None if no pair has probabilities;
    - `num_ranked_queries`, `num_unread`: numbers of these queries, and of pairs without probabilities.
    """
    true = np.array(true_grades(examples, grades))
    known = np.array([row is not None for row in probs])
    if not known.any():
        nothing = dict.fromkeys(("ndcg_expected", "ndcg_best", "auc_best", "auc_good"))
        return {**nothing, "num_ranked_queries": 0, "num_unread": len(examples)}
    table = np.array([[0.0] * len(grades.names) if row is None else row for row in probs], dtype=np.float64)
    expected = np.where(known, table @ np.arange(len(grades.names)), -1.0)
    best = np.where(known, table[:, -1], -1.0)
    good = list(grades.good_classes)
    gains = np.array(grades.gain)[true]
    queries: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        queries.setdefault(example.query_id, []).append(i)
    ranked = [rows for rows in queries.values() if len({*gains[rows]}) > 1]
    means = {
        name: float(np.mean([ndcg(gains[rows], score[rows]) for rows in ranked])) if ranked else None
        for name, score in (("ndcg_expected", expected), ("ndcg_best", best))
    }
    return {
        **means,
        "auc_best": auc(true == len(grades.names) - 1, best),
        "auc_good": auc(np.isin(true, good), np.where(known, table[:, good].sum(1), -1.0)),
        "num_ranked_queries": len(ranked),
        "num_unread": int((~known).sum()),
    }


def ndcg(gains: NDArray[np.float64], score: NDArray[np.float64]) -> float:
    """DCG of the items in falling order of `score`, over the DCG in falling order of `gains`; gain / log2(1 + rank) per item.

    Items of equal score share their ranks: each counts with the mean discount of these ranks (McSherry and Najork 2008), as
    scikit-learn's `ndcg_score` has it. Gains must not all be 0.
    """
    discounts = 1 / np.log2(np.arange(len(gains)) + 2)
    _, group = np.unique(-score, return_inverse=True)
    counts = np.bincount(group)
    ends = counts.cumsum()
    sums = np.concatenate([[0.0], discounts.cumsum()])
    mean_discounts = (sums[ends] - sums[ends - counts]) / counts
    return float((gains * mean_discounts[group]).sum() / (np.sort(gains)[::-1] * discounts).sum())


def auc(positive: NDArray[np.bool_], score: NDArray[np.float64]) -> float | None:
    """Probability that a positive has a higher score than a negative, ties counted half; None without both."""
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return None
    _, group = np.unique(score, return_inverse=True)
    counts = np.bincount(group)
    ranks = counts.cumsum() - (counts - 1) / 2  # mean rank, from 1, of the items of each score
    return float((ranks[group][positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))
