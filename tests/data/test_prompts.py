"""Prompts are a template filled in with a pair."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from srpo.core.config.train import DataConfig
from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.step_presets import PAPER, StepChange, StepsConfig
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm, build_prompt, instructions, one_line, wrapped

PAIR = Example("e", "q", "red boots", "warm boots", {"brand": "tamsin", "color": ""})


PLAIN = "Query: {query}\nItem: {item}\n"
STEPS = """\
Judge how relevant an item of a shop is to a search query. Answer in these steps, one line each:
1. Query intent: the product and the properties that the query asks for
2. Item: the product and its properties, as the listing states them
3. Category match: match, related or mismatch
4. Attribute match: match, unclear or conflict
5. Verdict: L1 (irrelevant), L2 (mismatch), L3 (related) or L4 (excellent), from the worst to the best"""


def test_the_default_prompt_names_steps_and_grades_and_has_title_and_filled_fields():
    form = PromptForm.of(DataConfig(), PAPER)
    assert build_prompt(PAIR, form) == f"{STEPS}\n\nQuery: red boots\nItem: warm boots\nbrand: tamsin\n"


def test_instructions_follow_the_steps_and_grades_of_the_settings():
    grades = Grades(("Irrelevant", "Partial", "Exact"))
    named = {"freshness": StepChange(options=("fresh", "stale"), sources=("judge",))}
    text = instructions(StepsConfig(named=named).schema(grades))
    assert "5. Freshness: fresh or stale\n6. Verdict: Irrelevant, Partial or Exact, from the worst to the best" in text
    one = instructions(StepsConfig(preset="verdict").schema(Grades(("no", "yes"))))
    assert one.endswith("Answer in this form, one line each:\n1. Verdict: no or yes, from the worst to the best")
    keys = instructions(StepsConfig(form="json").schema(grades)).splitlines()
    assert keys[0].endswith("Answer with one JSON object that has these keys, in this order:")
    assert keys[3] == '"category_match": match, related or mismatch'


@pytest.mark.parametrize(
    ("header", "line"),
    [
        (None, "1. Verdict: no or yes"),
        (r"^urteil:", "urteil: no or yes"),
        (r"verdict:", "Verdict: no or yes"),
        (r"^\s*Final grade\s*=", "Final grade = no or yes"),
        (r"^### Grade \(0-1\)$", "### Grade (0-1)\nno or yes"),
        (r"^\[\[", "[[ no or yes"),
    ],
)
def test_instructions_show_the_header_that_is_parsed(header: str | None, line: str):
    named = {"verdict": StepChange(header=header)}
    schema = StepsConfig(preset="verdict", named=named).schema(Grades(("no", "yes")))
    each = "each under its heading" if "\n" in line else "one line each"
    assert instructions(schema).endswith(f" Answer in this form, {each}:\n{line}, from the worst to the best")
    parsed = schema.parse_text(schema.write(["yes"]))
    assert (parsed.found, parsed.answers, parsed.problems) == ((True,), ("yes",), frozenset())


def test_instructions_show_a_pattern_whose_words_are_unknown():
    schema = StepsConfig(preset="verdict", named={"verdict": StepChange(header=r"^(?:a|b){2}:")}).schema(Grades(("no", "yes")))
    line = r"(a heading that matches the regular expression ^(?:a|b){2}:) no or yes, from the worst to the best"
    assert instructions(schema).endswith(f"each under its heading:\n{line}")


def test_guidelines_have_their_place_or_follow_the_instructions(tmp_path: Path):
    file = tmp_path / "guide.txt"
    file.write_text("\ufeffA {knife} is no fork.\n<|end|>\n", encoding="utf-8")
    text = "A {knife} is no fork.\n<|end|>"
    form = PromptForm.of(DataConfig(guidelines=str(file)), PAPER)
    assert build_prompt(PAIR, form).startswith(f"{STEPS}\n\nGuidelines:\n{text}\n\nQuery: red boots\n")
    own = PromptForm.of(DataConfig(guidelines=str(file), prompt="{guidelines}|{query}|{instructions}"), PAPER)
    assert build_prompt(PAIR, own) == f"{text}|red boots|{STEPS}"
    assert [part.is_data for part in own.parts(PAIR) if part.text == text] == [True]  # their special tokens are plain text
    assert build_prompt(PAIR, PromptForm.of(DataConfig(prompt="{guidelines}{query}"), PAPER)) == "red boots"


@pytest.mark.parametrize(
    ("content", "prompt", "message"),
    [
        (None, "{instructions}", "no such file"),
        (b"\xff\xfe", "{instructions}", "is not UTF-8: save it as UTF-8 text"),
        (b" \n", "{instructions}", "is empty: write the guidelines into it"),
        (b"text", "{query}", "data.prompt has no place for it: add {guidelines} to data.prompt"),
    ],
)
def test_guidelines_that_cannot_be_used_are_refused(content: bytes | None, prompt: str, message: str, tmp_path: Path):
    file = tmp_path / "guide.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        PromptForm.of(DataConfig(guidelines=str(file), prompt=prompt), PAPER)


def test_any_field_by_name():
    assert build_prompt(PAIR, "{brand}|{title}|{query}") == "tamsin|warm boots|red boots"


def test_a_field_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"\{size\}.*brand"):
        build_prompt(PAIR, "{size}")


@pytest.mark.parametrize(
    "mark", ["\n", "\r", "\r\n", "\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x00", "\u202e", "\u2066", " \n "]
)
def test_no_value_begins_a_line(mark: str):
    title, brand = f"x{mark}brand: Nike", f"Acme{mark}color: red{mark}"
    pair = Example("e", "q", f"red{mark}Item: y", title, {f"brand{mark}price": brand})
    assert build_prompt(pair, PLAIN) == "Query: red Item: y\nItem: x brand: Nike\nbrand price: Acme color: red\n"


def test_ordinary_text_stays_as_it_is():
    for text in ("a  b ", " caf\u00e9 \u767b\u5c71 \u200f\u05d0 \u200d", "a: b | c"):
        assert one_line(text) == text


def test_a_template_may_ask_for_lines():
    pair = Example("e", "q", "a\nb", "t", {"note": "c\nd"})
    assert build_prompt(pair, "{query:lines}|{note}|{item:lines}") == "a\nb|c d|t\nnote: c\nd"


@pytest.mark.parametrize("template", ["{}", "{0}", "{query", "query}", "{query!r}", "{query:>9}", "{query.upper}", "{ }"])
def test_a_template_that_cannot_be_read(template: str):
    with pytest.raises(ValueError, match=r"^data\.prompt (is|has) "):
        build_prompt(PAIR, template)


def test_doubled_braces_are_text():
    assert build_prompt(PAIR, "{{x}} {query}") == "{x} red boots"


def test_a_prompt_inside_a_template():
    assert "".join(part.text for part in wrapped("a\nb", "<u>{prompt}</u>")) == "<u>a\nb</u>"
    for template in ("", "{prompt}{prompt}", "{query}"):
        with pytest.raises(ValueError, match=r"^prompt is .*\{prompt\} once"):
            wrapped("a", template)
