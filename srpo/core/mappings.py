"""Types of settings that map names to values: a table in TOML, `--data.columns query=q title=name` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

Plain = bool | int | float | str


def _spec(read: Callable[[str], Any], show: Callable[[Any], str]) -> PrimitiveConstructorSpec[Any]:
    def from_arguments(arguments: list[str]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if not equals or not name or name in table:
                raise ValueError(f"{argument!r}: write NAME=VALUE, each name once")
            table[name] = read(value)
        return table

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=from_arguments,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda table: [f"{name}={show(value)}" for name, value in table.items()],
    )


def _plain(text: str) -> Plain:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


Texts = Annotated[dict[str, str], _spec(str, str)]
Values = Annotated[dict[str, Plain], _spec(_plain, lambda value: value if isinstance(value, str) else json.dumps(value))]
