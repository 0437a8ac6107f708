"""Prompts are a template filled in with a pair."""

from __future__ import annotations

import pytest

from srpo.core.config.train import DataConfig
from srpo.data.examples import Example
from srpo.data.prompts import build_prompt

PAIR = Example("e", "q", "red boots", "warm boots", {"brand": "tamsin", "color": ""})


def test_default_template_has_title_and_filled_fields():
    assert build_prompt(PAIR, DataConfig().prompt) == "Query: red boots\nItem: warm boots\nbrand: tamsin\n"


def test_any_field_by_name():
    assert build_prompt(PAIR, "{brand}|{title}|{query}") == "tamsin|warm boots|red boots"


def test_a_field_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"\{size\}.*brand"):
        build_prompt(PAIR, "{size}")
