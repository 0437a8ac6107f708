"""Selection: against brute force on random data, examples by hand, and independence of the order."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from srpo.core.config.selection import Criteria
from srpo.selection.criteria import REASONS, apportion, check_quotas, collect_scores, quotas_of, select
from srpo.selection.records import Record

TYPES, GRADES = ("negation", "plain", "qa"), ("L1", "L2", "L3", "L4")


def record(name: str, rate: float | None, **changes: Any) -> Record:
    """A record that rejection sampling keeps if 0.01 < rate < 0.9."""
    values: dict[str, Any] = {
        "example_id": name,
        "solve_rate": rate,
        "verdict_accuracy": rate,
        "step_rewards": (0.1, 0.5),
        "judge_score": None,
        "judge_scores": (None, None),
        "right_verdict_wrong_steps_frac": None,
        "wrong_verdict_right_steps_frac": None,
        "num_responses": 4,
        "num_different": 4,
        "num_reward_patterns": 3,
        "num_verdicts": 0,
        "num_no_verdict": 0,
        "tags": {},
    }
    return Record(**(values | changes))


def random_records(rng: random.Random, n: int) -> list[Record]:
    def maybe(value: float) -> float | None:
        return None if rng.random() < 0.1 else value

    return [
        record(
            f"e{i}",
            maybe(rng.choice((0.0, 0.01, 0.9, 1.0, rng.random(), rng.random(), rng.random()))),
            verdict_accuracy=maybe(rng.choice((0.0, 1.0, rng.random()))),
            judge_score=maybe(rng.randrange(9) / 8),
            right_verdict_wrong_steps_frac=rng.randrange(5) / 8,
            wrong_verdict_right_steps_frac=rng.randrange(5) / 8,
            num_reward_patterns=rng.choice((1, 2, 3, 4)),
            tags={"type": rng.choice(TYPES), "grade": rng.choice(GRADES)},
        )
        for i in range(n)
    ]


def reason_alone(r: Record, c: Criteria) -> str:
    """Reason for which 4.1.1 drops a record: a second implementation, one record at a time."""
    rate = r.solve_rate if c.difficulty_score == "total" else r.verdict_accuracy
    if rate is None:
        return "ungradable"
    uniform = {
        "reward": r.num_reward_patterns == 1,
        "verdict": r.verdict_accuracy in (0.0, 1.0),
        "keep": False,
    }[c.uniform]
    if uniform:
        return "uniform_right" if (rate if r.verdict_accuracy is None else r.verdict_accuracy) >= 0.5 else "uniform_wrong"
    if rate >= c.difficulty_high:
        return "too_easy"
    if rate <= c.difficulty_low:
        return "too_hard"
    return "not_judged" if c.score in ("best", "uncertain") and r.judge_score is None else ""


def key_of(r: Record, c: Criteria) -> float:
    if c.score == "none":
        return 0.0
    if c.score == "disagree":
        return -((r.right_verdict_wrong_steps_frac or 0) + (r.wrong_verdict_right_steps_frac or 0))
    assert r.judge_score is not None
    return -r.judge_score if c.score == "best" else abs(r.judge_score - 0.5)


@pytest.mark.parametrize("seed", range(40))
def test_quotas_are_exact_and_the_best_of_each_stratum_is_taken(seed: int) -> None:
    rng = random.Random(seed)
    records = random_records(rng, rng.randrange(150, 400))
    balance = rng.choice(((), ("type",), ("grade",), ("type", "grade"), ("grade", "type")))
    c = Criteria(
        difficulty_score=rng.choice(("total", "final")),
        uniform=rng.choice(("reward", "verdict", "keep")),
        score=rng.choice(("none", "best", "uncertain", "disagree")),
        num_examples=rng.choice((0, 1, 7, 24, 60, 10_000)),
        balance=balance,
        short="take_all",
    )
    selection = select(collect_scores(records, balance, seed), c)
    alone = [reason_alone(r, c) for r in records]
    reasons = [REASONS[code] for code in selection.reasons]
    assert [r for r, a in zip(reasons, alone, strict=True) if a] == [a for a in alone if a]

    strata = [tuple(r.tags[name] for name in balance) for r in records]
    passed = Counter(s for s, a in zip(strata, alone, strict=True) if not a)
    kept = Counter(s for s, r in zip(strata, reasons, strict=True) if r == "selected")
    cells = sorted({tuple(r.tags[b] for b in balance) for r in records})
    if balance == ("type", "grade"):
        cells = [(t, g) for t in TYPES for g in GRADES]
    if balance == ("grade", "type"):
        cells = [(g, t) for g in GRADES for t in TYPES]
    total = c.num_examples or min(n for n in passed.values() if n) * len(cells)
    assert sum(selection.quotas.values()) == total and set(selection.quotas) == set(cells)
    assert max(selection.quotas.values()) - min(selection.quotas.values()) <= 1
    for cell in cells:
        assert kept[cell] == min(selection.quotas[cell], passed[cell])
        assert selection.shortfall.get(cell, 0) == selection.quotas[cell] - kept[cell]
        inside = [(key_of(r, c), x) for r, s, a, x in zip(records, strata, alone, reasons, strict=True) if s == cell and not a]
        best, others = ([k for k, x in inside if (x == "selected") == wanted] for wanted in (True, False))
        assert not best or not others or max(best) <= min(others)
    expected = "over_quota" if c.score == "none" else "not_chosen_by_score"
    lost = {r for r, a, s in zip(reasons, alone, strata, strict=True) if not a and r != "selected" and selection.quotas[s]}
    assert lost <= {expected}


@pytest.mark.parametrize("score", ["none", "best", "disagree"])
def test_neither_order_nor_company_decides_the_draw(score: Any) -> None:
    rng = random.Random(5)
    records = [r for r in random_records(rng, 300) if r.judge_score is not None]
    c = Criteria(score=score, num_examples=40, balance=("type",), short="take_all")

    def chosen(records: list[Record], seed: int = 3) -> set[str]:
        keep = select(collect_scores(records, c.balance, seed), c).keep
        return {r.example_id for r, k in zip(records, keep, strict=True) if k}

    first = chosen(records)
    assert chosen(records[::-1]) == first and chosen(rng.sample(records, len(records))) == first
    assert chosen(records, seed=4) != first  # there are many ties
    fewer = [r for r in records if r.example_id in first or rng.random() < 0.5]
    assert chosen(fewer) == first  # removing unchosen records changes nothing


def test_uniform_groups_go_even_if_their_mean_is_inside() -> None:
    same = record("a", 0.44, verdict_accuracy=0.0, num_reward_patterns=1)
    lucky = record("b", 0.7, verdict_accuracy=1.0, num_reward_patterns=2)
    other = record("c", 0.5)
    scores = collect_scores([same, lucky, other], (), 0)

    def reasons(**settings: Any) -> list[str]:
        return [REASONS[code] for code in select(scores, Criteria(**settings)).reasons]

    assert reasons() == ["uniform_wrong", "selected", "selected"]
    assert reasons(uniform="verdict") == ["uniform_wrong", "uniform_right", "selected"]
    assert reasons(uniform="keep") == ["selected"] * 3


def test_the_window_is_open_at_both_ends() -> None:
    rates = [0.0, 0.01, math.nextafter(0.01, 1), 0.5, math.nextafter(0.9, 0), 0.9, 1.0]
    scores = collect_scores([record(f"e{i}", rate) for i, rate in enumerate(rates)], (), 0)
    assert select(scores, Criteria()).keep.tolist() == [False, False, True, True, True, False, False]
    assert select(scores, Criteria(difficulty_low=-1, difficulty_high=2)).keep.all()


@pytest.mark.parametrize("seed", range(30))
def test_largest_remainders(seed: int) -> None:
    """Hamilton's method, checked by its property: of all splits into integers, it is the nearest to proportion."""
    rng = random.Random(seed)
    shares: dict[tuple[str, ...], float] = {(f"s{i}",): rng.choice((0, 1, 2, 3, 7, 0.5, 0.1)) for i in range(rng.randrange(1, 9))}
    if not any(shares.values()):
        shares["s0",] = 1
    total = rng.randrange(200)
    split = apportion(total, shares)
    sum_of_shares = sum(shares.values())
    assert sum(split.values()) == total
    for value, n in split.items():
        assert abs(n - total * shares[value] / sum_of_shares) < 1 + 1e-9
    remainders = {v: total * shares[v] / sum_of_shares - math.floor(total * shares[v] / sum_of_shares + 1e-9) for v in shares}
    raised = [remainders[v] for v in shares if split[v] > total * shares[v] / sum_of_shares + 1e-9]
    not_raised = [remainders[v] for v in shares if split[v] <= math.floor(total * shares[v] / sum_of_shares + 1e-9)]
    assert not raised or not not_raised or min(raised) >= max(not_raised) - 1e-9


