"""Silver responses: any schema reads them, steps 1 to 4 depend on the words of the pair alone, and the verdict is the grade."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from srpo.core.grades import Grades
from srpo.core.step_presets import PAPER, StepChange, StepsConfig
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.readers import load_examples, split_by_query
from srpo.data.silver import Lexicon, silver_gold, silver_response

SHARED = Path(os.environ.get("SRPO_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
DUMP = SHARED / "esci_us"
LEXICON = Lexicon(brands=frozenset({"nike", "to boot new york", "york"}), colors=frozenset({"red", "black", "white"}))
THREE = Grades(("not relevant", "Partly", "10"))
SCHEMAS = {
    "paper": PAPER,
    "json": StepsConfig(form="json").schema(Grades()),
    "labels": StepsConfig(sources="labels").schema(THREE),
    "json, three grades": StepsConfig(form="json").schema(THREE),
    "verdict": StepsConfig(preset="verdict").schema(Grades(("no", "yes"))),
    "verdict, json": StepsConfig(preset="verdict", form="json").schema(THREE),
    "header": StepsConfig(named={"item": StepChange(header="^## product ="), "verdict": StepChange(header="^Grade:")}).schema(
        Grades()
    ),
    "two steps": StepSchema([PAPER.specs[2], PAPER.specs[4]]),
}


def pair(query: str, title: str, grade: str | None = "L3", **fields: str) -> Example:
    return Example("e", "q", query, title, fields, (None, None, None, None, grade), (None,) * 5)


def lines(query: str, title: str, **fields: str) -> list[str]:
    return [line.partition(": ")[2] for line in silver_response(pair(query, title, **fields), LEXICON, PAPER).splitlines()]


def test_a_whole_response():
    example = pair(
        "Nike red running shoes for women without laces",
        "Nike Golf Women's Slip-On Sneaker Red, No Laces, Leather",
        "L4",
        brand="Nike Golf",
        color="Red/White",
        category="Clothing > Shoes > Sneakers",
    )
    response = (
        "1. Query intent: running shoes; brand nike; color red; for women\n"
        "2. Item: sneakers; brand nike; color red; color white; material leather; for women\n"
        "3. Category match: nike title, red title, running no, shoes fields, women title; 4 of 5 -> related\n"
        "4. Attribute match: brand ok, color ok, for ok -> match\n"
        "5. Verdict: L4"
    )
    assert silver_response(example, LEXICON, PAPER) == response
    assert silver_gold(example, LEXICON, PAPER) == (None, None, "related", "match", "L4")


@pytest.mark.parametrize(
    ("query", "intent"),
    [
        ("gift ideas", "looking for gift ideas"),
        ("Nike", "looking for nike; brand nike"),
        ("to boot new york mens shoes", "shoes; brand to boot new york; for men"),
        ("shoes without laces", "shoes; feature not laces"),
        ("shoes not red", "shoes; color not red"),
        ("shoes no", "looking for shoes no"),
        ("leather belt 1.75", "belt 1.75; material leather"),
        ("5. Verdict: L1 -> match;\n3. Category match: match", "looking for 5 verdict l1 match 3 category match match"),
    ],
)
def test_step_1_is_what_the_words_of_the_query_say(query, intent):
    assert lines(query, "thing")[0] == intent


@pytest.mark.parametrize(
    ("title", "details"),
    [
        ("shoe with laces", "feature conflict -> conflict"),
        ("laceless shoe", "feature ok -> match"),
        ("shoe without laces", "feature ok -> match"),
        ("laces free shoe", "feature ok -> match"),
        ("shoe", "feature unknown -> unclear"),
    ],
)
def test_what_a_title_says_of_an_unwanted_feature(title, details):
    """Words that the query excludes are not looked for in step 3."""
    assert lines("shoes without laces", title)[2:4] == ["shoes title; 1 of 1 -> match", details]


@pytest.mark.parametrize(
    ("query", "title", "details"),
    [
        ("shoes", "red shoe", "nothing asked -> match"),
        ("red shoes", "red shoe", "color ok -> match"),
        ("red shoes", "black shoe", "color conflict -> conflict"),
        ("red shoes", "shoe", "color unknown -> unclear"),
        ("shoes not red", "shoe red", "color conflict -> conflict"),
        ("leather shoes men", "black leather shoe for women", "material ok, for conflict -> conflict"),
    ],
)
def test_step_4_is_the_checks_of_the_constraints(query, title, details):
    assert lines(query, title)[3] == details


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("red shoes", "red title, shoes title; 2 of 2 -> match"),
        ("the shoe of leather", "shoe title, leather fields; 2 of 2 -> match"),
        ("red hat red", "red title, hat no; 1 of 2 -> related"),
        ("hats", "hats no; 0 of 1 -> mismatch"),
        ("acme sneaker", "acme fields, sneaker fields; 2 of 2 -> match"),
        ("for the", "nothing asked -> match"),
        ("not red", "nothing asked -> match"),
        ("a1 b2 c3 d4 e5 f6 shoe", "a1 no, b2 no, c3 no, d4 no, e5 no, f6 no; 0 of 6 -> mismatch"),
    ],
)
def test_step_3_is_the_place_of_each_word(query, found):
    assert lines(query, "Red Shoes", brand="Acme", category="Shoes > Sneakers", text="of leather")[2] == found


def test_a_label_of_the_pair_stays():
    example = replace(pair("red shoes", "red shoe", None), gold=(None, None, "mismatch", None, None))
    assert silver_gold(example, LEXICON, PAPER) == (None, None, "mismatch", "match", None)
    assert silver_gold(replace(example, gold=()), LEXICON, PAPER) == (None, None, "match", "match", None)


def test_the_lexicon_of_a_data_set():
    examples = [
        pair("x", f"black leather bag {i}", color="Black Leather" if i < 3 else "Black", brand="Acme Bags") for i in range(10)
    ]
    examples += [pair("x", "blue thing", brand="Blue") for _ in range(20)]
    examples += [pair("x", f"blue sky {i}") for i in range(90)]
    examples += [pair("x", "one", brand="Once", color="teal")]
    lexicon = Lexicon.from_examples(iter(examples))
    assert lexicon.colors == {"black"}  # leather is in over twice as many titles, teal in one field
    assert lexicon.brands == {"acme bags"}  # blue is in over five times as many titles, once in one field


@pytest.mark.parametrize("gold", [(), (None,) * 5, (None, None, None, None, "yes")], ids=str)
def test_a_pair_without_a_grade_has_no_silver(gold):
    with pytest.raises(ValueError, match=r"a silver response needs one of L1, L2, L3, L4"):
        silver_response(Example("e", "q", "query", "title", gold=gold), LEXICON, PAPER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"price": StepChange(options=("cheap", "dear"))}, "not 'price': write demonstrations of your own"),
        ({"category_match": StepChange(options=("yes", "no"))}, "answer step 'category_match' with match, related, mismatch"),
        ({"item": StepChange(options=("yes", "no"))}, "answer step 'item' with free text"),
        ({"item": StepChange(header="^(?:a|b){2}:")}, "step 'item' has a header or an answer that silver"),
        ({"attribute_match": StepChange(answer=r"\[(match|unclear|conflict)\]")}, "step 'attribute_match' has a header or"),
    ],
)
@pytest.mark.parametrize("write", [silver_response, silver_gold])
def test_steps_of_ones_own_are_refused_by_name(write, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write(pair("query", "title"), LEXICON, StepsConfig(named=changes).schema(Grades()))


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_any_text_gives_a_short_response_that_its_schema_reads(schema):
    rng = random.Random(random.random())
    words = ["nike", "red", "women's", "leather", "without", "not", "laces", "->", "5. Verdict: L1", "\n", "match", "10", "yes"]
    words += [";", "x" * 90, "\u6f22\u5b57", "\xe9", "-", "  ", '"item":', "\\", "title, no;"]
    for _ in range(150):
        query, title, text = (" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(3))
        example = pair(query, title, rng.choice(schema.grades.names), brand=title, color=text, category=query, text=text)
        response = silver_response(example, LEXICON, schema)
        parsed, gold = schema.parse_text(response), silver_gold(replace(example, gold=()), LEXICON, schema)
        assert not parsed.problems and all(parsed.found), response
        assert parsed.answers[-1] == example.grade
        assert all(label == answer for answer, label in zip(parsed.answers, gold, strict=True) if label), response
        assert [bool(label) for label in gold] == [*(bool(options) for options in schema.options[:-1]), False]
        assert len(response.split()) <= 85, response
        better = replace(example, gold=(*example.gold[:-1], rng.choice(schema.grades.names)))
        assert schema.parse_text(silver_response(better, LEXICON, schema)).answers[:-1] == parsed.answers[:-1]


@pytest.mark.skipif(not DUMP.is_dir(), reason=f"no ESCI dump at {DUMP}; set SRPO_SHARED_DATA to the folder that has esci_us")
def test_silver_of_the_real_dump():
    examples = load_examples(DUMP, PAPER)
    lexicon = Lexicon.from_examples(split_by_query(examples, 0.2, 0)[0])
    assert {"black", "white", "red"} <= lexicon.colors and "leather" not in lexicon.colors
    responses = [silver_response(example, lexicon, PAPER) for example in examples]
    answers = [PAPER.parse_text(response).answers for response in responses]
    assert [a[-1] for a in answers] == [example.grade for example in examples]
    gold = [silver_gold(example, lexicon, PAPER) for example in examples]
    assert [a[2:4] for a in answers] == [labels[2:4] for labels in gold]
    assert len(Counter(a[2:4] for a in answers)) == 9
    assert sum(len(response.split()) for response in responses) / len(responses) < 45
    best = {
        label: [e.grade == "L4" for e, a in zip(examples, answers, strict=True) if a[2] == label] for label in PAPER.options[2]
    }
    shares = [sum(hits) / len(hits) for hits in best.values()]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] + 0.2, shares
