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
        ({"L1": 1472, "L2": 105, "L3": 238, "L4": 1853}, {"L1": 1853, "L2": 1260, "L3": 1853, "L4": 1853}),
        ({"L1": 730, "L2": 251, "L3": 1480, "L4": 2504}, dict.fromkeys(("L1", "L2", "L3", "L4"), 2504)),
        ({"L1": 10, "L2": 30, "L4": 41}, {"L1": 41, "L2": 41, "L4": 41}),
        ({"L1": 2, "L4": 1000}, {"L1": 24, "L4": 1000}),
        ({"L3": 7}, {"L3": 7}),
        ({}, {}),
    ],
)
def test_how_many_pairs_of_each_grade(counts: dict[str, int], expected: dict[str, int]) -> None:
    chosen = balanced(pairs(**counts), Grades(), 0)
    assert Counter(example.grade for example in chosen) == expected
    times = Counter(example.example_id for example in chosen)
    for grade, num in counts.items():
        of_grade = [times[f"{grade}{i}"] for i in range(num)]
        assert min(of_grade) >= 1 and max(of_grade) <= min(12, min(of_grade) + 1)  # no pair is lost for the copy of another


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
    assert Counter(example.grade for example in chosen) == {"no": 36, "yes": 100}


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
