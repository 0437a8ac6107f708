"""Text to token ids, so that no text of the data becomes a token that speaks for the program.

A prompt is a sequence of parts: the template's own text, whose special tokens are special, and text of the data (titles, queries,
fields, responses), whose are not. Without such a token in the data the ids are those of the whole text.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from srpo.core.errors import UserError

BOS_KEY = "srpo_bos"  # in tokenizer_config.json: the `policy.bos` that a checkpoint was trained with
_TAG = re.compile(r"<.+>|\[.+\]", re.DOTALL)
# Shapes of special tokens of the common families: <|im_end|>, </s>, <end_of_turn>, <2fr>, [INST], [|user|], [gMASK], [control_8],
# [unused1], and those of MiniMax: [e~[, ]~b], ]~!b[, ]<]image[>[
_SHAPE = re.compile(
    r"<(?=[|/]|\w[^<>\s]{0,60}>)|\[(?=[|@]|/?[A-Za-z_]*[A-Z_]{2}\w*\]|/?[A-Za-z_]+\d+\])"
    r"|[\[\]](?=[!A-Za-z]{0,8}~[!A-Za-z]{0,8}[\[\]])|\](?=<\])"
)
_LOCK = threading.Lock()  # the tokenizer object itself is switched between splitting special tokens and not


@dataclass(frozen=True)
class Part:
    """A piece of a prompt."""

    text: str
    is_data: bool = True  # whether its special tokens are plain text


@dataclass(frozen=True)
class _Facts:
    """Facts about a tokenizer, true as long as it has `size` tokens."""

    size: int
    controls: frozenset[int]
    adds_bos: bool


_FACTS: WeakKeyDictionary[Any, _Facts] = WeakKeyDictionary()


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that no text of the data may become.

    All special tokens except the one for unknown text, and the tags that the chat template writes, such as <think>, which many
    tokenizers do not call special.
    """
    return _facts(tokenizer).controls


def _facts(tokenizer: Any) -> _Facts:
    known = _FACTS.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        bos = tokenizer.bos_token_id
        adds = bos is not None and list(tokenizer.encode("a", add_special_tokens=True))[:1] == [bos]
        known = _FACTS[tokenizer] = _Facts(len(tokenizer), _controls(tokenizer), adds)
    return known


def _controls(tokenizer: Any) -> frozenset[int]:
    template = tokenizer.chat_template or ""
    texts = list(template.values()) if isinstance(template, dict) else [template]
    ids = {i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None}
    ids |= set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        named = _TAG.fullmatch(token.content) and any(token.content in text for text in texts)
        if (token.special and token_id != tokenizer.unk_token_id) or named:
            ids.add(token_id)
    return frozenset(ids)


def encode_parts(tokenizer: Any, parts: Sequence[Part]) -> tuple[int, ...]:
    """Token ids of the parts, joined; `control_ids` only where the template writes them."""
    text = "".join(part.text for part in parts)
    ids, controls = _encode(tokenizer, text), control_ids(tokenizer)
    if controls.isdisjoint(ids):
        return tuple(ids)
    own, data, end = [], False, 0
    for part in parts:
        own += [] if part.is_data else [(end, end + len(part.text))]
        end += len(part.text)
    kept: list[tuple[int, int, int]] = []
    for token_id, first, last in _controls_in(tokenizer, text, controls):
        if any(a <= first and last <= b for a, b in _joined(own)):
            kept.append((token_id, first, last))
        else:
            data = True
    if not data:
        return tuple(ids)
    result: list[int] = []
    start = 0
    for token_id, first, last in kept:
        result += [*_plain(tokenizer, text[start:first], controls), token_id]
        start = last
    return (*result, *_plain(tokenizer, text[start:], controls))


