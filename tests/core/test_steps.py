"""srpo.core.steps: the rules of the parser, one by one."""

from __future__ import annotations

import time

import pytest

from srpo.core.step_presets import PAPER
from srpo.core.steps import ParsedText, parse_response, same_answer

SCHEMA = PAPER
WORLD = [
    "1. Query intent: shoes/sneakers; color not red; waterproof yes\n",
    "2. Item: shoes/boots; color blue; material leather\n",
    "3. Category match: related\n",
    "4. Attribute match: color ok, waterproof unknown -> unclear\n",
    "5. Verdict: L2",
]
ANSWERS = (
    "shoes/sneakers; color not red; waterproof yes",
    "shoes/boots; color blue; material leather",
    "related",
    "unclear",
    "L2",
)


def spans(text: str, parsed: ParsedText) -> list[str]:
    return [text[a:b] for a, b in zip((0, *parsed.char_ends[:-1]), parsed.char_ends, strict=True)]


def test_a_world_response_parses() -> None:
    text = "".join(WORLD)
    parsed = SCHEMA.parse_text(text)
    assert parsed.answers == ANSWERS
    assert spans(text, parsed) == WORLD
    assert parsed.problems == frozenset()


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda line: line.replace(" ", "   "),
        lambda line: "\n\t " + line.replace("\n", " \n\n"),
        lambda line: line.replace("\n", "\r\n"),
        lambda line: line.upper(),
        lambda line: line[3:],
        lambda line: "- " + line[3:],
        lambda line: "Step " + line.replace(". ", " – ", 1),
        lambda line: "S" + line.replace(". ", ": ", 1),
        lambda line: "### " + line,
        lambda line: "**" + line.replace(":", ":**", 1),
        lambda line: "**" + line.replace(":", "**:", 1),
        lambda line: line.replace(". ", ". **", 1).replace(":", "**", 1),
        lambda line: line.replace(":", " –", 1),
        lambda line: line.replace(":", " - ", 1),
        lambda line: line.replace(":", " ->", 1),
        lambda line: line.replace(":", "\n", 1),
        lambda line: line.replace(":", "\uff1a", 1),
    ],
)
def test_other_ways_to_write_it_parse_alike(rewrite) -> None:
    text = "".join(rewrite(line) for line in WORLD)
    parsed = SCHEMA.parse_text(text)
    assert tuple(a and a.casefold() for a in parsed.answers) == tuple(a.casefold() for a in ANSWERS)
    assert parsed.problems == frozenset()
    assert "".join(spans(text, parsed)) == text


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("color ok -> match", "match"),
        ("color ok -> conflict -> unclear", "unclear"),
        ("color conflict -> unclear (no conflict in size)", "unclear"),
        ("-> **Conflict**.", "conflict"),
        ("color ok => match", "match"),
        ("no arrow, match first, conflict last", "conflict"),
        ("an arrow -> to nothing, unclear", "unclear"),
        ("mismatches everywhere", None),
        ("", None),
    ],
)
def test_the_attribute_answer_is_where_the_last_arrow_points(body: str, answer: str | None) -> None:
    assert SCHEMA.parse_text(f"4. Attribute match: {body}\n5. Verdict: L1").answers[3] == answer


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("L3", "L3"),
        ("l3.", "L3"),
        ("**L4 - Excellent**", "L4"),
        ("4 - Excellent", "L4"),
        ("2 – partial mismatch", "L2"),
        ("1-Irrelevant", "L1"),
        ("L1? no, L3", "L3"),
        ("because ...\n\nRelevance level: L2\nThank you.", "L2"),
        ("L5", None),
        ("XL3", None),
        ("4 - 6 people", None),
        ("excellent", None),
    ],
)
def test_the_verdict_forms(body: str, answer: str | None) -> None:
    assert SCHEMA.parse_text(f"5. Verdict: {body}").answers[4] == answer


