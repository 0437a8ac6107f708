"""Balanced pairs: how many of each grade, that nothing is lost below the limit, and that order does not matter."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from srpo.core.grades import Grades
from srpo.data.balance import balanced
from srpo.data.examples import Example


def pairs(**counts: int) -> list[Example]:
    """`counts` pairs of each grade."""
    return [Example(f"{grade}{i}", "q", "query", "title", gold=(grade,)) for grade, n in counts.items() for i in range(n)]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"L1": 1472, "L2": 105, "L3": 238, "L4": 1853}, {"L1": 420, "L2": 210, "L3": 420, "L4": 420}),
        ({"L1": 730, "L2": 251, "L3": 1480, "L4": 2504}, {"L1": 1004, "L2": 502, "L3": 1004, "L4": 1004}),
        ({"L1": 10, "L2": 30, "L4": 41}, {"L1": 20, "L2": 40, "L4": 40}),
        ({"L1": 5, "L4": 10}, {"L1": 10, "L4": 20}),
        ({"L3": 7}, {"L3": 14}),
        ({}, {}),
    ],
)
def test_how_many_pairs_of_each_grade(counts: dict[str, int], expected: dict[str, int]) -> None:
    chosen = balanced(pairs(**counts), Grades(), 0)
    assert Counter(example.grade for example in chosen) == expected
    times = Counter(example.example_id for example in chosen)
    assert max(times.values(), default=1) <= 2
    for grade, num in counts.items():
        ids = {example.example_id for example in chosen if example.grade == grade}
        assert len(ids) == min(num, expected[grade])  # no pair is lost for the copy of another


def test_the_order_of_the_pairs_does_not_matter_and_the_seed_does() -> None:
    counts = {grade: random.randint(20, 200) for grade in Grades().names}
    given = pairs(**counts)
    shuffled = random.sample(given, len(given))
    seed = random.randrange(2**31)
    chosen = balanced(given, Grades(), seed)
    assert balanced(iter(shuffled), Grades(), seed) == chosen
    assert balanced(given, Grades(), seed + 1) != chosen
    grades = [example.grade for example in chosen]
    assert grades != sorted(grades, key=str) and len({*grades[: len(grades) // 2]}) == 4  # mixed, for a run that stops early


def test_another_scale_of_grades() -> None:
    chosen = balanced(pairs(no=3, yes=100), Grades(("no", "yes")), 1)
    assert Counter(example.grade for example in chosen) == {"no": 6, "yes": 12}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Example("e1", "q", "query", "title")], "e1 has the grade None: give pairs with one of L1, L2, L3, L4"),
        (pairs(yes=1), "yes0 has the grade yes: give pairs with one of L1"),
        (pairs(L1=2) + pairs(L1=1), "1 pairs have an example_id that occurs before"),
    ],
)
def test_pairs_that_cannot_be_balanced(given: list[Example], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced(given, Grades(), 0)
