"""NDCG and AUC against scikit-learn, and what counts as a ranked query."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.metrics import ndcg_score, roc_auc_score

from srpo.core.grades import Grades
from srpo.data.examples import Example
from srpo.scores.ranking import auc, ndcg, ranking_scores


def example(number: int, query: int, grade: str) -> Example:
    return Example(str(number), f"q{query}", f"query {query}", "title", gold=(grade,))


def scale(num: int) -> Grades:
    gains = tuple(sorted(random.uniform(0, 5) for _ in range(num)))
    return Grades(tuple(f"g{i}" for i in range(num)), good=(f"g{num - 1}",), gains=gains if random.random() < 0.5 else ())


def test_ndcg_and_auc_are_scikit_learn_s_with_ties() -> None:
    rng = np.random.default_rng(random.randrange(2**32))
    for _ in range(200):
        num = int(rng.integers(2, 30))
        gains, score = rng.integers(0, 4, num).astype(float), rng.integers(0, rng.integers(2, 30), num) / 7
        if gains.any():
            assert ndcg(gains, score) == pytest.approx(ndcg_score(gains[None], score[None]), abs=1e-12)
        positive = gains > 1
        if 0 < positive.sum() < num:
            assert auc(positive, score) == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
        else:
            assert auc(positive, score) is None


@pytest.mark.parametrize("num_grades", [2, 3, 4, 5, 10])
def test_scores_of_random_probabilities(num_grades: int) -> None:
    grades = scale(num_grades)
    rng = np.random.default_rng(random.randrange(2**32))
    names = random.sample(grades.names * (120 // num_grades), 120)  # every grade is there
    examples = [example(i, i % 9, name) for i, name in enumerate(names)]
    probs = rng.dirichlet(np.ones(num_grades), 120)
    true = np.array([grades.names.index(e.grade or "") for e in examples])
    gains = np.array(grades.gain)[true]
    result = ranking_scores(probs.tolist(), examples, grades)
    queries = [np.flatnonzero(np.arange(120) % 9 == q) for q in range(9)]
    queries = [rows for rows in queries if len({*gains[rows]}) > 1]
    for name, score in (("ndcg_expected", probs @ np.arange(num_grades)), ("ndcg_best", probs[:, -1])):
        expected = np.mean([ndcg_score(gains[rows][None], score[rows][None]) for rows in queries])
        assert result[name] == pytest.approx(expected, abs=1e-12)
    assert result["auc_best"] == pytest.approx(roc_auc_score(true == num_grades - 1, probs[:, -1]), abs=1e-12)
    assert result["auc_good"] == result["auc_best"]  # the best grade alone is good here
    assert result["num_ranked_queries"] == len(queries) and result["num_unread"] == 0


def test_a_response_without_a_verdict_ranks_last() -> None:
    grades = Grades(("no", "yes"))
    examples = [example(0, 0, "yes"), example(1, 0, "no"), example(2, 0, "no")]
    result = ranking_scores([None, (0.9, 0.1), (0.8, 0.2)], examples, grades)
    assert result["num_unread"] == 1 and result["auc_best"] == 0.0
    assert result["ndcg_best"] == pytest.approx(1 / np.log2(4))


def test_queries_that_nothing_can_order_are_left_out() -> None:
    grades = Grades(("no", "yes"))
    alike = [example(0, 0, "yes"), example(1, 0, "yes"), example(2, 1, "yes")]
    result = ranking_scores([(0.5, 0.5)] * 3, alike, grades)
    assert result["ndcg_expected"] is None and result["auc_best"] is None and result["num_ranked_queries"] == 0
