"""Prompt of a query-item pair."""

from __future__ import annotations

import string

from srpo.core.errors import UserError
from srpo.data.examples import Example


def build_prompt(example: Example, template: str) -> str:
    """The prompt text of a pair.

    `template` is a `str.format` string (config field `data.prompt`) with {query}, {title}, {item} (the title, then one line
    "name: value" per product field) and the names of product fields. UserError if it names a field that the example lacks.
    """
    item = "\n".join([example.title, *(f"{name}: {value}" for name, value in example.fields.items() if value)])
    known = {**example.fields, "query": example.query, "title": example.title, "item": item}
    wanted = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    if missing := sorted(wanted - known.keys()):
        raise UserError(
            f"data.prompt has {{{missing[0]}}}, but {example.example_id} has no such field: use {', '.join(sorted(known))}"
        )
    return template.format(**known)
