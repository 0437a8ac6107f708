"""Selection of pairs by grade, for demonstrations: of real pairs most have one grade, and a policy learns to always say it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.data.examples import Example

RATIO = 4  # most pairs of a grade, as a multiple of the rarest grade's
REPEATS = 2  # most times that a pair comes


def balanced(examples: Iterable[Example], grades: Grades, seed: int) -> list[Example]:
    """Pairs of all grades of `examples`, of none more than twice as many as of the rarest.

    With n pairs of the rarest grade, every grade gets 4 n: of one that has more, 4 n are drawn; of one that has fewer, all come,
    and some a second time, but none a third: at least 2 n. A grade without pairs stays without. Draws and order are a hash of
    (seed, example_id), so they do not depend on the order of `examples`.
    UserError for a pair whose grade is not one of `grades`, or that occurs twice.
    """
    by_grade: dict[str, list[Example]] = {name: [] for name in grades.names}
    for example in examples:
        if example.grade not in by_grade:
            raise UserError(f"{example.shown} has the grade {example.grade}: give pairs with one of {', '.join(grades.names)}")
        by_grade[example.grade].append(example)
    present = [pairs for pairs in by_grade.values() if pairs]
    most = RATIO * min(map(len, present), default=0)
    chosen: dict[tuple[bytes, str], Example] = {}
    for pairs in present:
        ids = {example.example_id: example for example in pairs}
        if len(ids) < len(pairs):
            raise UserError(f"{len(pairs) - len(ids)} pairs have an example_id that occurs before: give every pair its own")
        drawn = sorted((_digest(seed, 0, name), name) for name in ids)[:most]
        again = sorted((_digest(seed, copy, name), name) for copy in range(1, REPEATS) for name in ids)[: most - len(drawn)]
        chosen |= {key: ids[key[1]] for key in (*drawn, *again)}
    return [chosen[key] for key in sorted(chosen)]


def _digest(seed: int, copy: int, example_id: str) -> bytes:
    return hashlib.blake2b(f"balance|{seed}|{copy}|{example_id}".encode(), digest_size=16).digest()
