"""The survey of judged pairs: counts against a plain count, and a line for everything that is odd."""

from __future__ import annotations

import random
from collections import Counter

from srpo.core.grades import Grades
from srpo.data.examples import Example
from srpo.data.survey import survey

GRADES = Grades(("no", "maybe", "yes"))


def pair(number: int, query: str, title: str, grade: str | None, **fields: str) -> Example:
    return Example(str(number), query, query, title, fields, gold=(None, grade))


def test_counts_are_those_of_a_plain_count() -> None:
    examples = [
        pair(i, f"Query {i % 300}", f"title {i}", random.choice(GRADES.names), brand=random.choice(["Acme", ""]))
        for i in range(900)
    ]
    prompts = [[0] * random.randint(5, 90) for _ in examples]
    found = survey(examples, GRADES, ("category_match", "verdict"), prompts)
    assert (found.num_pairs, found.num_queries, found.pairs_per_query) == (900, 300, (3, 3, 3))
    assert found.grades == {name: count for name in GRADES.names if (count := Counter(e.grade for e in examples)[name])}
    assert found.fields == {"brand": sum(e.fields["brand"] == "Acme" for e in examples)}
    lengths = sorted(map(len, prompts))
    assert found.prompt_tokens == (lengths[450], lengths[891], lengths[-1])
    lines = found.lines()
    assert lines[0] == "900 pairs of 300 queries (3 to 3 per query, median 3)"
    assert not [line for line in lines if line.startswith("note")]


def test_what_is_odd_is_said() -> None:
    examples = [pair(i, f"q{i % 5}", f"t{i}", "yes") for i in range(100)]
    examples += [pair(100, "Q0", "T0", "no"), pair(101, "q1", "t1", "yes"), pair(102, "q2", "new", None)]
    examples += [Example("103", "q3", "q3", "other", gold=("match", "maybe"))]
    notes = [line for line in survey(examples, GRADES, ("category_match", "verdict")).lines() if line.startswith("note")]
    assert notes == [
        "note: 1 pairs have no grade",
        "note: fewer than 2 % of the pairs are no or maybe; a judge learns little about such a grade",
        "note: 2 pairs repeat the query and item of another",
        "note: 1 of them have two grades, so no judge can be right on all",
        "note: 5 queries are few: results on other queries will depend on which ones are held out",
    ]
    assert "labels of steps: category_match 1" in survey(examples, GRADES, ("category_match", "verdict")).lines()
