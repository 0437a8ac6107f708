"""Means, standard deviations and orders, computed by hand."""

from __future__ import annotations

import math

import pytest

from srpo.experiments.summary import headline, judge_scores_of, order, scores_of, summarize, table_text
from srpo.experiments.tables import Row, Table

TABLE = Table(
    "A table",
    "wild",
    ("accuracy", "macro_f1"),
    (Row("one", "sft", (70.0, 50.0)), Row("two", "dpo", (71.0, 52.0)), Row("ours", "grpo"), Row("three", "srpo", (72.0, 52.0))),
)


def scores(*macro: float) -> list[dict[str, float]]:
    return [{"accuracy": 10.0, "macro_f1": value} for value in macro]


def test_means_spreads_and_the_order_of_rows() -> None:
    summary = summarize(TABLE, [scores(40, 42), scores(45, 46), scores(1, 2), scores(44, 46)])
    first = summary["rows"][0]["ours"]["macro_f1"]
    assert first["mean"] == 41 and first["std"] == pytest.approx(math.sqrt(2)) and first["values"] == [40, 42]
    assert summary["rows"][2]["paper"] is None
    ordering = summary["order"]
    # one < two: gaps 5 and 4, margin 2 * 0.707 / sqrt 2 = 1; one < three: 4 and 4; two = three in the paper: not compared
    assert [(p["first"], p["second"]) for p in ordering["pairs"]] == [("one", "two"), ("one", "three")]
    assert ordering["pairs"][0]["ours"] == pytest.approx(4.5) and ordering["pairs"][0]["margin"] == pytest.approx(1.0)
    assert (ordering["agree"], ordering["undecided"], ordering["oppose"], ordering["same_order"]) == (2, 0, 0, True)
    text = table_text(TABLE, summary, 2)
    assert "41.0 +-1.4" in text and "50.00" in text and "2 as in the paper, 0 the other way round" in text


def test_an_order_the_other_way_round_and_one_that_cannot_be_told() -> None:
    rows = summarize(TABLE, [scores(45, 46), scores(40, 42), scores(0, 0), scores(40, 52)])["rows"]
    ordering = order(rows, "macro_f1")
    assert [pair["verdict"] for pair in ordering["pairs"]] == ["oppose", "undecided"]
    assert not ordering["same_order"]
    single = summarize(TABLE, [scores(40), scores(45), scores(0), scores(45)])
    assert single["order"]["undecided"] == 2  # one seed has no standard error
    assert single["rows"][0]["ours"]["macro_f1"]["std"] == 0


def test_scores_are_percent() -> None:
    results = {"good_f1": 0.5, "accuracy": 0.25, "macro_f1": 0.125, "class_f1": [0.0, 0.1, 0.2, 1.0]}
    assert scores_of(results) == {
        "good_f1": 50.0,
        "accuracy": 25.0,
        "macro_f1": 12.5,
        **{"class_1_f1": 0.0, "class_2_f1": 10.0, "class_3_f1": 20.0, "class_4_f1": 100.0},
    }
    stage = {"steps": {name: {"agreement": i / 10} for i, name in enumerate("abcde")}}
    assert judge_scores_of(stage) == pytest.approx({"step_1": 0.0, "step_2": 10.0, "step_3": 20.0, "step_4": 30.0})


def test_the_headline_says_when_a_curve_reaches_the_other_ones_end() -> None:
    slow = [(100, 0.1), (200, 0.2), (300, 0.3), (400, 0.4), (500, 0.5)]  # ends at the mean of its last three: 0.4
    fast = [(100, 0.3), (200, 0.41), (300, 0.6), (400, 0.6), (500, 0.6)]
    never = [(100 * i, 0.39) for i in range(1, 6)]
    tests = {"srpo": [0.7, 0.3], "grpo": [0.5, 0.2]}
    comparison = headline({"srpo": [fast, never], "grpo": [slow, slow]}, tests, "grpo")
    first, second = comparison["rivals"]["srpo"]["per_seed"]
    assert first["share"] == pytest.approx(0.4) and first["responses"] == 200 and second["share"] is None
    assert first["end"] == pytest.approx(0.6) and comparison["per_seed"][0] == pytest.approx({"end": 0.4, "test": 0.5})
    assert comparison["rivals"]["srpo"]["gap_mean"] == pytest.approx((0.2 - 0.01) / 2)
    assert comparison["rivals"]["srpo"]["test_gap_mean"] == pytest.approx(0.15)
    assert comparison["rivals"]["srpo"]["margin"] == pytest.approx(2 * 0.05 * 2**0.5 / 2**0.5)  # gaps of 0.2 and 0.1
