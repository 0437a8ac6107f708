"""Validation of rows: the example of a good row, and the error of each kind of bad row."""

from __future__ import annotations

import re

import pytest

from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.step_presets import PAPER
from srpo.core.steps import StepSchema, StepSpec
from srpo.data.balance import balanced
from srpo.data.examples import Example
from srpo.data.prompts import prompt_parts
from srpo.data.rows import example_from_row, row_from_example
from srpo.data.strata import stratum
from srpo.rollout.engine import SamplingParams
from srpo.scores.tally import true_grades
from srpo.training.checks import check_prompt_lengths

ROW = {"example_id": "1", "query_id": "q", "query": "red shoes", "title": "Sneaker"}


def verdicts(*names: str, steps: int = 1) -> StepSchema:
    """Steps of free text, then a verdict with these options, from the worst to the best."""
    free = [StepSpec(f"s{j}", f"s{j}:") for j in range(1, steps)]
    return StepSchema([*free, StepSpec("verdict", "verdict:", options=names)], Grades(names))


def read(**changes) -> Example:
    return example_from_row({**ROW, **changes}, "data.jsonl, line 7", PAPER)


def test_the_least_row():
    assert read() == Example("1", "q", "red shoes", "Sneaker", {}, (None,) * 5, (None,) * 5, {})


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ({"example_id": "1"}, "example 1"),
        ({"query_id": "q", "item_id": 7}, "example q-7"),
        ({"item_id": 7}, "the pair in data.jsonl, line 7"),
        ({"query_id": "q"}, "the pair in data.jsonl, line 7"),
        ({}, "the pair in data.jsonl, line 7"),
    ],
)
def test_a_pair_with_a_made_id_is_shown_by_its_row(ids: dict[str, object], shown: str):
    pair = example_from_row({"query": "red shoes", "title": "Sneaker", **ids}, "data.jsonl, line 7", PAPER)
    assert pair.shown == shown
    again = example_from_row(row_from_example(pair), "copy.jsonl, line 1", PAPER)
    assert again == pair and repr(again) == repr(pair)  # the place is no part of the data
    messages = {
        f"{shown} has no grade": lambda: true_grades([pair], PAPER.grades),
        f"the prompt of {shown} has 3 tokens": lambda: check_prompt_lengths([(1,) * 3], [pair], SamplingParams(5), 6, 9),
        f"{shown} has no such field": lambda: prompt_parts(pair, "{size}"),
        f"{shown} has no tag 'domain'": lambda: stratum(pair, ["domain"]),
        f"{shown} has the grade None": lambda: balanced([pair], PAPER.grades, 0),
    }
    for message, check in messages.items():
        with pytest.raises(UserError, match=re.escape(message)):
            check()


def test_a_full_row_goes_both_ways():
    row = {
        **ROW,
        "fields": {"brand": "Acme", "color": "red"},
        "gold": [None, None, "match", "unclear", "L3"],
        "truth": ["shoes; color red", "sneaker", "match", "unclear", "L3"],
        "tags": {"domain": "shoes"},
    }
    example = example_from_row(row, "here", PAPER)
    assert list(example.fields) == ["brand", "color"] and example.grade == "L3"
    assert row_from_example(example) == row
    assert example_from_row(row_from_example(example), "here", PAPER) == example


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
    assert example_from_row(row, "here", PAPER).gold == (None, "Any Text", "related", "unclear", "L2")
    with pytest.raises(ValueError, match=r"here: entry 3 of 'gold' is 'relatd': step 3 allows match, related, mismatch"):
        example_from_row({**ROW, "gold": [None, None, "relatd", None, None]}, "here", PAPER)


def test_other_schemas_have_other_verdicts():
    assert example_from_row({**ROW, "gold": ["x", "Yes"]}, "here", verdicts("no", "yes", steps=2)).gold == ("x", "yes")


