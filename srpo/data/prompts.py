"""Prompt of a query-item pair: a template, the instructions that name steps and grades, and annotation guidelines."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from srpo.core.config.train import DataConfig
from srpo.core.errors import UserError
from srpo.core.grades import PAPER_GRADES
from srpo.core.steps import StepSchema, in_words
from srpo.data.encoding import Part
from srpo.data.examples import Example

# Ends of lines for a display or a tokenizer, other control characters, and marks that reorder what is shown.
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_ABOUT = {  # the free-text steps of the paper in words
    "query_intent": "the product and the properties that the query asks for",
    "item": "the product and its properties, as the listing states them",
}
_ABOUT_GRADES = ("L1 (irrelevant)", "L2 (mismatch)", "L3 (related)", "L4 (excellent)")
LINES = "lines"  # format of a placeholder, {name:lines}, whose value keeps its line breaks


def one_line(text: str) -> str:
    """The text with one space for each run of control characters, line separators and marks of text direction.

    A value of the data can therefore not begin a line of the prompt, which would look like another field.
    """
    return " ".join(filter(None, map(str.strip, _BREAKS.split(text)))) if _BREAKS.search(text) else text


def template_parts(template: str, setting: str = "data.prompt") -> list[tuple[str, str | None, bool]]:
    """[(text, name of the placeholder after it or None, whether its value keeps line breaks)] of a template.

    UserError, with the name of the setting, for anything but text, {name}, {name:lines} and doubled braces.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{setting} is {template!r}: {str(error).lower()}; write {{{{ and }}}} for braces that are text"
        ) from error
    for _, name, form, conversion in pieces:
        if name is not None and (not name.strip() or name.isdigit() or conversion or form not in ("", LINES)):
            raise UserError(
                f"{setting} is {template!r}: write placeholders as {{query}}, without number, conversion or format, and {{{{ and "
                "}} for braces that are text"
            )
    return [(text, name, form == LINES) for text, name, form, _ in pieces]


def wrapped(prompt: str, template: str) -> list[Part]:
    """A whole prompt inside a template with the placeholder {prompt} (field `prompt` of `srpo.sft` and `srpo.dpo`), line breaks
    and all. UserError for another placeholder, or none."""
    pieces = template_parts(template, "prompt")
    if [name for _, name, _ in pieces if name is not None] != ["prompt"]:
        raise UserError(f"prompt is {template!r}: write the placeholder {{prompt}} once, and no other")
    return [part for text, name, _ in pieces for part in (Part(text, is_data=False), Part(prompt if name else ""))]


@dataclass(frozen=True)
class PromptForm:
    """The form of the policy's prompts: `data.prompt`, and the texts of its {instructions} and {guidelines}."""

    template: str
    instructions: str = ""
    guidelines: str = ""

    @classmethod
    def of(cls, data: DataConfig, schema: StepSchema) -> PromptForm:
        """The form of these settings. Guidelines without a place of their own in the template follow the instructions.

        Raises UserError for guidelines that cannot be read or that have no place in the template.
        """
        guidelines = read_guidelines(data.guidelines, "data.guidelines")
        named = {name for _, name, _ in template_parts(data.prompt)}
        if guidelines and not named & {"instructions", "guidelines"}:
            raise UserError("data.guidelines is set, and data.prompt has no place for it: add {guidelines} to data.prompt")
        return cls(data.prompt, instructions(schema), guidelines)

    def parts(self, example: Example, *, attacked: bool = False) -> list[Part]:
        """`prompt_parts` of a pair."""
        named = {name for _, name, _ in template_parts(self.template)}
        guides = [Part(self.guidelines)] if self.guidelines else []
        after = [Part("\n\nGuidelines:\n", is_data=False), *guides] if guides and "guidelines" not in named else []
        texts = {"instructions": [Part(self.instructions, is_data=False), *after], "guidelines": guides}
        return prompt_parts(example, self.template, attacked=attacked, texts=texts)


def instructions(schema: StepSchema) -> str:
    """The task in words: the steps of a response in their order, under headers that are parsed, their answers, and the grades."""
    lines = []
    for j, spec in enumerate(schema.specs):
        last = j + 1 == schema.num_steps
        answers = _ABOUT_GRADES if last and spec.options == PAPER_GRADES else spec.options
        allowed = _either(answers) + (", from the worst to the best" if last else "")
        lines.append((spec.name, allowed if answers else _ABOUT.get(spec.name, in_words(spec.name).lower())))
    task = "Judge how relevant an item of a shop is to a search query."
    if schema.form == "json":
        keys = "\n".join(f'"{name}": {text}' for name, text in lines)
        return f"{task} Answer with one JSON object that has these keys, in this order:\n{keys}"
    steps = []
    for spec, opening, (_, text) in zip(schema.specs, schema.openings, lines, strict=True):
        steps.append(
            f"(a heading that matches the regular expression {spec.header}) {text}" if opening is None else opening + text
        )
    each = "each under its heading" if any("\n" in (opening or "\n") for opening in schema.openings) else "one line each"
    return "\n".join([f"{task} Answer in {'these steps' if len(lines) > 1 else 'this form'}, {each}:", *steps])


def read_guidelines(path: str, setting: str) -> str:
    """The text of a file of annotation guidelines; "" for no path. UserError for a file that is missing, empty or not UTF-8."""
    if not path:
        return ""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise UserError(f"{setting} is {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{setting} is {path}, which is not UTF-8: save it as UTF-8 text") from error
    if not text:
        raise UserError(f"{setting} is {path}, which is empty: write the guidelines into it, or leave the setting out")
    return text


def _either(options: Sequence[str]) -> str:
    return " or ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)


def prompt_parts(
    example: Example, template: str, *, attacked: bool = False, texts: Mapping[str, Sequence[Part]] | None = None
) -> list[Part]:
    """The prompt of a pair, as text of the template and text of the data.

    `template` has the placeholders {query}, {title}, {item} (the title, then one line "name: value" per product field), the names
    of product fields, and those of `texts`. Values are on one line (`one_line`), except with {name:lines} and in `texts`.
    `attacked` appends `Example.attack` to the title. UserError for a name that the example lacks and a template that cannot be
    read.
    """
    parts: list[Part] = []
    title = example.title + (example.attack if attacked else "")
    for text, name, lines in template_parts(template):
        parts.append(Part(text, is_data=False))
        if name is None:
            continue
        clean = str if lines else one_line
        if texts and name in texts:
            parts += texts[name]
            continue
        if name == "item":
            pairs = ((clean(key), clean(value)) for key, value in example.fields.items() if value)
            value = "\n".join([clean(title), *(f"{key}: {value}" for key, value in pairs)])
        elif name in (known := {**example.fields, "query": example.query, "title": title}):
            value = clean(known[name])
        else:
            names = ", ".join(sorted({*known, "item", *(texts or ())}))
            raise UserError(f"data.prompt has {{{name}}}, but {example.shown} has no such field: use {names}")
        parts.append(Part(value))
    return parts


def build_prompt(example: Example, template: str | PromptForm, *, attacked: bool = False) -> str:
    """The text of a pair's prompt."""
    if isinstance(template, PromptForm):
        return "".join(part.text for part in template.parts(example, attacked=attacked))
    return "".join(part.text for part in prompt_parts(example, template, attacked=attacked))
