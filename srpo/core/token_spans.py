"""Character position where each token of a response ends in the decoded text, for any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, Protocol

REPLACEMENT = "\ufffd"  # decoders write this character for bytes that are no (or not yet a) character
MAX_PENDING = 3  # most bytes of an unfinished UTF-8 character; decoders write one REPLACEMENT for all of them, or one each
LONG_WINDOW = 8  # so many tokens without a finished character are cut off, to stay linear


class Decoder(Protocol):
    """Any tokenizer that turns ids back into text."""

    def decode(self, ids: Any, /) -> Any: ...


def decode_with_ends(tokenizer: Decoder, ids: Sequence[int]) -> tuple[str, list[int]]:
    """Return (text = decode(ids), exclusive end of each token in it, in characters: nondecreasing, the last one is len(text)).

    A token ends where decode(tokens up to it) stops being a prefix of the full text. A token that ends inside a character
    therefore ends before that character, which belongs to the token with its last byte.
    """
    ids = list(ids)
    if not ids:
        return "", []
    decode = tokenizer.decode
    text = decode(ids)
    for overlap in (False, True):  # byte-level tokenizers decode token by token; others need the token before
        ends = _windowed_ends(decode, ids, text, overlap)
        if ends is not None:
            return text, ends
    # This decoder changes earlier text when tokens follow: measure the common prefix for each number of tokens. Quadratic; rare.
    ends, end = [], 0
    for i in range(1, len(ids)):
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(decode(ids[:i]), text, strict=False))
        end = max(end, sum(1 for _ in shared))
        ends.append(end)
    return text, [*ends, len(text)]


def _windowed_ends(decode: Callable[[list[int]], str], ids: list[int], text: str, overlap: bool) -> list[int] | None:
    """Token ends found by decoding a few tokens at a time; None if the pieces do not add up to the text.

    ids[first:] are the tokens since the last finished character. With `overlap` the tokens ids[context:first] before them are
    decoded along, because some decoders treat the first token of a text differently (leading spaces).
    """
    ends: list[int] = []
    context, first, total, settled, piece = 0, 0, 0, "", ""
    for i in range(len(ids)):
        window = decode(ids[context : i + 1])
        piece = window[len(settled) :]
        pending = min(len(piece) - len(piece.rstrip(REPLACEMENT)), MAX_PENDING)
        lengths = range(len(piece), len(piece) - pending - 1, -1)  # REPLACEMENT counts as text if the full text has it too
        finished = next((n for n in lengths if text.startswith(piece[:n], total)), None)
        if finished is None or not window.startswith(settled):
            return None
        end = total + finished
        ends.append(max(end, ends[-1] if ends else 0))
        if i + 1 == len(ids):
            break
        if piece and not pending:
            context, first, total = (first if overlap else i + 1), i + 1, end
            settled = decode(ids[context:first]) if overlap else ""
        elif not overlap and i - first >= LONG_WINDOW:  # bytes that form no characters: cut the window, to stay linear
            for cut in range(i, i - MAX_PENDING - 1, -1):
                head = decode(ids[first:cut])
                if head + decode(ids[cut : i + 1]) == piece:
                    context, first, total = cut, cut, total + len(head)
                    break
    if text[total:] != piece:
        return None
    ends[-1] = len(text)
    return ends
