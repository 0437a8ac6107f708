"""Step schemas by name: the paper's five steps, the verdict alone, or steps of one's own; and changes to single steps.

[steps]
preset = "paper"
sources = "labels"

[steps.query_intent]
sources = ["judge", "skip"]
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from srpo.core.errors import UserError
from srpo.core.grades import PAPER_GRADES, Grades
from srpo.core.ranges import Fraction, NonNegative
from srpo.core.steps import StepSchema, StepSpec

# A header stands at the start of a line, after optional decoration ("- ", "**", "## ") and number ("3.", "S3:", "Step 3 -"), and
# ends in a colon, a dash, closing bold or the end of the line. Possessive quantifiers keep the search linear in the text.
_DECOR = r"(?:[^\w\n]|_)*+"
_OPEN = rf"^{_DECOR}(?:(?:step|s)?[^\S\n]*+\d{{1,2}}{_DECOR})?+"
_CLOSE = r"(?:(?:[^\S\n]|[*_`\])])*+(?:[:=\uff1a\u2010-\u2015]++|-++(?:>|(?!\w))|$)|[^\S\n]*+\*\*)"


def _header(words: str) -> str:
    return _OPEN + words + _CLOSE


def _words(*alternatives: str) -> str:
    return rf"(?:[^\S\n]+(?:{'|'.join(alternatives)}))"


def _any_of(options: tuple[str, ...]) -> str:
    """Regex of one of the options, the longest that fits, in any spacing; not "relevant" in "not relevant"."""
    ordered = sorted(options, key=len, reverse=True)
    words = "|".join(r"\s+".join(map(re.escape, option.split())) for option in ordered)
    return rf"(?<!\w)(?<!\bnot )(?<!\bnon-)(?:{words})(?!\w)"


def _last_option(*options: str) -> str:
    """Regex of the option after the last arrow that points at one; without such an arrow, of the last option word."""
    words = "|".join(options)
    arrow = rf"[\s\S]*(?:->|=>|\u2192)\W{{0,8}}+(?:{words})\b"  # greedy: matches up to the last arrow
    return rf"\A(?:(?={arrow})[\s\S]*(?:->|=>|\u2192)\W{{0,8}}+|(?!{arrow})[\s\S]*)\b({words})\b"


_ANALYZE = r"(?:(?:analy[sz]e|identify|interpret|understand)[^\S\n]+(?:the[^\S\n]+)?)"
_PAPER_VERDICT = (
    r"\b(L[1-4]\b|[1-4](?=[ \t]*[-\u2010-\u2015][ \t]*(?:irrelevant|(?:partial[ \t]+)?mismatch|related|excellent)\b))"
)

PAPER_STEPS: tuple[StepSpec, ...] = (
    StepSpec(
        "query_intent",
        _header(
            rf"(?:{_ANALYZE}query{_words('intent', 'text')}*"
            rf"|query{_words('intent', 'interpretation', 'analysis', 'understanding')}{_words('identification', 'analysis')}*)"
        ),
    ),
    StepSpec(
        "item",
        _header(rf"{_ANALYZE}?item{_words('information', 'text', 'content', 'analysis', 'interpretation', 'understanding')}*"),
    ),
    StepSpec(
        "category_match",
        _header(rf"category{_words('match', 'matching', 'relevance', 'relation')}{_words('analysis', 'evaluation')}*"),
        answer=_last_option("match", "related", "mismatch"),
        options=("match", "related", "mismatch"),
        sources=("gold", "judge"),
    ),
    StepSpec(
        "attribute_match",
        _header(rf"attributes?{_words('match', 'matching', 'relevance', 'relation')}{_words('analysis', 'evaluation')}*"),
        answer=_last_option("match", "unclear", "conflict"),
        options=("match", "unclear", "conflict"),
        sources=("gold", "judge"),
    ),
    StepSpec(
        "verdict",
        _header(rf"(?:(?:final|overall)[^\S\n]+)?(?:verdict|judge?ment|ranking){_words('reason(?:ing)?', 'determination')}*"),
        answer=_PAPER_VERDICT,
        options=PAPER_GRADES,
        sources=("gold",),
        reward=1.0,
    ),
)
PAPER = StepSchema(PAPER_STEPS)
_LABELS = ("gold", "skip")  # a label if the pair has one, else nobody


@dataclass(frozen=True)
class StepChange:
    """Settings of one step in place of those of the preset; unset ones stay."""

    header: str | None = None  # regex of the step's header; a new step's default: its name in words at the start of a line
    answer: str | None = None  # regex with one group, the last match is the answer; default with `options`: any of them
    options: tuple[str, ...] | None = None  # allowed answers; empty: free text
    sources: tuple[str, ...] | None = None  # gold | judge | rule | skip: the first that can grade the step does
    reward: NonNegative | None = None  # reward of a correct step
    missing_verdict: Fraction | None = None  # fraction of `reward` earned without a verdict

    def changes(self) -> dict[str, object]:
        """The fields that are set."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class StepsConfig:
    """The reasoning steps of a response."""

    # Steps to start from: the paper's five, the verdict alone, or none (own: every step is a table [steps.NAME])
    preset: Literal["paper", "verdict", "own"] = "paper"
    form: Literal["text", "json"] = "text"  # a response is one "1. Name: answer" line per step, or a JSON object of the steps
    # Who grades the steps: sources of the preset, or labels: a label if the pair has one, else nobody; [steps.NAME] comes first
    sources: Literal["preset", "labels"] = "preset"
    # Changes by the name of the step, [steps.NAME] in TOML; a new name adds a step, before the verdict of a preset
    named: dict[str, StepChange] = field(default_factory=dict)

    REST = "named"  # the field that holds the tables of other names
    # Said of [[steps]], the array of tables of older files
    NO_ARRAY = 'write preset = "own" under [steps], and each step as a table [steps.NAME] without the key name'

    @classmethod
    def of(cls, specs: tuple[StepSpec, ...]) -> StepsConfig:
        """The settings of exactly these steps."""
        keys = [f.name for f in fields(StepChange)]
        return cls("own", named={spec.name: StepChange(**{key: getattr(spec, key) for key in keys}) for spec in specs})

    def schema(self, grades: Grades) -> StepSchema:
        """The schema of these settings; the last step answers with a grade. UserError for settings that cannot work."""
        specs = {"paper": PAPER_STEPS, "verdict": PAPER_STEPS[-1:], "own": ()}[self.preset]
        if self.sources == "labels":
            specs = tuple(replace(spec, sources=_LABELS) for spec in specs)
        if specs and grades.names != PAPER_GRADES:
            specs = (*specs[:-1], replace(specs[-1], options=grades.names, answer=_verdict(grades)))
        if self.form == "json":
            specs = tuple(map(_in_json, specs))
        by_name = {spec.name: spec for spec in specs}
        for name, change in self.named.items():
            if name not in by_name and self.preset != "own" and (near := difflib.get_close_matches(name, by_name, n=1)):
                raise UserError(f"steps.{name} is no step of the preset {self.preset!r}: the nearest is {near[0]!r}")
            if name in by_name:
                answer = {} if change.options is None else {"answer": _answer(change.options, grades)}
                by_name[name] = replace(by_name[name], **{**answer, **change.changes()})
            else:
                is_verdict = self.preset == "own" and name == list(self.named)[-1]
                by_name[name] = self._new(name, change, grades if is_verdict else None)
        if not by_name:
            raise UserError("steps.preset is 'own' and there is no step: add tables [steps.NAME], or set it to 'paper'")
        if specs:  # the verdict stays the last step
            by_name[specs[-1].name] = by_name.pop(specs[-1].name)
        *_, last = by_name.values()
        if last.options != grades.names:
            raise UserError(
                f"the last step, {last.name!r}, has the options {', '.join(last.options) or 'of free text'} and grades.names is "
                f"{', '.join(grades.names)}: the last step answers with a grade, so set grades.names to its options, from the "
                "worst to the best"
            )
        return StepSchema(by_name.values(), grades, self.form)

    def _new(self, name: str, change: StepChange, grades: Grades | None) -> StepSpec:
        """A step that the preset does not have. `grades`: of the last step, which answers with one unless it has options."""
        given = change.changes()
        options = change.options if change.options is not None else grades.names if grades else ()
        header = _header(r"[^\S\n]+".join(map(re.escape, name.split("_"))))
        defaults: dict[str, Any] = {"header": header, "answer": _answer(options, grades)}
        if self.sources == "labels":
            defaults["sources"] = _LABELS
        spec = StepSpec(**{"name": name, **defaults, **given, "options": options})
        if self.form == "json":
            spec = _in_json(spec) if change.header is None else spec
        return spec


def _answer(options: tuple[str, ...], grades: Grades | None) -> str:
    """Regex of the answer of a step with these options."""
    if grades and options == grades.names:
        return _verdict(grades)
    return f"({_any_of(options)})" if options else ""


def _verdict(grades: Grades) -> str:
    return _PAPER_VERDICT if grades.names == PAPER_GRADES else f"({_any_of(grades.names)})"


def _in_json(spec: StepSpec) -> StepSpec:
    """The step as a key of a JSON object."""
    return replace(spec, header=rf'(?<!\\)"{spec.name}"\s*:')
