"""What a generative judge reads and writes: its prompt, and verdicts in the form of Figure 4."""

from __future__ import annotations

import re
from collections.abc import Sequence

from srpo.data.examples import Example
from srpo.data.prompts import build_prompt

PROMPT = "Query: {query}\nItem: {item}\nResponse:\n"  # over the same names as data.prompt; the response follows
QUESTION = "\nJudge each step.\n"

# One line per verdict, alone on it: "Step 1 is [Correct]", brackets and bold at will.
_MARKS = r"(?:[^\w\n]|_)"
_SAID = rf"[^\S\n]+is{_MARKS}++(correct|incorrect){_MARKS}*+$"
_VERDICT = re.compile(rf"^{_MARKS}*+step[^\S\n]*(\d{{1,3}}){_SAID}", re.I | re.M)
WORDS = ("incorrect", "correct")  # of a verdict that is False, True


def judge_prompt(example: Example, response: str, template: str = PROMPT) -> str:
    """Query, item and the response to be judged, as one text that `render_verdicts` continues."""
    return build_prompt(example, template) + response.strip() + QUESTION


def render_verdicts(verdicts: Sequence[bool | None], reasons: Sequence[str | None] | None = None) -> str:
    """The judge's output for these verdicts (Figure 4): training target of judge SFT, read back by `parse_verdicts`.

    Two lines per step, "Step 1: <reason>" and "Step 1 is [Correct]"; the first is left out without a reason, both where the
    verdict is None. ValueError where a number of reasons is given that is not the number of verdicts.
    """
    if reasons is None:
        reasons = [None] * len(verdicts)
    if len(reasons) != len(verdicts):
        raise ValueError(f"{len(reasons)} reasons for {len(verdicts)} verdicts: give one per step, None where there is none")
    lines = []
    for number, (verdict, reason) in enumerate(zip(verdicts, reasons, strict=True), 1):
        if verdict is None:
            continue
        if reason and reason.strip():
            lines.append(f"Step {number}: {' '.join(reason.split())}")
        lines.append(f"Step {number} is [{'Correct' if verdict else 'Incorrect'}]")
    return "\n".join(lines)


def parse_verdicts(text: str, num_steps: int) -> tuple[bool | None, ...]:
    """The verdict on each step, [J]; None where the text gives none, or both. Total: any text is read.

    Only a line that says nothing else is a verdict, so a judge that quotes or negates one ("Step 1 is not correct") gives none.
    """
    told: list[set[bool]] = [set() for _ in range(num_steps)]
    for match in _VERDICT.finditer(text):
        number = int(match.group(1))
        if 1 <= number <= num_steps:
            told[number - 1].add(match.group(2).casefold() == "correct")
    return tuple(said.pop() if len(said) == 1 else None for said in told)


def verdict_header(number: int) -> str:
    """Regex that opens what the judge writes about a step, "Step 1: <reason>" and "Step 1 is [Correct]" alike."""
    return rf"^{_MARKS}*+step[^\S\n]*{number}(?=[^\S\n]*:|[^\S\n]+is\b)"


def verdict_answer() -> str:
    """Regex of the verdict behind such an opening; there is none behind "Step 1: <reason>"."""
    return rf"\A{_SAID}"