def test_equal_remainders_go_to_the_first() -> None:
    assert apportion(5, {("b",): 1, ("a",): 1, ("c",): 1}) == {("a",): 2, ("b",): 2, ("c",): 1}
    assert apportion(10, {("a",): 0.1, ("b",): 0.2, ("c",): 0.7}) == {("a",): 1, ("b",): 2, ("c",): 7}
    assert apportion(3, {("a",): 0.0, ("b",): 0.1}) == {("a",): 0, ("b",): 3}


def test_named_quotas_are_shares_of_a_total_or_numbers() -> None:
    available = {("a",): 90, ("b",): 50, ("c",): 7}
    shares = Criteria(balance=("type",), quotas={"a": 3, "c": 1}, num_examples=10)
    assert quotas_of(available, shares) == {("a",): 8, ("c",): 2}
    assert quotas_of(available, Criteria(balance=("type",), quotas={"a": 3, "c": 1})) == {("a",): 3, ("c",): 1}
    assert quotas_of(available, Criteria(balance=("type",), quotas={"a": 0.5, "b": 0.5}, keep_frac=0.5)) == {
        ("a",): 37,
        ("b",): 37,
    }


def test_a_stratum_without_a_quota_is_left_out() -> None:
    records = [record(f"e{i}", 0.5, tags={"type": "ab"[i % 2]}, judge_score=0.5) for i in range(10)]
    criteria = Criteria(balance=("type",), quotas={"a": 3}, score="best")
    counts = Counter(REASONS[code] for code in select(collect_scores(records, ("type",), 0), criteria).reasons)
    assert counts == {"selected": 3, "over_quota": 5, "not_chosen_by_score": 2}


