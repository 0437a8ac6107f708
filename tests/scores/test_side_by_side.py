from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from srpo.core.config.evaluation import BootstrapConfig, PagesConfig
from srpo.core.grades import Grades
from srpo.scores.pages import Page, Pages
from srpo.scores.side_by_side import good_frac, rating_of, side_by_side, verdict_of

PAPER = Grades()
NO_DRAWS = BootstrapConfig(num_draws=0)


def pages_of(a: dict[str, list[int]], b: dict[str, list[int]], ratings: str = "") -> Pages:
    """Pages with one item per grade; ratings: one letter per page (g, m, p, b), A's pages first."""
    words = iter([{"g": "good", "m": "mid", "p": "poor", "b": "bad"}[letter] for letter in ratings])
    pages = [
        {query_id: Page(tuple(f"i{k}" for k in range(len(grades))), next(words, None)) for query_id, grades in lists.items()}
        for lists in (a, b)
    ]
    return Pages(*pages, key="item_ids", num_others=0)


def compared(a: Any, b: Any, verdicts: Any = None, ratings: str = "", **changes: Any) -> dict[str, Any]:
    settings = PagesConfig(**{"top_n": 4, **changes})
    return side_by_side(pages_of(a, b, ratings), a, b, verdicts, settings, {}, scale=PAPER, bootstrap=NO_DRAWS)


A = {"q1": [4, 3, 1, 1], "q2": [4, 4, 4, 3], "q3": [1, 1], "q4": [2, 2, 2, 4]}
B = {"q1": [4, 4, 4, 1], "q2": [4, 4, 4, 3], "q3": [1, 3], "q4": [2, 2, 1, 4]}


def test_hand_worked_metrics_from_item_classes():
    """Shares of class 3 or 4: A 2/4, 4/4, 0/2, 1/4; B 3/4, 4/4, 1/2, 1/4. Mean classes: B is better, same, better, worse."""
    results = compared(A, B)
    item = results["item_goodrate"]
    assert (item["a"], item["b"], item["difference"]) == pytest.approx((1.75 / 4, 2.5 / 4, 0.75 / 4))
    query = results["query_goodrate"]  # mid from 0.6: A has q2, B has q1 and q2
    assert (query["a"], query["b"], query["difference"]) == (0.25, 0.5, 0.25)
    gsb = results["gsb"]
    assert (gsb["good"], gsb["same"], gsb["bad"], gsb["num_comparisons"]) == (0.5, 0.25, 0.25, 4)
    assert gsb["gsb"] == 0.25  # (2 - 1) / 4
    assert (results["ratings_by"], results["verdicts_by"], results["num_short_pages"]) == ("item classes", "item classes", 2)
    assert item["interval"] is query["interval"] is gsb["interval"] is None


def test_bounds_and_margin_move_what_is_derived():
    assert compared(A, B, rating_bounds=(0.8, 0.5, 0.1))["query_goodrate"]["b"] == 0.75
    assert compared(A, B, rating_bounds=(1.0, 1.0, 0.1))["query_goodrate"]["b"] == 0.25
    # Gains in mean class: q1 1.0, q2 0, q3 1.0, q4 -0.25.
    gsb = compared(A, B, verdict_margin=0.25)["gsb"]
    assert (gsb["good"], gsb["same"], gsb["bad"]) == (0.5, 0.5, 0.0)
    assert compared(A, B, verdict_margin=1.0)["gsb"]["same"] == 1.0


def test_ratings_and_verdicts_of_people_are_taken():
    results = compared(A, B, {"q1": ["good", "good", "same"], "q3": ["bad"]}, ratings="gpbmmmgb")
    assert (results["query_goodrate"]["a"], results["query_goodrate"]["b"]) == (0.5, 0.75)
    gsb = results["gsb"]
    assert (gsb["gsb"], gsb["good"], gsb["same"], gsb["bad"], gsb["num_comparisons"]) == (0.25, 0.5, 0.25, 0.25, 4)
    assert (results["ratings_by"], results["verdicts_by"]) == ("people", "people")
    with pytest.raises(ValueError, match="some pages have a rating and some have none"):
        compared(A, B, ratings="gpb")


def test_rules_at_their_bounds():
    assert [rating_of([4] * n + [1] * (10 - n), (0.8, 0.6, 0.3), PAPER) for n in (8, 7, 6, 5, 3, 2)] == [
        "good",
        "mid",
        "mid",
        "poor",
        "poor",
        "bad",
    ]
    assert good_frac([1, 2, 3, 4], PAPER) == 0.5
    assert verdict_of([3, 3, 4], [4, 3, 3], 0.0) == "same"
    assert verdict_of([1], [4, 1, 1], 0.0) == "good"
    assert verdict_of([4], [4, 1, 1], 0.0) == "bad"


@pytest.mark.parametrize("seed", range(6))
def test_intervals_equal_resampled_queries(seed: int):
    rng = random.Random(seed)
    queries = [f"q{i}" for i in range(rng.choice([1, 2, 9, 20]))]
    a, b = ({q: [rng.randint(1, 4) for _ in range(rng.randint(1, 5))] for q in queries} for _ in range(2))
    verdicts = {q: [rng.choice(["good", "same", "bad"]) for _ in range(rng.randint(1, 3))] for q in queries if rng.random() < 0.5}
    tags = {q: {"query_type": rng.choice("xy")} for q in queries if rng.random() < 0.8}
    settings = BootstrapConfig(num_draws=40, level=0.9, seed=seed)
    results = side_by_side(pages_of(a, b), a, b, verdicts, PagesConfig(), tags, scale=PAPER, bootstrap=settings)
    json.dumps(results, allow_nan=False)
    values = results["by"].get("query_type", {})
    parts = {"": queries} | {value: [q for q in queries if tags.get(q) == {"query_type": value}] for value in values}
    assert set(parts) - {""} == {t["query_type"] for t in tags.values()}
    for value, chosen in parts.items():
        part = results["by"]["query_type"][value] if value else results
        assert part["num_queries"] == len(chosen)
        draws = np.random.default_rng(seed).integers(len(chosen), size=(40, len(chosen))) if len(chosen) > 1 else []
        items, nets = [], []
        for draw in draws:
            drawn = [chosen[i] for i in draw]
            items.append(sum(good_frac(b[q], PAPER) - good_frac(a[q], PAPER) for q in drawn) / len(drawn))
            votes = [v for q in drawn for v in verdicts.get(q, [])]
            nets += [(votes.count("good") - votes.count("bad")) / len(votes)] if votes else []
        expected = np.quantile(items, [0.05, 0.95]) if items else None
        assert part["item_goodrate"]["interval"] == (None if expected is None else pytest.approx(expected))
        if part["gsb"] is None:
            assert not [q for q in chosen if q in verdicts]
        else:
            assert part["gsb"]["interval"] == (pytest.approx(np.quantile(nets, [0.05, 0.95])) if nets else None)
            assert part["gsb"]["positive_frac"] == (pytest.approx(np.mean([net > 0 for net in nets])) if nets else None)
