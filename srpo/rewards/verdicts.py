"""Text of a generative judge: its prompt, and verdicts in the form of Figure 4."""

from __future__ import annotations

import re
from collections.abc import Sequence

from srpo.data.examples import Example
from srpo.data.prompts import build_prompt

PROMPT = "Query: {query}\nItem: {item}\nResponse:\n"  # has the same placeholders as data.prompt; the response follows
QUESTION = "\nJudge each step.\n"

# Figure 4: one verdict per line and no other text on it, "Step 1 is [Correct]"; brackets and bold marks are optional.
_MARKS = r"(?:[^\w\n]|_)"
_VERDICT_WORD = rf"[^\S\n]+is{_MARKS}++(correct|incorrect){_MARKS}*+$"
_VERDICT = re.compile(rf"^{_MARKS}*+step[^\S\n]*(\d{{1,3}}){_VERDICT_WORD}", re.I | re.M)
WORDS = ("incorrect", "correct")  # WORDS[verdict]


def judge_prompt(example: Example, response: str, guidelines: str = "") -> str:
    """Return the judge's prompt: guidelines, query, item and the response to judge. `render_verdicts` continues it.

    It has no special tokens: whoever encodes it takes all of its text for data.
    """
    return (f"{guidelines}\n\n" if guidelines else "") + build_prompt(example, PROMPT) + response.strip() + QUESTION


def render_verdicts(verdicts: Sequence[bool | None], reasons: Sequence[str | None] | None = None) -> str:
    """Return the judge's output for these verdicts (Figure 4): the target of judge SFT, and input of `parse_verdicts`.

    Two lines per step, "Step 1: <reason>" and "Step 1 is [Correct]". A step without reason lacks the first line; a step with
    verdict None lacks both. Raises ValueError if `reasons` is given and differs from `verdicts` in length.
    """
    if reasons is None:
        reasons = [None] * len(verdicts)
    if len(reasons) != len(verdicts):
        raise ValueError(
            f"{len(reasons)} reasons for {len(verdicts)} verdicts: give one reason per step, or None for a step without"
        )
    lines = []
    for number, (verdict, reason) in enumerate(zip(verdicts, reasons, strict=True), 1):
        if verdict is None:
            continue
        if reason and reason.strip():
            lines.append(f"Step {number}: {' '.join(reason.split())}")
        lines.append(f"Step {number} is [{'Correct' if verdict else 'Incorrect'}]")
    return "\n".join(lines)


def parse_verdicts(text: str, num_steps: int) -> tuple[bool | None, ...]:
    """Return the verdict on each step (Figure 4), [J]; None without a verdict or with both. Total: any text can be parsed.

    A verdict must stand alone on its line, so a quoted or negated one ("Step 1 is not correct") does not count.
    """
    verdicts: list[set[bool]] = [set() for _ in range(num_steps)]
    for match in _VERDICT.finditer(text):
        number = int(match.group(1))
        if 1 <= number <= num_steps:
            verdicts[number - 1].add(match.group(2).casefold() == "correct")
    return tuple(words.pop() if len(words) == 1 else None for words in verdicts)


def verdict_header(number: int) -> str:
    """Regex of the opening of both lines on a step: of "Step 1: <reason>" and of "Step 1 is [Correct]"."""
    return rf"^{_MARKS}*+step[^\S\n]*{number}(?=[^\S\n]*:|[^\S\n]+is\b)"


def verdict_answer() -> str:
    """Regex of the verdict after such an opening. It does not match after the opening of "Step 1: <reason>"."""
    return rf"\A{_VERDICT_WORD}"
