"""Reasoning steps as configuration, and the parser that finds them in a response (pi_Sj of Eq. 5).

A response is a sequence of J steps, each opened by a header. `StepSpec` describes one step and `StepSchema` all J;
`parse_response` cuts the tokens of a response into step spans and reads each step's answer. The parser is total: no text makes
it raise.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from srpo.core.errors import UserError
from srpo.core.grades import Grades, of_options
from srpo.core.ranges import Fraction, NonNegative
from srpo.core.text import fold
from srpo.core.token_spans import Decoder, decode_with_ends

SOURCES = ("gold", "judge", "rule", "skip")
REGEX_FLAGS = re.MULTILINE | re.IGNORECASE
_JSON_STRING = re.compile(r'\s*"((?:[^"\\]|\\.)*+)"', re.DOTALL)
_SPACES = re.compile(r"(?:\\s|\[\^\\S\\n\])[*+]+| \*")  # of a header: any spaces
_ESCAPED = re.compile(r"\\(\W)")
_EDGE = {True: r"(?<!\d)", False: r"(?<!\w)"}  # before a text that begins with a digit, or not


def _compile(where: str, key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, REGEX_FLAGS)
    except (re.error, RecursionError, OverflowError) as error:  # thousands of brackets; a repetition of many digits
        raise UserError(
            f"{where}: {key} {pattern!r} is not a regular expression: {error}; in TOML write it in 'single quotes'"
        ) from error


@dataclass(frozen=True)
class StepSpec:
    """One reasoning step S_j: how to find, read and grade it. Lists become tuples, so a TOML table fits: `StepSpec(**table)`.

    Raises UserError, with the fix in its text, for a value that cannot work.
    """

    name: str  # lower-case letters, digits and _; part of metric keys
    header: str  # regex of the step's header; multi-line, case-insensitive
    # Regex with one group, searched in the step's text (in JSON: in its value), the last match counts; empty: the whole text
    answer: str = ""
    options: tuple[str, ...] = ()  # allowed answers; empty: free text
    sources: tuple[str, ...] = ("judge",)  # gold | judge | rule | skip: the first that can grade the step does
    reward: NonNegative = 0.2  # reward of a correct step (Appendix B)
    missing_verdict: Fraction | None = None  # fraction of `reward` earned without a verdict; unset: reward.missing_verdict

    def __post_init__(self) -> None:
        for key in ("options", "sources"):
            value = getattr(self, key)
            if isinstance(value, str):
                raise UserError(f"step {self.name!r}: {key} is the string {value!r}; write a list: [{value!r}]")
            object.__setattr__(self, key, tuple(value))
        where = f"step {self.name!r}"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise UserError(f"{where}: rename it; a name has lower-case letters, digits and _, and starts with a letter")
        if not self.header:
            raise UserError(f"{where}: header is empty; give a regular expression that opens the step")
        if _compile(where, "header", self.header).search(""):
            raise UserError(
                f"{where}: header {self.header!r} matches the empty text, so it opens a step anywhere; make it stricter"
            )
        if self.answer and (groups := _compile(where, "answer", self.answer).groups) != 1:
            raise UserError(f"{where}: answer {self.answer!r} has {groups} groups; mark the answer with exactly one group")
        folded = [fold(option) for option in self.options]
        if len(set(folded)) < len(folded) or "" in folded:
            raise UserError(f"{where}: options {list(self.options)} must be non-empty and differ by more than case and spaces")
        if not self.sources or not set(self.sources) <= set(SOURCES) or len(set(self.sources)) < len(self.sources):
            raise UserError(f"{where}: sources {list(self.sources)} must be some of {', '.join(SOURCES)}, each at most once")
        for always in ("rule", "skip"):
            if always in self.sources[:-1]:
                raise UserError(f"{where}: source {always!r} always applies, so later sources are never used; put it last")
        if "rule" in self.sources and not self.options:
            raise UserError(f"{where}: source 'rule' compares the answer with options; give options or another source")
        if not (math.isfinite(self.reward) and self.reward >= 0):
            raise UserError(f"{where}: reward is {self.reward}; set it to a finite number of at least 0")
        if self.missing_verdict is not None and not 0 <= self.missing_verdict <= 1:
            raise UserError(f"{where}: missing_verdict is {self.missing_verdict}; set it to a fraction from 0 to 1")

    def canonical(self, text: str) -> str | None:
        """Return the option that `text` means, else None.

        That is the option equal to it but for case and spaces, else the only option whose last words or digits it is ("4" means
        "L4", "relevant" is not "irrelevant"). Without options: the text without bold marks and extra spaces, None if empty.
        """
        text = " ".join(text.replace("**", " ").split())
        if not self.options or not text:
            return text or None
        folded = fold(text)
        equal = [option for option in self.options if fold(option) == folded]
        ending = [
            option for option in self.options if re.search(rf"{_EDGE[folded[0].isdigit()]}{re.escape(folded)}\Z", fold(option))
        ]
        return equal[0] if equal else ending[0] if len(ending) == 1 else None


@dataclass(frozen=True)
class ParsedText:
    """Steps found in a text. Step j is text[char_ends[j-1]:char_ends[j]]; the J spans partition the text.

    Text before the first header belongs to step 1. A step without header has an empty span; step 1 without header has the text
    before the first header.
    """

    char_ends: tuple[int, ...]  # [J] nondecreasing, the last one is len(text)
    answers: tuple[str | None, ...]  # [J] None if the step is missing or its answer cannot be read
    found: tuple[bool, ...]  # [J] whether the text has the step's header
    problems: frozenset[str]  # missing | unanswered | duplicate | out_of_order
    answer_spans: tuple[tuple[int, int] | None, ...]  # [J] characters of each answer as it is written; None without an answer


@dataclass(frozen=True)
class ParsedResponse:
    """`ParsedText` with spans in tokens: step j is response_ids[step_ends[j-1]:step_ends[j]]."""

    text: str
    step_ends: tuple[int, ...]  # [J] nondecreasing, the last one is the number of tokens
    answers: tuple[str | None, ...]
    found: tuple[bool, ...]
    problems: frozenset[str]


@dataclass(frozen=True)
class _Header:
    start: int
    end: int
    step: int


class StepSchema:
    """The J steps of a response; the last one answers with one of `grades` (default: its options, or the paper's).

    form: "text" (a line per step) or "json", as `write` makes it. Raises UserError for no steps, for two of the same name, and if
    none can earn a reward.
    """

    def __init__(self, specs: Iterable[StepSpec], grades: Grades | None = None, form: str = "text") -> None:
        self.specs = tuple(specs)
        self.form = form
        if not self.specs:
            raise UserError("a step schema needs at least one step; leave `steps` out for the paper's five")
        self.grades = grades or of_options(self.specs[-1].options)
        names = [spec.name for spec in self.specs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"two steps are called {twice[0]!r}; give every step its own name")
        if not self.max_reward > 0:
            raise UserError("no step can earn a reward; give one a positive reward and a source other than 'skip'")
        self._headers = [re.compile(spec.header, REGEX_FLAGS) for spec in self.specs]
        self._answers = [re.compile(spec.answer, REGEX_FLAGS) if spec.answer else None for spec in self.specs]

    @property
    def num_steps(self) -> int:
        return len(self.specs)

    @property
    def names(self) -> tuple[str, ...]:
        """[J] names of the steps, parts of metric keys."""
        return tuple(spec.name for spec in self.specs)

    @property
    def options(self) -> tuple[tuple[str, ...], ...]:
        """[J] allowed answers of each step; empty for free text."""
        return tuple(spec.options for spec in self.specs)

    @cached_property
    def max_reward(self) -> float:
        """Reward of a response that is correct in every graded step (1.8 in Appendix B)."""
        return math.fsum(spec.reward for spec in self.specs if spec.sources != ("skip",))

    def parse_text(self, text: str) -> ParsedText:
        """Find the steps of a text (pi_Sj of Eq. 5). Total: never raises.

        The parser adopts the longest chain of headers that increases both in position and in step number, so that one stray
        header cannot hide the steps after it. Ties go to the chain with the earlier steps ("1 3 2 4" adopts 1 2 4: step 3 came
        before its predecessor), then to the chain whose headers come first.
        A header outside the chain is a "duplicate" if its step was adopted before it, else "out_of_order". It moves no span, but
        it ends the text that an answer is read from. The answer of a step is read after its adopted header; if that text has
        none, after the first repeated header in the step's span that has one.

        Paper: the paper says only that pi_Sj is deterministic; these rules are ours.
        """
        headers = self._find_headers(text)
        adopted = _longest_chain(headers)
        starts = [adopted[j].start if j in adopted else None for j in range(self.num_steps)]
        char_ends, end = [], len(text)
        for start in reversed(starts):
            char_ends.append(end)
            end = end if start is None else start
        char_ends.reverse()

        answers: list[str | None] = [None] * self.num_steps
        spans: list[tuple[int, int] | None] = [None] * self.num_steps
        problems = set()
        for i, header in enumerate(headers):
            j, own = header.step, adopted.get(header.step)
            if own is None or header.start < own.start:
                problems.add("out_of_order")
                continue
            if header is not own:
                problems.add("duplicate")
            if answers[j] is None and header.start < char_ends[j]:
                limit = headers[i + 1].start if i + 1 < len(headers) else len(text)
                answers[j], (start, end) = self._read_answer(j, text[header.end : limit])
                spans[j] = None if answers[j] is None else (header.end + start, header.end + end)
        if len(adopted) < self.num_steps:
            problems.add("missing")
        if any(answers[j] is None for j in adopted):
            problems.add("unanswered")
        found = tuple(start is not None for start in starts)
        return ParsedText(tuple(char_ends), tuple(answers), found, frozenset(problems), tuple(spans))

    def write(self, answers: Sequence[str]) -> str:
        """A response with these answers [J], in the form that the steps are read from.

        A step that has no text in `openings` is written as "1. Name: answer", which its header does not find.
        """
        if self.form == "json":
            return json.dumps(dict(zip(self.names, answers, strict=True)), ensure_ascii=False)
        openings = (text or _numbered(j, spec) for j, (spec, text) in enumerate(zip(self.specs, self.openings, strict=True)))
        return "\n".join(opening + answer for opening, answer in zip(openings, answers, strict=True))

    @cached_property
    def openings(self) -> tuple[str | None, ...]:
        """[J] text before the answer of each step, which its header matches: "1. Name: ", "Name: ", or the header's own words.

        None for a header whose words cannot be read off its regular expression.
        """
        found: list[str | None] = []
        for j, (spec, header) in enumerate(zip(self.specs, self._headers, strict=True)):
            words = _ESCAPED.sub(r"\1", _SPACES.sub(" ", spec.header.removeprefix("^").removesuffix("$"))).strip()
            texts = (_numbered(j, spec), f"{in_words(spec.name)}: ", f"{words} ", f"{words}\n")
            matches = ((text, header.match(f"{text}x")) for text in texts)
            found.append(next((text for text, match in matches if match and match.end() <= len(text)), None))
        return tuple(found)

    def _find_headers(self, text: str) -> list[_Header]:
        headers = [_Header(*m.span(), j) for j, header in enumerate(self._headers) for m in header.finditer(text)]
        return sorted(headers, key=lambda h: (h.start, h.step))

    def _read_answer(self, j: int, body: str) -> tuple[str | None, tuple[int, int]]:
        """(answer of step j in the text after its header, the characters of `body` that it is read from)."""
        spec, pattern = self.specs[j], self._answers[j]
        value, whole = None, (0, len(body))
        if self.form == "json":
            value = _JSON_STRING.match(body)
            if value is None and pattern is None:
                return None, whole
            body = body if value is None else _unescaped(value[1])
        if pattern is None:
            return spec.canonical(body), whole
        answers = [(spec.canonical(m.group(1)), m) for m in pattern.finditer(body) if m.group(1)]
        answer, match = next((found for found in reversed(answers) if found[0] is not None), (None, None))
        if match is None:
            return None, whole
        start = match.start(1)
        if value is not None:  # among the characters as they are written, before escapes are decoded
            start = value.start(1) + (start if value[1] == body else max(0, value[1].rfind(match[1])))
        return answer, (start, start + len(match[1]))


def _unescaped(text: str) -> str:
    """The text that stands between the quotes of a JSON string; as it is, if its escapes are none of JSON."""
    try:
        value = json.loads(f'"{text}"', strict=False)
    except ValueError:
        return text
    return value.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written to a file


def without_stops(tokenizer: Any, response_ids: Sequence[int], stop_ids: Collection[int]) -> Sequence[int]:
    """The ids of a response that are its text: those before the `stop_ids` and special tokens (`all_special_ids`) at its end."""
    ends = {*stop_ids, *(getattr(tokenizer, "all_special_ids", None) or ())}
    length = len(response_ids)
    while length and response_ids[length - 1] in ends:
        length -= 1
    return response_ids[:length]


def parse_response(
    schema: StepSchema, tokenizer: Decoder, response_ids: Sequence[int], stop_ids: Collection[int] = ()
) -> ParsedResponse:
    """Decode a response and cut its tokens into steps. Total for all ids that the tokenizer can decode.

    A token that straddles two steps belongs to the earlier one. What `without_stops` leaves out at the end is not part of the
    text; it belongs to the step that the text ends in.
    """
    text, token_ends = decode_with_ends(tokenizer, without_stops(tokenizer, response_ids, stop_ids))
    parsed = schema.parse_text(text)
    step_ends = []
    starts = [0, *token_ends[:-1]]
    for char_end in parsed.char_ends:
        step_ends.append(len(response_ids) if char_end == len(text) else bisect_left(starts, char_end))
    return ParsedResponse(text, tuple(step_ends), parsed.answers, parsed.found, parsed.problems)


def _longest_chain(headers: Sequence[_Header]) -> dict[int, _Header]:
    """{step: header} of the longest chain of headers that increases in start and step; ties as in `StepSchema.parse_text`."""
    best: dict[int, tuple[_Header, ...]] = {}  # first step -> best chain of the headers visited, right to left

    def rank(chain: tuple[_Header, ...]) -> tuple[int, tuple[int, ...]]:
        return -len(chain), tuple(header.step for header in chain)

    for _, group in groupby(reversed(headers), key=lambda header: header.start):
        chains = [(h, *min((c for j, c in best.items() if j > h.step), key=rank, default=())) for h in group]
        for chain in chains:  # headers at the same position exclude each other
            if chain[0].step not in best or rank(chain) <= rank(best[chain[0].step]):
                best[chain[0].step] = chain
    return {header.step: header for header in min(best.values(), key=rank, default=())}


def _numbered(j: int, spec: StepSpec) -> str:
    return f"{j + 1}. {in_words(spec.name)}: "


def in_words(name: str) -> str:
    """The name of a step as a title: "category_match" is "Category match"."""
    return name.replace("_", " ").capitalize()


def facts(answer: str) -> frozenset[str]:
    """Set of the `;`-separated facts of an answer, without case and extra spaces."""
    return frozenset(fact for part in answer.split(";") if (fact := fold(part).strip(" .")))


def same_answer(answer: str | None, truth: str | None) -> bool:
    """Whether two answers state the same facts; False if either is missing."""
    return answer is not None and truth is not None and facts(answer) == facts(truth)
