"""Silver responses: they parse, agree with their grade, and use the words of the pair."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.data.readers import load_examples, split_by_query
from srpo.data.silver import Lexicon, silver_response
from srpo.data.world import GRADE_TABLE

SHARED = Path(os.environ.get("SRPO_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
DUMP = SHARED / "esci_us"
SCHEMA = PAPER
LEXICON = Lexicon(
    brands=frozenset({"nike", "to boot new york", "york"}),
    colors=frozenset({"red", "black", "white"}),
    categories={"q": "sneakers"},
)


def pair(query: str, title: str, grade: int, **fields: str) -> Example:
    return Example("e", "q", query, title, fields, (None, None, None, None, f"L{grade}"), (None,) * 5)


def answers(example: Example, lexicon: Lexicon = LEXICON) -> tuple[str | None, ...]:
    return SCHEMA.parse_text(silver_response(example, lexicon)).answers


def coherent(example: Example, lexicon: Lexicon) -> str:
    """The silver response; asserts that it parses, agrees with its grade by the rule table and is short."""
    response = silver_response(example, lexicon)
    parsed = SCHEMA.parse_text(response)
    assert not parsed.problems and all(parsed.found), response
    assert parsed.answers[4] == example.gold[4]
    assert GRADE_TABLE[str(parsed.answers[2]), str(parsed.answers[3])] == example.gold[4], response
    assert len(response.split()) <= 65, response
    return response


def test_a_whole_response():
    example = pair(
        "Nike red running shoes for women without laces",
        "Nike Golf Women's Slip-On Sneaker Red, No Laces, Leather",
        4,
        brand="Nike Golf",
        color="Red/White",
        category="Clothing > Shoes > Sneakers",
    )
    assert silver_response(example, LEXICON) == (
        "1. Query intent: running shoes; brand nike; color red; for women\n"
        "2. Item: sneakers; brand nike; color red; color white; material leather; for women\n"
        "3. Category match: match\n"
        "4. Attribute match: brand ok, color ok, for ok -> match\n"
        "5. Verdict: L4"
    )


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
    assert answers(pair(query, "thing", 3))[0] == intent


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
    """If the grade is the one that the evidence leads to, S3 and S4 are the evidence."""
    category = "related" if "conflict" in details else "match"
    grade = int(GRADE_TABLE[category, details.split("-> ")[1]][1])
    lines = silver_response(pair("shoes without laces", title, grade), LEXICON).splitlines()
    assert lines[3] == f"4. Attribute match: {details}"


@pytest.mark.parametrize(
    ("grade", "title", "chain"),
    [
        (4, "red shoe", ("match", "match")),
        (4, "black hat", ("match", "match")),  # the grade overrules the words
        (3, "shoe", ("match", "unclear")),
        (3, "red hat", ("related", "match")),
        (2, "black shoe", ("match", "conflict")),
        (2, "hat", ("related", "unclear")),
        (1, "black hat", ("mismatch", "conflict")),
        (1, "red hat", ("mismatch", "match")),
        (1, "hat", ("mismatch", "unclear")),
    ],
)
def test_the_chain_is_the_row_of_the_table_nearest_to_the_words(grade, title, chain):
    example = pair("red shoes", title, grade)
    assert answers(example)[2:4] == chain
    coherent(example, LEXICON)


def test_the_usual_category_of_a_query_is_a_match():
    assert answers(pair("red shoes", "AirMax red", 3, category="Shoes > Sneakers"))[2:4] == ("match", "unclear")
    assert answers(pair("red shoes", "AirMax red", 3, category="Shoes > Boots"), Lexicon(colors=frozenset({"red"})))[2] == "match"
    assert answers(pair("red shoes", "AirMax red", 3, category="Toys > Planes"))[2:4] == ("related", "match")


def test_the_lexicon_of_a_data_set():
    examples = [
        pair(
            "x", f"black leather bag {i}", 4, color="Black Leather" if i < 3 else "Black", brand="Acme Bags", category="A > Totes"
        )
        for i in range(10)
    ]
    examples += [pair("x", "blue thing", 1, brand="Blue", category="A > Other") for _ in range(20)]
    examples += [pair("x", f"blue sky {i}", 4, category="A > Skies") for i in range(90)]
    examples += [pair("x", "one", 2, brand="Once", color="teal")]
    lexicon = Lexicon.from_examples(iter(examples))
    assert lexicon.colors == {"black"}  # leather is in over twice as many titles, teal in one field
    assert lexicon.brands == {"acme bags"}  # blue is in over five times as many titles, once in one field
    assert lexicon.categories == {"q": "skies"}


def test_held_out_grades_do_not_reach_the_lexicon():
    assert Lexicon.from_examples([pair("x", "t", 3, category="A > B")]).categories == {}


@pytest.mark.parametrize("gold", [(), (None,) * 5, ("L3",), (None, None, None, None, "yes"), (None, None, None, "L3")], ids=str)
def test_a_pair_without_a_grade_has_no_silver(gold):
    with pytest.raises(ValueError, match=r"needs five steps and a verdict L1 to L4"):
        silver_response(Example("e", "q", "query", "title", gold=gold), LEXICON)


@pytest.mark.parametrize("seed", range(3))
def test_any_text_gives_a_coherent_short_response(seed):
    rng = random.Random(seed)
    words = [
        "nike",
        "red",
        "women's",
        "leather",
        "without",
        "not",
        "laces",
        "->",
        "5. Verdict: L1",
        "\n",
        "match",
        ";",
        "x" * 90,
        "漢字",
        "é",
        "-",
        "  ",
    ]
    for _ in range(300):
        query, title, text = (" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(3))
        example = pair(query, title, rng.randint(1, 4), brand=title, color=text, category=query, text=text)
        assert coherent(example, LEXICON) == silver_response(example, LEXICON)


@pytest.mark.skipif(not DUMP.is_dir(), reason=f"no ESCI dump at {DUMP}; set SRPO_SHARED_DATA to the folder that has esci_us")
def test_silver_of_the_real_dump():
    examples = load_examples(DUMP, PAPER)
    lexicon = Lexicon.from_examples(split_by_query(examples, 0.2, 0)[0])
    assert {"black", "white", "red"} <= lexicon.colors and "leather" not in lexicon.colors
    responses = [coherent(example, lexicon) for example in examples]
    chains = Counter(SCHEMA.parse_text(response).answers[2:4] for response in responses)
    assert len(chains) == len(GRADE_TABLE)
    assert sum(len(response.split()) for response in responses) / len(responses) < 40