@pytest.mark.parametrize("key", ["query", "title"])
def test_a_missing_key_is_named(key):
    row = {name: value for name, value in ROW.items() if name != key}
    with pytest.raises(ValueError, match=rf"data.jsonl, line 7: '{key}' is missing: a row needs query and title"):
        example_from_row(row, "data.jsonl, line 7", PAPER)


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
        ({"gold": [None] * 4 + ["L5"]}, "entry 5 of 'gold' is 'L5': step 5 allows L1, L2, L3, L4"),
        ({"gold": [None] * 4 + ["excellent"]}, "entry 5 of 'gold' is 'excellent': step 5 allows L1, L2, L3, L4"),
        ({"grade": 0}, "'grade' is 0: the grades are L1, L2, L3, L4; give other spellings in grades.labels"),
        ({"grade": "5"}, "'grade' is \"5\": the grades are"),
        ({"grade": True}, "'grade' is true"),
        ({"label": "X"}, "'label' is \"X\": the grades are L1, L2, L3, L4; give other spellings in grades.labels"),
        ({"label": "L33"}, "'label' is \"L33\": .*; the nearest is 'l3'"),
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
        *((tag, {"grade": 4}) for tag in ("L1", "1.0", "I", "i", " l3 ")),
        ("1", {"label": "E"}),
        ("l2", {"gold": [None] * 4 + ["L4"]}),
    ):
        with pytest.raises(ValueError, match=f"line 7: the tag grade is '{tag.strip()}' but the last entry of gold 'L4'"):
            read(tags={"grade": tag}, **changes)
    with pytest.raises(ValueError, match="the tag grade is 'No' but the last entry of gold 'yes'"):
        example_from_row({**ROW, "gold": ["yes"], "tags": {"grade": "No"}}, "here", verdicts("no", "yes"))


def test_a_tag_grade_is_spelled_as_the_answer_it_names():
    for tag in ("4", "L4", "l4", " L4 ", "4.0", "E", ""):
        assert read(tags={"grade": tag}, grade=4).tags == {"grade": "L4"}
    assert read(tags={"grade": "3"}).tags == {"grade": "L3"} and read(tags={"grade": " "}).tags == {}
    no_yes = verdicts("no", "yes")
    assert example_from_row({**ROW, "gold": ["no"], "tags": {"grade": "NO"}}, "here", no_yes).tags == {"grade": "no"}
    assert example_from_row({**ROW, "gold": ["no"], "tags": {"grade": "1"}}, "here", no_yes).tags == {"grade": "no"}
    assert example_from_row({**ROW, "tags": {"grade": "E"}}, "here", verdicts("S", "E")).tags == {"grade": "E"}


def test_a_tag_grade_that_names_no_grade_is_refused():
    for changes in ({"grade": 4}, {"gold": [None] * 4 + ["L4"]}, {}):
        for tag in ("irrelevant", "5", "L0", "4.5", "bad", "l 3"):
            with pytest.raises(ValueError, match=rf"line 7: the tag grade is '{tag}': the grades are L1, .*or rename the tag"):
                read(tags={"grade": tag}, **changes)
    with pytest.raises(ValueError, match=r"the tag grade is 'bad': the grades are no, yes; .*or rename the tag"):
        example_from_row({**ROW, "tags": {"grade": "bad"}}, "here", verdicts("no", "yes"))
    with pytest.raises(ValueError, match="the tag grade is '2' but the last entry of gold 'no': keep one of them"):
        example_from_row({**ROW, "gold": ["no"], "tags": {"grade": "2"}}, "here", verdicts("no", "yes"))
    with pytest.raises(ValueError, match="the tag grade is '4': the grades are no, yes"):  # a grade of another scale
        example_from_row({**ROW, "gold": ["no"], "tags": {"grade": "4"}}, "here", verdicts("no", "yes"))


def test_a_grade_from_a_column_with_missing_values_is_taken_exactly():
    assert read(grade=4.0).grade == "L4"
    for grade in (3.5, float("nan"), 5.0, True):
        with pytest.raises(ValueError, match=r"line 7: 'grade' is .*: the grades are L1, L2, L3, L4"):
            read(grade=grade)
