"""Validation of rows: the example of a good row, and the error of each kind of bad row."""

from __future__ import annotations

import pytest

from srpo.data.examples import Example
from srpo.data.rows import example_from_row, row_from_example

ROW = {"example_id": "1", "query_id": "q", "query": "red shoes", "title": "Sneaker"}
OPTIONS = ((), (), ("match", "related", "mismatch"), ("match", "unclear", "conflict"), ("L1", "L2", "L3", "L4"))


def read(**changes) -> Example:
    return example_from_row({**ROW, **changes}, "data.jsonl, line 7", 5)


def test_the_least_row():
    assert read() == Example("1", "q", "red shoes", "Sneaker", {}, (None,) * 5, (None,) * 5, {})


def test_a_full_row_goes_both_ways():
    row = {
        **ROW,
        "fields": {"brand": "Acme", "color": "red"},
        "gold": [None, None, "match", "unclear", "L3"],
        "truth": ["shoes; color red", "sneaker", "match", "unclear", "L3"],
        "tags": {"domain": "shoes"},
    }
    example = example_from_row(row, "here", 5)
    assert list(example.fields) == ["brand", "color"] and example.grade == 3
    assert row_from_example(example) == row
    assert example_from_row(row_from_example(example), "here", 5) == example


@pytest.mark.parametrize(
    "changes",
    [{"grade": 3}, {"label": "S"}, {"grade": 3, "label": "S"}, {"label": "S", "gold": [None] * 5}, {"grade": 3, "label": None}],
)
def test_grade_and_label_are_the_verdict(changes):
    example = read(**changes)
    assert example.gold == (None, None, None, None, "L3")
    assert example.tags == {"grade": "L3"}


def test_grade_keeps_other_gold_and_a_given_tag():
    example = read(grade=1, gold=[None, None, "mismatch", None, None], tags={"grade": "L1", "quality": "bad"})
    assert example.gold == (None, None, "mismatch", None, "L1") and example.tags == {"grade": "L1", "quality": "bad"}


def test_integer_ids_and_nulls():
    example = read(example_id=12, query_id=0, fields={"brand": "Acme", "color": None}, tags=None, gold=None)
    assert (example.example_id, example.query_id, example.fields, example.tags) == ("12", "0", {"brand": "Acme"}, {})


def test_labels_take_the_spelling_of_the_options():
    row = {**ROW, "gold": [None, "Any Text", "Related", "UNCLEAR", "l2"]}
    assert example_from_row(row, "here", 5, OPTIONS).gold == (None, "Any Text", "related", "unclear", "L2")
    with pytest.raises(ValueError, match=r"here: entry 3 of 'gold' is 'relatd': step 3 allows match, related, mismatch"):
        example_from_row({**ROW, "gold": [None, None, "relatd", None, None]}, "here", 5, OPTIONS)


def test_other_schemas_have_other_verdicts():
    assert example_from_row({**ROW, "gold": ["x", "yes"]}, "here", 2).gold == ("x", "yes")


@pytest.mark.parametrize("key", ROW)
def test_a_missing_key_is_named(key):
    row = {name: value for name, value in ROW.items() if name != key}
    with pytest.raises(
        ValueError, match=rf"data.jsonl, line 7: '{key}' is missing: a row needs example_id, query_id, query, title"
    ):
        example_from_row(row, "data.jsonl, line 7", 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feilds": {}}, "unknown key 'feilds': did you mean 'fields'"),
        ({"price": "3"}, "unknown key 'price': product fields go into 'fields'"),
        ({"query": ""}, "'query' is \"\": write a non-empty string"),
        ({"title": None}, "'title' is null"),
        ({"title": 5}, "'title' is 5"),
        ({"example_id": True}, "'example_id' is true"),
        ({"query_id": 1.5}, "'query_id' is 1.5"),
        ({"fields": ["Acme"]}, "'fields' is .*Acme.*: write an object of strings"),
        ({"fields": {"price": 3}}, "fields.price is 3: write it as a string"),
        ({"tags": {"domain": ["a"]}}, "tags.domain is"),
        ({"gold": ["match"]}, "'gold' has 1 entries: write a list of 5, one per step"),
        ({"gold": "L3"}, "'gold' is \"L3\": write a list of 5"),
        ({"truth": [None] * 6}, "'truth' has 6 entries: write a list of 5"),
        ({"gold": [None, None, 3, None, None]}, "entry 3 of 'gold' is 3: write a non-empty string or null"),
        ({"gold": [None] * 4 + ["L5"]}, "the verdict of 'gold' is 'L5': write L1, L2, L3, L4"),
        ({"gold": [None] * 4 + ["l3"]}, "the verdict of 'gold' is 'l3'"),
        ({"grade": 0}, "'grade' is 0: write 1, 2, 3 or 4"),
        ({"grade": "3"}, "'grade' is \"3\""),
        ({"grade": True}, "'grade' is true"),
        ({"label": "X"}, "'label' is \"X\": write one of E, S, C, I"),
        ({"label": ["E"]}, "'label' is"),
        ({"grade": 4, "label": "S"}, "grade 4 and label S disagree"),
        ({"grade": 4, "gold": [None] * 4 + ["L1"]}, "last entry of gold is 'L1' but grade or label is L4"),
    ],
)
def test_what_a_bad_row_is_told(changes, message):
    with pytest.raises(ValueError, match=f"data.jsonl, line 7: .*{message}|data.jsonl, line 7: {message}"):
        read(**changes)


