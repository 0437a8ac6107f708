"""How a pair becomes a prompt."""

from __future__ import annotations

import string

from srpo.data.examples import Example


def build_prompt(example: Example, template: str) -> str:
    """The prompt text of a pair.

    `template` is a `str.format` string (config field `data.prompt`) over {query}, {title}, {item} (the title and the other
    fields, one "name: value" line each) and the name of any product field. ValueError where it names a field that the example
    lacks.
    """
    item = "\n".join([example.title, *(f"{name}: {value}" for name, value in example.fields.items() if value)])
    known = {**example.fields, "query": example.query, "title": example.title, "item": item}
    wanted = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    if missing := sorted(wanted - known.keys()):
        raise ValueError(
            f"data.prompt names {{{missing[0]}}}, which {example.example_id} has not: it has {', '.join(sorted(known))}"
        )
    return template.format(**known)
