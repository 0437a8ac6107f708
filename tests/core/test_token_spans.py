"""srpo.core.token_spans: character ends of tokens compared with a slow construction, for several kinds of decoder."""

from __future__ import annotations

import os.path
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from srpo.core.token_spans import Decoder, decode_with_ends

CORPUS = [
    "1. Query intent: shoes/sneakers; color not red; waterproof yes\n2. Item: shoes/boots; color blue\n",
    "Crème brûlée – 登山靴 防水，ñandú 👟👩‍👩‍👧 “quoted” L4 – Excellent",
]


def token_char_ends(tokenizer: Decoder, ids: Sequence[int]) -> list[int]:
    return decode_with_ends(tokenizer, ids)[1]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def symbol_id(tokenizer: Tokenizer, symbol: str) -> int:
    token_id = tokenizer.token_to_id(symbol)
    assert token_id is not None
    return token_id


def sentencepiece_like() -> Tokenizer:
    """SentencePiece style: the decoder strips the leading space of the first token only; byte fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokens = ["<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False))
    return tokenizer


def word_piece() -> Tokenizer:
    """WordPiece: the decoder joins tokens with spaces and cleans up punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    )
    return tokenizer


class Merging:
    """One token per code point; the decoder merges runs of spaces and composes letter + accent, so that tokens interact."""

    def decode(self, ids: list[int]) -> str:
        return re.sub(" +", " ", "".join(map(chr, ids))).replace("e\u0301", "\u00e9")


def slow_ends(tokenizer: Any, ids: list[int]) -> list[int]:
    """For each number of tokens, the length of the common prefix of their text and the full text."""
    text, ends, end = tokenizer.decode(ids), [], 0
    for i in range(1, len(ids) + 1):
        end = max(end, len(os.path.commonprefix([tokenizer.decode(ids[:i]), text])))  # noqa: RUF071
        ends.append(end)
    return ends


def random_text(rng: random.Random) -> str:
    return " ".join(rng.choice(CORPUS)[rng.randrange(60) :][: rng.randrange(30)] for _ in range(rng.randrange(1, 6)))


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like, word_piece])
def test_ends_of_encoded_text_equal_those_of_decoded_prefixes(make: Any) -> None:
    tokenizer, seed = make(), random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(60):
        ids = tokenizer.encode(random_text(rng)).ids
        assert token_char_ends(tokenizer, ids) == slow_ends(tokenizer, ids), f"seed {seed}: {ids}"


def test_ends_of_a_merging_decoder_equal_those_of_decoded_prefixes() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(100):
        ids = [ord(c) for c in rng.choices("ab  e\u0301\n1.", k=rng.randrange(1, 40))]
        ends, slow = token_char_ends(Merging(), ids), slow_ends(Merging(), ids)
        assert ends[-1] == len(Merging().decode(ids))
        # An accent changes the letter before it, so before the accent either end of that letter is correct.
        assert all(a == b or ids[i + 1 : i + 2] == [0x301] for i, (a, b) in enumerate(zip(ends, slow, strict=True))), (
            f"seed {seed}: {ids}"
        )


def test_a_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    tokenizer = byte_level()
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("a登b")[0][0]
    ids = [symbol_id(tokenizer, symbol) for symbol in symbols]
    assert len(ids) == 5
    assert token_char_ends(tokenizer, ids) == [1, 1, 1, 2, 3]
    assert token_char_ends(tokenizer, ids[:3]) == [1, 2, 2]  # cut inside the character: the text ends in U+FFFD
    assert token_char_ends(tokenizer, [ids[0], *ids[2:]]) == [1, 2, 3, 4]  # bytes that form no character: one U+FFFD each


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like, word_piece])
def test_ends_of_any_ids_equal_those_of_decoded_prefixes(make: Any) -> None:
    tokenizer, seed = make(), random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(100):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(1, 50))]
        ends = token_char_ends(tokenizer, ids)
        assert ends == slow_ends(tokenizer, ids), f"seed {seed}: {ids}"
        assert ends[-1] == len(tokenizer.decode(ids)), f"seed {seed}: {ids}"


def test_no_tokens() -> None:
    assert token_char_ends(byte_level(), []) == []


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.work = tokenizer, 0

    def decode(self, ids: list[int]) -> str:
        self.work += len(ids)
        return self.tokenizer.decode(ids)


@pytest.mark.parametrize("symbol", ["a", "\u00c3", "\u00a9"])  # byte-level symbols: a letter, a lead byte, a continuation byte
def test_a_token_repeated_for_ever_costs_linear_work(symbol: str) -> None:
    tokenizer = Counting(byte_level())
    ids = [symbol_id(tokenizer.tokenizer, symbol)] * 4000
    assert token_char_ends(tokenizer, ids)[-1] == len(tokenizer.decode(ids))
    assert tokenizer.work < 40 * len(ids)


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like, word_piece])
def test_long_text_costs_linear_work(make: Any) -> None:
    tokenizer = Counting(make())
    ids = tokenizer.tokenizer.encode("\u767b\u5c71 non red 4 boots " * 300).ids
    assert token_char_ends(tokenizer, ids)[-1] == len(tokenizer.decode(ids))
    assert tokenizer.work < 20 * len(ids)