def test_a_missing_step_has_an_empty_span_and_no_answer() -> None:
    text = "".join([WORLD[0], WORLD[2], WORLD[4]])
    parsed = SCHEMA.parse_text(text)
    assert spans(text, parsed) == [WORLD[0], "", WORLD[2], "", WORLD[4]]
    assert parsed.answers == (ANSWERS[0], None, ANSWERS[2], None, ANSWERS[4])
    assert parsed.found == (True, False, True, False, True)
    assert parsed.problems == {"missing"}


def test_text_before_the_first_header_belongs_to_step_1() -> None:
    text = "Well.\n" + "".join(WORLD)
    assert spans(text, SCHEMA.parse_text(text)) == ["Well.\n" + WORLD[0], *WORLD[1:]]
    assert SCHEMA.parse_text(text).answers == ANSWERS
    text = "Well.\n" + WORLD[2]
    assert spans(text, SCHEMA.parse_text(text)) == ["Well.\n", "", WORLD[2], "", ""]
    assert spans("no headers", SCHEMA.parse_text("no headers")) == ["no headers", "", "", "", ""]


def test_text_after_the_verdict_belongs_to_the_last_step() -> None:
    text = "".join(WORLD) + "\n\nI hope this helps.\n"
    parsed = SCHEMA.parse_text(text)
    assert spans(text, parsed)[4] == WORLD[4] + "\n\nI hope this helps.\n"
    assert parsed.answers == ANSWERS


@pytest.mark.parametrize("j", range(5))
def test_a_truncated_response_keeps_the_steps_before_the_cut(j: int) -> None:
    before = "".join(WORLD[:j])
    text = before + WORLD[j][:-2]
    parsed = SCHEMA.parse_text(text)
    assert spans(text, parsed) == [*WORLD[:j], WORLD[j][:-2], *[""] * (4 - j)]
    assert parsed.answers[:j] == ANSWERS[:j]
    assert parsed.answers[j + 1 :] == (None,) * (4 - j)
    half = before + WORLD[j][: WORLD[j].index(":") - 1]  # an incomplete header is text of the step before it
    assert spans(half, SCHEMA.parse_text(half))[max(j - 1, 0)] == (WORLD[j - 1] if j else "") + half[len(before) :]


def test_the_end_of_the_text_may_end_a_header() -> None:
    parsed = SCHEMA.parse_text(WORLD[0] + WORLD[1] + "3. Category match")
    assert parsed.found == (True, True, True, False, False)
    assert parsed.answers[:3] == (*ANSWERS[:2], None)
    assert parsed.problems == {"missing", "unanswered"}


def test_the_first_of_duplicates_wins() -> None:
    again = ["1. Query intent: hats\n", "3. Category match: match\n"]
    text = "".join([WORLD[0], again[0], *WORLD[1:3], again[1], *WORLD[3:], "\n5. Verdict: L4", "\n2. Item: x"])
    parsed = SCHEMA.parse_text(text)
    assert parsed.answers == ANSWERS
    assert parsed.problems == {"duplicate"}
    assert spans(text, parsed)[0] == WORLD[0] + again[0]
    assert spans(text, parsed)[2] == WORLD[2] + again[1]


def test_a_repeated_header_is_read_where_the_first_says_nothing() -> None:
    text = "5. Judgment Reason: the item is a boot.\nVerdict: L3\nVerdict: L1"
    assert SCHEMA.parse_text(text).answers[4] == "L3"


@pytest.mark.parametrize(
    ("order", "adopted", "problems"),
    [
        ("13245", "1245", {"out_of_order", "missing"}),  # 3 came before its predecessor
        ("132345", "12345", {"out_of_order"}),  # and comes once more, in order
        ("51234", "1234", {"out_of_order", "missing"}),  # a stray verdict hides nothing
        ("23451", "2345", {"out_of_order", "missing"}),
        ("54321", "1", {"out_of_order", "missing"}),
        ("1234512345", "12345", {"duplicate"}),
        ("112345", "12345", {"duplicate"}),
        ("4512345", "12345", {"out_of_order"}),
        ("35124", "124", {"out_of_order", "missing"}),
    ],
)
def test_headers_are_adopted_in_order(order: str, adopted: str, problems: set[str]) -> None:
    lines = [WORLD[int(c) - 1].rstrip("\n") + f" #{i}\n" for i, c in enumerate(order)]
    text = "".join(lines)
    parsed = SCHEMA.parse_text(text)
    assert "".join(str(j + 1) for j in range(5) if parsed.found[j]) == adopted
    assert parsed.problems - {"unanswered"} == problems
    assert "".join(spans(text, parsed)) == text


