from __future__ import annotations

import pytest

from srpo.data.examples import Example
from srpo.data.strata import stratum, tags_with_grade, values_of

PAIR = Example("e1", "q", "x", "t", gold=(None, "L3"), tags={"query_type": "negation", "domain": ""})


def test_values_come_in_the_order_of_the_names() -> None:
    assert stratum(PAIR, ["query_type"]) == ("negation",)
    assert stratum(PAIR, ["grade", "query_type"]) == ("L3", "negation")
    assert stratum(PAIR, []) == ()


def test_the_tag_grade_wins_over_the_gold_verdict() -> None:
    tagged = Example("e", "q", "x", "t", gold=(None, "L3"), tags={"grade": "L1"})
    assert stratum(tagged, ["grade"]) == ("L1",)
    assert tags_with_grade(tagged) == {"grade": "L1"} and tags_with_grade(PAIR)["grade"] == "L3"
    assert PAIR.tags == {"query_type": "negation", "domain": ""}  # not changed


def test_tags_that_are_recorded_say_the_same_as_the_example() -> None:
    for names in ([], ["grade"], ["query_type", "grade"]):
        assert values_of(tags_with_grade(PAIR), names, "e1") == stratum(PAIR, names)


@pytest.mark.parametrize(
    ("pair", "name", "message"),
    [
        (PAIR, "brand", "example e1 has no tag 'brand' .its tags: domain, grade, query_type.: name tags that all examples have"),
        (PAIR, "domain", "example e1 has no tag 'domain'"),  # empty
        (Example("e2", "q", "x", "t"), "grade", "example e2 has no tag 'grade' .its tags: none."),
    ],
)
def test_a_missing_tag_is_named_with_those_that_are_there(pair: Example, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stratum(pair, [name])
