"""Tokenizers round-trip any text, and a phrase is one token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo.data.examples import Example
from srpo.data.prompts import PromptForm
from srpo.data.tokenizer import encode, encode_prompts, load_tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["red boots for rain", "blue boots"] * 20, 320, ["\n2. Item: "])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(list(encode(TOKENIZER, text))) == text


def test_a_phrase_is_one_token():
    assert len(encode(TOKENIZER, "\n2. Item: ")) == 1


def test_prompts_of_examples():
    pairs = [Example("1", "1", "boots", "red boots"), Example("2", "2", "rain", "blue boots")]
    prompts = encode_prompts(TOKENIZER, pairs, PromptForm("{query} | {title}\n"))
    assert prompts == [encode(TOKENIZER, "boots | red boots\n"), encode(TOKENIZER, "rain | blue boots\n")]


def test_saved_and_loaded(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert encode(loaded, "red boots\n2. Item: x") == encode(TOKENIZER, "red boots\n2. Item: x")
    assert loaded.eos_token_id == TOKENIZER.eos_token_id


def test_a_folder_without_one_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"policy\.path"):
        load_tokenizer(tmp_path)