def test_of_equal_chains_the_first_headers_win() -> None:
    text = "1. Query intent: a\n1. Query intent: b\n2. Item: c\n2. Item: d\n"
    parsed = SCHEMA.parse_text(text)
    assert parsed.answers[:2] == ("a", "c")
    assert parsed.char_ends[0] == text.index("2. Item: c")


@pytest.mark.parametrize(
    "line",
    ["Items differ: a", "item_id: 7", "Item-level facts", "Query: x", "Category: match", "The verdict: L4", "Attributes: a"],
)
def test_prose_is_no_header(line: str) -> None:
    assert SCHEMA.parse_text(f"{line}\n").found == (False,) * 5


@pytest.mark.parametrize(
    "text",
    [
        "->" * 20000,
        "*" * 20000,
        " " * 30000,
        "\n" * 30000,
        "1. item" * 5000,
        "\n1. Item: x" * 4000,
        "1. query" + " intent" * 5000,
        "4. Attribute match: " + "->" * 10000,
        "4. Attribute match: " + "-> match " * 5000,
        "5. Verdict: 4" + " " * 20000,
    ],
    ids=range(10),
)
def test_long_degenerate_text_is_parsed_in_linear_time(text: str) -> None:
    start = time.process_time()
    SCHEMA.parse_text(text)
    assert time.process_time() - start < 2.0  # measured: below 0.05 s


class CharTokenizer:
    """One token per character."""

    all_special_ids = (0,)

    def decode(self, ids: list[int]) -> str:
        return "".join("<eos>" if i == 0 else chr(i) for i in ids)


def test_trailing_special_tokens_belong_to_the_last_step_there_is() -> None:
    text = "".join(WORLD)
    parsed = parse_response(SCHEMA, CharTokenizer(), [*map(ord, text), 0, 0])
    assert parsed.text == text
    assert parsed.step_ends == (*SCHEMA.parse_text(text).char_ends[:4], len(text) + 2)
    cut = parse_response(SCHEMA, CharTokenizer(), [*map(ord, WORLD[0] + WORLD[1]), 0])
    assert cut.step_ends == (len(WORLD[0]), *(4 * [len(WORLD[0] + WORLD[1]) + 1]))
    assert parse_response(SCHEMA, CharTokenizer(), [0]).step_ends == (1, 1, 1, 1, 1)
    assert parse_response(SCHEMA, CharTokenizer(), []).step_ends == (0, 0, 0, 0, 0)


def test_a_stop_token_that_is_not_special_is_no_text() -> None:
    text, stop = "".join(WORLD), ord("|")
    ids = [*map(ord, text), stop]
    parsed = parse_response(SCHEMA, CharTokenizer(), ids, (stop, 5))
    assert parsed == parse_response(SCHEMA, CharTokenizer(), [*ids[:-1], 0])
    assert parsed.text == text and parsed.step_ends[-1] == len(ids)
    assert parse_response(SCHEMA, CharTokenizer(), [ord("a"), stop, ord("b")], (stop,)).text == "a|b"


def test_a_token_that_straddles_a_boundary_belongs_to_the_earlier_step() -> None:
    pieces = ["1. Query intent:", " a", "\n2. It", "em: b", "\n", "3. Category match: match\n4"]

    class Words:
        def decode(self, ids: list[int]) -> str:
            return "".join(pieces[i] for i in ids)

    parsed = parse_response(SCHEMA, Words(), range(6))
    assert parsed.step_ends == (3, 5, 6, 6, 6)
    assert parsed.answers[:3] == ("a", "b", "match")


def test_answers_are_compared_as_sets_of_facts() -> None:
    assert same_answer("Shoes/boots;  color RED ; size 4.", "size 4; shoes/boots; color red; color red")
    assert not same_answer("color red", "color red; size 4")
    assert not same_answer(None, None)
    assert not same_answer("a", None)
