"""Prompts are a template filled in with a pair."""

from __future__ import annotations

import pytest

from srpo.core.config.train import DataConfig
from srpo.data.examples import Example
from srpo.data.prompts import build_prompt, one_line, wrapped

PAIR = Example("e", "q", "red boots", "warm boots", {"brand": "tamsin", "color": ""})


def test_default_template_has_title_and_filled_fields():
    assert build_prompt(PAIR, DataConfig().prompt) == "Query: red boots\nItem: warm boots\nbrand: tamsin\n"


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
    assert build_prompt(pair, DataConfig().prompt) == "Query: red Item: y\nItem: x brand: Nike\nbrand price: Acme color: red\n"


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
