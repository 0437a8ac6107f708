"""Selection of pairs by grade, for demonstrations: of real pairs most have one grade, and a policy learns to always say it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.data.examples import Example

REPEATS = 12  # most times that a pair comes


def balanced(examples: Iterable[Example], grades: Grades, seed: int) -> list[Example]:
    """All pairs of `examples`, those of rarer grades several times, in a random order.

    Every grade comes as often as the most frequent one, but no pair more than 12 times, or more than once more than another of
    its grade. A grade without pairs stays without. Draws and order are a hash of (seed, example_id), so they do not depend on the
    order of `examples`.
    UserError for a pair whose grade is not one of `grades`, or that occurs twice.
    """
    by_grade: dict[str, dict[str, Example]] = {name: {} for name in grades.names}
    num_repeated = 0
    for example in examples:
        if example.grade not in by_grade:
            raise UserError(f"{example.shown} has the grade {example.grade}: give pairs with one of {', '.join(grades.names)}")
        num_repeated += example.example_id in by_grade[example.grade]
        by_grade[example.grade][example.example_id] = example
    if num_repeated:
        raise UserError(f"{num_repeated} pairs have an example_id that occurs before: give every pair its own")
    most = max(map(len, by_grade.values()))
    chosen: dict[tuple[bytes, str], Example] = {}
    for pairs in by_grade.values():
        total = min(most, REPEATS * len(pairs))
        keys = [sorted((_digest(seed, copy, name), name) for name in pairs) for copy in range(REPEATS)]
        chosen |= {key: pairs[key[1]] for key in [key for copy in keys for key in copy][:total]}
    return [chosen[key] for key in sorted(chosen)]


def _digest(seed: int, copy: int, example_id: str) -> bytes:
    return hashlib.blake2b(f"balance|{seed}|{copy}|{example_id}".encode(), digest_size=16).digest()