def test_a_tag_may_not_name_another_grade():
    for tag, changes in (
        *((tag, {"grade": 4}) for tag in ("L1", "1.0", "I", "i", "l 3")),
        ("1", {"label": "E"}),
        ("l2", {"gold": [None] * 4 + ["L4"]}),
    ):
        with pytest.raises(ValueError, match=f"line 7: the tag grade is '{tag}' but the last entry of gold 'L4'"):
            read(tags={"grade": tag}, **changes)
    with pytest.raises(ValueError, match="the tag grade is 'No'"):
        example_from_row({**ROW, "gold": ["yes"], "tags": {"grade": "No"}}, "here", 1, [("yes", "no")])


def test_a_tag_grade_is_spelled_as_the_answer_it_names():
    for tag in ("4", "L4", "l4", " L4 ", "4.0", "E", ""):
        assert read(tags={"grade": tag}, grade=4).tags == {"grade": "L4"}
    assert read(tags={"grade": "3"}).tags == {"grade": "L3"} and read(tags={"grade": " "}).tags == {}
    yes_no = [("yes", "no")]
    assert example_from_row({**ROW, "gold": ["no"], "tags": {"grade": "NO"}}, "here", 1, yes_no).tags == {"grade": "no"}
    assert example_from_row({**ROW, "gold": ["free"], "tags": {"grade": "Free"}}, "here", 1).tags == {"grade": "free"}
    assert example_from_row({**ROW, "tags": {"grade": "E"}}, "here", 1, [("E", "S")]).tags == {"grade": "E"}


def test_a_tag_grade_that_names_no_grade_is_refused():
    for changes in ({"grade": 4}, {"gold": [None] * 4 + ["L4"]}, {}):
        for tag in ("irrelevant", "5", "L0", "4.5", "bad"):
            with pytest.raises(ValueError, match=rf"line 7: the tag grade is '{tag}', which is none of L1, .*or rename the tag"):
                read(tags={"grade": tag}, **changes)
    with pytest.raises(ValueError, match="the tag grade is 'bad', which is none of yes, no, L1"):
        example_from_row({**ROW, "tags": {"grade": "bad"}}, "here", 1, [("yes", "no")])
    with pytest.raises(ValueError, match="the tag grade is '4' but the last entry of gold 'no': keep one of them"):
        example_from_row({**ROW, "gold": ["no"], "tags": {"grade": "4"}}, "here", 1, [("yes", "no")])


def test_a_grade_may_stay_a_tag_where_the_last_step_answers_another_question():
    assert example_from_row({**ROW, "tags": {"grade": "4"}}, "here", 1, [("yes", "no")]).tags == {"grade": "L4"}


def test_a_grade_from_a_column_with_missing_values_is_taken_exactly():
    assert read(grade=4.0).grade == 4
    for grade in (3.5, float("nan"), 5.0, True):
        with pytest.raises(ValueError, match=r"line 7: 'grade' is .*: write 1, 2, 3 or 4"):
            read(grade=grade)