def without_special_text(text: str) -> str:
    """The text with a space inside whatever has the shape of a special token, for a model whose tokenizer is not known.

    Characters that a tokenizer may take as ASCII (NFKC), such as the full-width "<", count as these.
    """
    ends = [match.end() for match in _SHAPE.finditer("".join(map(_folded, text)))]
    return " ".join(text[first:last] for first, last in pairwise([0, *ends, len(text)]))


def _folded(character: str) -> str:
    """The character that NFKC makes of one; the same one if it makes several."""
    folded = character if character.isascii() else unicodedata.normalize("NFKC", character)
    return folded if len(folded) == 1 else character


def num_with_controls(tokenizer: Any, texts: Iterable[str]) -> int:
    """Number of texts that hold the text of one of `control_ids`."""
    contents = [str(tokenizer.convert_ids_to_tokens(i)) for i in control_ids(tokenizer)]
    pattern = re.compile("|".join(map(re.escape, contents)) or r"(?!)")
    return sum(bool(pattern.search(text)) for text in texts)


def with_bos(tokenizer: Any, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids of a prompt with the beginning-of-sequence token in front, if `adds_bos` and if they do not begin with it."""
    if not adds_bos(tokenizer) or ids[:1] == (tokenizer.bos_token_id,):
        return ids
    return (tokenizer.bos_token_id, *ids)


def adds_bos(tokenizer: Any) -> bool:
    """Whether prompts begin with the beginning-of-sequence token: as `set_bos` says, else if the tokenizer adds one by itself."""
    chosen = tokenizer.init_kwargs.get(BOS_KEY)
    return _facts(tokenizer).adds_bos if chosen is None else bool(chosen)


def set_bos(tokenizer: Any, bos: str) -> None:
    """Apply `policy.bos`: "add" and "none" are kept in the tokenizer and saved with it; "tokenizer" changes nothing.

    Raises UserError for "add" if the tokenizer has no such token.
    """
    if bos == "tokenizer":
        return
    if bos == "add" and tokenizer.bos_token_id is None:
        raise UserError("policy.bos is add, but the tokenizer has no bos_token: set policy.bos to 'tokenizer'")
    tokenizer.init_kwargs[BOS_KEY] = bos == "add"


def _encode(tokenizer: Any, text: str, split: bool = False) -> list[int]:
    with _LOCK:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split)


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring spans as one."""
    joined: list[tuple[int, int]] = []
    for a, b in spans:
        if joined and joined[-1][1] == a:
            joined[-1] = joined[-1][0], b
        else:
            joined.append((a, b))
    return joined


def _controls_in(tokenizer: Any, text: str, controls: frozenset[int], split: bool = False) -> list[tuple[int, int, int]]:
    """(id, first character, end) of each control token of `text`, without the spaces that it swallows."""
    if not tokenizer.is_fast:
        contents = {tokenizer.convert_ids_to_tokens(i): i for i in controls}
        pattern = "|".join(map(re.escape, sorted(contents, key=len, reverse=True)))
        return [(contents[match[0]], *match.span()) for match in re.finditer(pattern, text)]
    with _LOCK:
        encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=split, return_offsets_mapping=True)
    found = []
    for token_id, (first, last) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        if token_id in controls:
            piece = text[first:last]
            left = first + len(piece) - len(piece.lstrip())
            found.append((token_id, left, max(left + 1, first + len(piece.rstrip()))))
    return found


def _plain(tokenizer: Any, text: str, controls: frozenset[int]) -> list[int]:
    """Token ids of `text` without any of `controls`."""
    ids = _encode(tokenizer, text, split=True)
    if controls.isdisjoint(ids):
        return ids
    # Left are tokens that are not special to the tokenizer, or that its model itself makes of the characters: cut inside each.
    result: list[int] = []
    start = 0
    for _, first, last in _controls_in(tokenizer, text, controls, split=True):
        single = last - first < 2  # a single character that is a control token: there is no other way to write it
        result += _plain(tokenizer, text[start : first if single else first + 1], controls)
        start = last if single else first + 1
    return [*result, *_plain(tokenizer, text[start:], controls)]
