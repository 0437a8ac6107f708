"""Scores of a judge: against scikit-learn, and examples by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, precision_score, recall_score

from srpo.judge_training.evaluation import calibration, judge_scores, judge_table, reliability_table, vote_shares

T, F = True, False


def test_scores_equal_scikit_learn() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    num = rng.randrange(20, 200)
    verdicts = [tuple(rng.choice((T, F, None)) for _ in range(3)) for _ in range(num)]
    truths = [tuple(rng.choice((T, T, F, None)) for _ in range(3)) for _ in range(num)]
    shares = [tuple(rng.choice((None, 0.0, 0.25, 0.5, 0.75, 1.0, rng.random())) for _ in range(3)) for _ in range(num)]
    scores = judge_scores(verdicts, truths, shares, ("a", "b", "c"))
    for j, name in enumerate("abc"):
        rows = [(t[j], s[j]) for t, s in zip(verdicts, truths, strict=True) if s[j] is not None]
        predicted, true = ["missing" if t is None else str(t) for t, _ in rows], [str(s) for _, s in rows]
        got = scores["steps"][name]
        assert got["agreement"] == pytest.approx(accuracy_score(true, predicted)), seed
        wanted = {"labels": ["False"], "average": "micro", "zero_division": 0}
        assert got["incorrect_precision"] == pytest.approx(precision_score(true, predicted, **wanted)), seed
        assert got["incorrect_recall"] == pytest.approx(recall_score(true, predicted, **wanted)), seed
        assert (got["num"], got["num_missing"]) == (len(rows), predicted.count("missing"))
        known = [(share[j], s[j]) for share, s in zip(shares, truths, strict=True) if s[j] is not None and share[j] is not None]
        p, y = np.array([k[0] for k in known]), np.array([k[1] for k in known])
        frac, mean = calibration_curve(y, p, n_bins=10)
        bins = got["calibration"]["bins"]
        assert [b["frac_correct"] for b in bins] == pytest.approx(frac.tolist()), seed
        assert [b["probability"] for b in bins] == pytest.approx(mean.tolist()), seed
        ece = sum(b["num"] * abs(f - m) for b, f, m in zip(bins, frac, mean, strict=True)) / len(p)
        assert got["calibration"]["ece"] == pytest.approx(ece) and sum(b["num"] for b in bins) == len(p)
        assert got["calibration"]["brier"] == pytest.approx(brier_score_loss(y, p))


def test_scores_by_hand() -> None:
    verdicts = [(T, None), (F, None), (0.4, None), (None, None)]
    truths = [(T, None), (T, None), (F, None), (F, None)]
    scores = judge_scores(verdicts, truths, [(0.9, None), (0.2, None), (0.3, None), (None, None)], ("s", "nobody"))
    step = scores["steps"]["s"]
    assert (step["agreement"], step["num_missing"], step["num_incorrect"]) == (0.5, 1, 2)  # the probability 0.4 is "incorrect"
    assert (step["incorrect_precision"], step["incorrect_recall"]) == (0.5, 0.5)
    # bins (0.8, 0.9]: 0.9 of 1; (0.1, 0.2]: 0.2 of 1; (0.2, 0.3]: 0.3 of 0
    assert step["calibration"]["ece"] == pytest.approx((0.1 + 0.8 + 0.3) / 3)
    assert scores["steps"]["nobody"]["agreement"] is None and scores["steps"]["nobody"]["calibration"]["num"] == 0
    table = judge_table({"sft": scores, "grpo": scores})
    assert [line.split() for line in table.splitlines()[:3]] == [
        ["s", "nobody"],
        ["agreement,", "%", "sft", "50.0", "-"],
        ["grpo", "50.0", "-"],
    ]
    assert "100.0 % of 1" in reliability_table(scores)


def test_shares_of_votes() -> None:
    assert vote_shares([[(T, None), (F, None), (T, F), (None, None)]]) == [(2 / 3, 0.0)]


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="1 verdicts, 2 of annotators, 1 shares"):
        judge_scores([(T,)], [(T,), (T,)], [(0.5,)], ("a",))
    with pytest.raises(ValueError, match="give numbers from 0 to 1"):
        calibration([1.5], [T])