def test_what_is_missing_is_said_by_how_much_and_where() -> None:
    tags = [{"type": "a", "grade": "L1"}] * 5 + [{"type": "a", "grade": "L2"}] * 2 + [{"type": "b", "grade": "L1"}] * 4
    records = [record(f"e{i}", 0.5, tags=t) for i, t in enumerate(tags)]
    scores = collect_scores(records, ("type", "grade"), 0)
    message = r"cannot be met: a/L2 has 2 of 3 \(1 short\), b/L2 has 0 of 3 \(3 short\)\. .*take_all"
    with pytest.raises(ValueError, match=message):
        select(scores, Criteria(num_examples=12, balance=("type", "grade")))
    selection = select(scores, Criteria(num_examples=12, balance=("type", "grade"), short="take_all"))
    assert selection.shortfall == {("a", "L2"): 1, ("b", "L2"): 3} and selection.keep.sum() == 8
    # without a total each share is the size of the smallest stratum that is not empty
    with pytest.raises(ValueError, match=r"b/L2 has 0 of 2 \(2 short\)"):
        select(scores, Criteria(balance=("type", "grade")))


def test_impossible_quotas_are_known_before_anything_is_sampled() -> None:
    counts = Counter({("a",): 5, ("b",): 2})
    check_quotas(counts, Criteria(num_examples=4, balance=("type",)))
    check_quotas(counts, Criteria(num_examples=100, balance=("type",), short="take_all"))
    check_quotas(counts, Criteria(keep_frac=1.0, balance=("type",)))  # a share of the examples that pass, not known yet
    with pytest.raises(ValueError, match=r"b has 2 of 3 \(1 short\)"):
        check_quotas(counts, Criteria(num_examples=6, balance=("type",)))


@pytest.mark.parametrize(("frac", "left", "kept"), [(0.5, 8, 4), (0.5, 7, 4), (0.25, 9, 2), (0.001, 9, 1), (1.0, 9, 9)])
def test_a_share_is_of_what_rejection_leaves(frac: float, left: int, kept: int) -> None:
    records = [record(f"e{i}", 0.5 if i < left else 1.0) for i in range(30)]
    assert select(collect_scores(records, (), 0), Criteria(keep_frac=frac)).keep.sum() == kept


def test_nothing_left_says_of_what_there_was_too_much() -> None:
    scores = collect_scores([record("a", 1.0), record("b", 1.0), record("c", 0.0), record("d", None)], (), 0)
    with pytest.raises(ValueError, match=r"none of 4 examples \(1 ungradable, 2 too easy, 1 too hard\): widen select.difficulty"):
        select(scores, Criteria())
    with pytest.raises(ValueError, match=r"\(1 not judged\): select.score 'best' needs steps that a judge grades"):
        select(collect_scores([record("a", 0.5)], (), 0), Criteria(score="best"))
    with pytest.raises(ValueError, match="no records to select from"):
        collect_scores([], (), 0)
    with pytest.raises(ValueError, match="example a has no tag 'type'"):
        collect_scores([record("a", 0.5)], ("type",), 0)


def test_records_are_taken_one_at_a_time_and_only_numbers_are_kept() -> None:
    alive = most = 0

    class Counted(Record):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[Record]:
        nonlocal alive, most
        for i in range(10_000):
            alive += 1
            most = max(most, alive)
            yield Counted(**vars(record(f"e{i}", (i % 100) / 100, tags={"type": "ab"[i % 2]})))

    scores = collect_scores(stream(), ("type",), 0)
    assert most <= 3 and alive == 0
    held = sum(value.nbytes for value in vars(scores).values() if isinstance(value, np.ndarray))
    assert held <= 10_000 * 64
    assert scores.solve_rate.tolist() == [(i % 100) / 100 for i in range(10_000)]
    assert scores.strata == (("a",), ("b",)) and scores.stratum[:4].tolist() == [0, 1, 0, 1]
    assert len(set(scores.draw.tolist())) == 10_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"difficulty_low": 0.9, "difficulty_high": 0.9},
            "no solve rate lies between 0.9 and 0.9: set select.diff",
        ),
        ({"num_examples": 3, "keep_frac": 0.5}, "set only one of them"),
        ({"balance": ("grade", "grade")}, "select.balance is grade, grade: name each tag once"),
        ({"quotas": {"L1": 1}}, "select.quotas needs the tags of its strata"),
        ({"quotas": {"L1": 0}, "balance": ("grade",)}, "not all 0"),
        ({"quotas": {"L1": 0.5}, "balance": ("grade",)}, "fractions, which are shares of a total: set"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Criteria(**settings)
