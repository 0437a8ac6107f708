"""srpo.core.steps: properties of the parser on 2,000 generated responses; HYPOTHESIS_PROFILE=nightly makes it 20,000."""

from __future__ import annotations

import functools
import itertools
import os
import re
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from srpo.core.step_presets import PAPER, PAPER_STEPS
from srpo.core.steps import REGEX_FLAGS, ParsedResponse, StepSchema, StepSpec, parse_response

NUM_RESPONSES = 20_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 800
SCHEMA = PAPER
J = SCHEMA.num_steps

LINES = {
    0: [
        "1. Query intent: shoes/sneakers; color not red\n",
        "- Query intent identification** - Category: sandals ...\n",
        "1. Identify query intent – Category...\n",
        "query intent:",
        "**S1: Query interpretation**\n登山靴\n",
    ],
    1: [
        "2. Item: shoes/boots; color blue\n",
        " 2. Analyze item text - For category intent ...\n",
        "ITEM -> ñ\n",
        "## Item information\n",
    ],
    2: ["3. Category match: related\n", "**3. Category match:** mismatch\n", "3) Category relevance – 👟 match\n"],
    3: [
        "4. Attribute match: color ok -> match\n",
        "Step 4: Attribute matching - x -> unclear (conflict)\n",
        "4. Attribute match\n",
    ],
    4: [
        "5. Verdict: L2\n",
        "5. Judgment Reason: ...\nRelevance: L4\n",
        "- Verdict - Reason:** … **L4 – Excellent**",
        "Final verdict\n4 - Excellent",
    ],
}
NOISE = [
    "4 - Excellent\n",
    "\n",
    " ",
    "**",
    "\r\n",
    "-> conflict",
    "L3",
    "match",
    "item",
    "é",
    "登",
    "👩‍👩‍👧",
    "e\u0301",
    "1.",
    "- ",
    "\u2028",
    "\x00",
    "\ufffd",
]
header_lines = st.sampled_from(list(itertools.chain(*LINES.values())))
in_order = st.tuples(*(st.sampled_from(LINES[j]) for j in range(J))).map("".join)
pieces = st.one_of(header_lines, header_lines, in_order, st.sampled_from(NOISE), st.text(max_size=6))


@dataclass(frozen=True)
class Response:
    text: str
    cut: float  # fraction of the tokens that is kept
    scramble: tuple[int, ...]  # arbitrary token ids inserted in the middle, which need not decode to text


responses = st.builds(
    Response,
    st.lists(pieces, max_size=9).map("".join),
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.one_of(st.just(()), st.lists(st.integers(0, 299), max_size=5).map(tuple)),
)


@functools.cache
def byte_level() -> Tokenizer:
    """Byte-level BPE: a non-ASCII character takes several tokens, while "\\n2" or ". " is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False, max_token_length=6)
    tokenizer.train_from_iterator(["".join(lines[0] for lines in LINES.values())] * 4, trainer)
    assert tokenizer.get_vocab_size() == 300
    return tokenizer


class Merging:
    """One token per code point; the decoder merges runs of spaces and composes letter + accent, so that tokens interact."""

    def decode(self, ids: list[int]) -> str:
        return re.sub(" +", " ", "".join(map(chr, ids))).replace("e\u0301", "\u00e9")


def check_partition(parsed: ParsedResponse, ids: list[int]) -> None:
    assert len(parsed.step_ends) == len(parsed.answers) == len(parsed.found) == J
    assert list(parsed.step_ends) == sorted(parsed.step_ends) and parsed.step_ends[0] >= 0
    assert parsed.step_ends[-1] == len(ids)
    for j in range(J):
        start = parsed.step_ends[j - 1] if j else 0
        if not parsed.found[j]:
            assert parsed.answers[j] is None
            assert j == 0 or parsed.step_ends[j] == start
    assert ("missing" in parsed.problems) == (not all(parsed.found))


def slow_owner(text: str) -> list[int]:
    """Step of each character, by brute force over all chains of headers."""
    headers = sorted({(m.start(), j) for j, spec in enumerate(PAPER_STEPS) for m in re.finditer(spec.header, text, REGEX_FLAGS)})
    chains = (c for n in range(min(len(headers), J) + 1) for c in itertools.combinations(headers, n))
    forward = (c for c in chains if all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(c)))
    best = min(forward, key=lambda c: (-len(c), [j for _, j in c], [start for start, _ in c]))
    return [max((j for start, j in best if start <= i), default=0) for i in range(len(text))]


def slow_first_character(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Index of the character that holds the first byte of each token, for ids that encode text."""
    sizes = [len(tokenizer.id_to_token(i) or "") for i in ids]  # one symbol per byte
    of_byte = [c for c, character in enumerate(tokenizer.decode(ids)) for _ in character.encode()]
    return [of_byte[offset] for offset in itertools.accumulate(sizes[:-1], initial=0)] if ids else []


@pytest.mark.timeout(1800)  # the nightly profile
@settings(max_examples=NUM_RESPONSES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(responses)
def test_any_response_is_cut_into_steps(response: Response) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(response.text).ids
    ids = ids[: round(response.cut * len(ids))]
    text = tokenizer.decode(ids)
    parsed = parse_response(SCHEMA, tokenizer, ids)
    note(repr((text, parsed)))
    assert parsed.text == text
    check_partition(parsed, ids)
    owner_of_token = [sum(end <= t for end in parsed.step_ends) for t in range(len(ids))]
    if len(text.encode()) <= 400 and "\ufffd" not in text:
        owner = slow_owner(text)
        assert owner_of_token == [owner[c] for c in slow_first_character(tokenizer, ids)]

    middle = len(ids) // 2
    broken = [*ids[:middle], *response.scramble, *ids[middle:]]
    check_partition(parse_response(SCHEMA, tokenizer, broken), broken)

    points = [ord(c) for c in text]
    merged = parse_response(SCHEMA, Merging(), points)
    assert merged.text == Merging().decode(points)
    check_partition(merged, points)


@settings(max_examples=NUM_RESPONSES // 10, deadline=None)
@given(st.text(max_size=60), st.lists(st.sampled_from(["x", "\\d+", "^a:", "item", "(?=q)", "."]), min_size=1, max_size=4))
def test_any_schema_cuts_any_text(text: str, headers: list[str]) -> None:
    parsed = StepSchema(StepSpec(f"s{j}", header) for j, header in enumerate(headers)).parse_text(text)
    assert len(parsed.char_ends) == len(headers)
    assert list(parsed.char_ends) == sorted(parsed.char_ends) and parsed.char_ends[-1] == len(text)
