"""Prompt of a query-item pair."""

from __future__ import annotations

import re
import string

from srpo.core.errors import UserError
from srpo.data.encoding import Part
from srpo.data.examples import Example

# Ends of lines for a display or a tokenizer, other control characters, and marks that reorder what is shown.
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
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


def prompt_parts(example: Example, template: str, *, attacked: bool = False) -> list[Part]:
    """The prompt of a pair, as text of the template and text of the data.

    `template` (config field `data.prompt`) has the placeholders {query}, {title}, {item} (the title, then one line "name: value"
    per product field) and the names of product fields. Values are on one line (`one_line`), except with {name:lines}. `attacked`
    appends `Example.attack` to the title. UserError for a name that the example lacks and a template that cannot be read.
    """
    parts: list[Part] = []
    title = example.title + (example.attack if attacked else "")
    for text, name, lines in template_parts(template):
        parts.append(Part(text, is_data=False))
        if name is None:
            continue
        clean = str if lines else one_line
        if name == "item":
            pairs = ((clean(key), clean(value)) for key, value in example.fields.items() if value)
            value = "\n".join([clean(title), *(f"{key}: {value}" for key, value in pairs)])
        elif name in (known := {**example.fields, "query": example.query, "title": title}):
            value = clean(known[name])
        else:
            names = ", ".join(sorted({*known, "item"}))
            raise UserError(f"data.prompt has {{{name}}}, but {example.example_id} has no such field: use {names}")
        parts.append(Part(value))
    return parts


def build_prompt(example: Example, template: str, *, attacked: bool = False) -> str:
    """The text of `prompt_parts`."""
    return "".join(part.text for part in prompt_parts(example, template, attacked=attacked))
