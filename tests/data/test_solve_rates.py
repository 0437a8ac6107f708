"""Estimates that move towards the newest score and age."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from srpo.data.solve_rates import SolveRates


def rates(num: int = 4, *, new_weight: float = 0.5, max_age: int = 10) -> SolveRates:
    return SolveRates([f"e{i}" for i in range(num)], new_weight=new_weight, max_age=max_age)


def test_estimates_by_hand():
    got = rates()
    got.tick()
    got.observe(["e0", "e1"], [0.8, 0.2])
    assert got.estimates.tolist() == [0.8, 0.2, 0.0, 0.0] and got.seen_at.tolist() == [1, 1, -1, -1]
    for _ in range(4):
        got.tick()
    got.observe(["e0"], [0.0])  # age 4 of 10: the old one weighs 0.5 * 0.6
    assert got.estimates[0] == pytest.approx(0.3 * 0.8)
    got.observe(["e0"], [1.0])  # age 0: half and half
    assert got.estimates[0] == pytest.approx(0.5 * 0.24 + 0.5)
    for _ in range(10):
        got.tick()
    got.observe(["e0"], [0.1])  # age 10: forgotten
    assert got.estimates[0] == 0.1
    got.observe(["e2"], [0.7])  # never scored: the estimate is the score
    assert got.estimates[2] == 0.7


def test_new_weight_1_is_the_last_score_alone():
    got, rng = rates(new_weight=1.0), random.Random(0)
    for _ in range(20):
        got.tick()
        score = rng.random()
        got.observe(["e3"], [score])
        assert got.estimates[3] == score


@pytest.mark.parametrize("max_age", [0, 1, 3])
def test_an_estimate_outside_the_window_skips_until_max_age(max_age):
    got = rates(max_age=max_age)
    rows = got.rows(["e0", "e1", "e2", "e3"])
    got.tick()
    got.observe(["e0", "e1", "e2"], [1.0, 0.5, 0.0])
    for age in range(6):
        assert got.skipped(rows, 0.01, 0.9).tolist() == [age < max_age, False, age < max_age, False]
        assert got.inside(rows, 0.01, 0.9).tolist() == [False, True, False, False]
        got.tick()
    assert got.stats(rows, 0.01, 0.9) == {
        "num_unseen": 1, "num_too_hard": 1, "num_in_window": 1, "num_too_easy": 1, "num_skipped": 0,
    }  # fmt: skip


def test_the_state_holds_what_was_scored_and_nothing_else():
    seed = random.randrange(10**6)
    rng, one, two = random.Random(seed), rates(50), rates(50)
    two.observe(["e7"], [0.3])  # scored before the load, which resets it
    for _ in range(30):
        one.tick()
        one.observe([f"e{i}" for i in rng.sample(range(20), 3)], [rng.random() for _ in range(3)])
    state = json.loads(json.dumps(one.state_dict()))
    assert len(state["rows"]) <= 20
    two.load_state_dict(state)
    assert two.state_dict() == one.state_dict(), seed
    for each in (one, two):
        each.tick()
        each.observe(["e1", "e30"], [0.1, 0.2])
    assert np.array_equal(one.estimates, two.estimates) and np.array_equal(one.seen_at, two.seen_at), seed


def test_the_order_of_examples_in_a_step_does_not_matter():
    one, other = rates(), rates()
    for each, order in ((one, [0, 1, 2]), (other, [2, 0, 1])):
        for scores in ([0.1, 0.4, 0.9], [0.3, 0.3, 0.2]):
            each.tick()
            each.observe([f"e{i}" for i in order], [scores[i] for i in order])
    assert one.state_dict() == other.state_dict()


def test_bad_arguments():
    with pytest.raises(ValueError, match="no examples"):
        rates(0)
    with pytest.raises(ValueError, match="'x' is not in this sampler"):
        rates().observe(["x"], [0.5])
    for new_weight in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"sampler.new_weight is .*: set it above 0"):
            rates(new_weight=new_weight)
