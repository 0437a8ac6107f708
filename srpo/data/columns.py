"""Columns of files as keys of the schema in docs/data.md: `data.columns`, such as query=q title=name label=judgement."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from srpo.core.errors import UserError
from srpo.core.grades import spelled
from srpo.core.steps import StepSchema

KEYS = ("example_id", "query_id", "item_id", "query", "title", "fields", "gold", "truth", "tags", "grade", "label")
NEEDED = ("query", "title")
ALL = "*"  # fields=*, tags=*, ignore=*: all columns that nothing else names
_OPEN, _OF_STEPS = ("fields", "tags"), ("gold", "truth")


class _Column(NamedTuple):
    """A column that is read: its name, the key that it fills, and the entry of that key ("" for the whole key)."""

    name: str
    key: str
    entry: str


class Columns:
    """The keys that the columns of a file fill: those of `mapping` (key = column), else a column named like a key fills it.

    Keys are those of the schema, and entries of them: fields.NAME, tags.NAME, gold.STEP, truth.STEP. UserError for another key.
    """

    def __init__(self, mapping: Mapping[str, str], schema: StepSchema) -> None:
        self.mapping, self._steps = dict(mapping), schema.names
        self._rest = [key for key in (*_OPEN, "ignore") if self.mapping.get(key) == ALL]
        if len(self._rest) > 1:
            raise UserError(f"columns has {self._rest[0]}=* and {self._rest[1]}=*: keep one of them")
        self._keys = {key: column for key, column in self.mapping.items() if key not in self._rest}
        for key, column in self._keys.items():
            if key == "ignore":
                raise UserError(
                    f"columns has ignore={column}: write ignore=*, which leaves out all columns that no other key names"
                )
            if not self._is_key(key):
                raise UserError(self._unknown_key(key))
            if column == ALL or not column:
                raise UserError(f"columns has {key}={column}: name a column of the file; only fields, tags and ignore take *")
        self._plans: dict[tuple[str, ...], list[_Column] | None] = {}
        self._unseen = set(self._keys.values())

    def table(self, names: Sequence[str], where: str) -> list[str]:
        """The columns of a table that are read. UserError for a column of the mapping that is not there, one that nothing reads,
        and a table without a query or a title."""
        for key, column in self._keys.items():
            if column not in names:
                raise UserError(f"{where}: no column {column!r} (columns {key}={column}): {_of(column, names)}")
        for key in NEEDED:
            if key not in self._keys and key not in names:
                raise UserError(
                    f"{where}: no column {key!r}: name the one that holds it in the setting columns, as {key}=COLUMN (the "
                    f"columns are {', '.join(names)[:200]})"
                )
        plan = self._plan(tuple(names), where)
        return list(names) if plan is None else list(dict.fromkeys(column.name for column in plan))

    def row(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """A row of a file as a row of the schema; an empty text is no entry of fields, tags, gold and truth.

        UserError for a column that nothing reads, and a missing query or title of the mapping.
        """
        names = tuple(row)
        plan = self._plans[names] if names in self._plans else self._plan(names, where)
        if plan is None:
            return row
        out: dict[str, Any] = {}
        for name, key, entry in plan:
            value = row[name]
            if not entry:
                out[key] = value
            elif value is not None and value != "":
                out.setdefault(key, {})[entry] = value if isinstance(value, str) else _as_text(value)
        for key in _OF_STEPS:
            if isinstance(labels := out.get(key), dict):
                out[key] = [labels.get(step) for step in self._steps]
        for key in NEEDED:
            if key not in out and key in self._keys:
                raise UserError(f"{where}: {self._keys[key]!r} (columns {key}={self._keys[key]}) is missing")
        return out

    def check_seen(self, path: str) -> None:
        """Raise UserError for a column of the mapping that no row had."""
        for key, column in self._keys.items():
            if column in self._unseen:
                names = sorted({name for names in self._plans for name in names})
                raise UserError(f"{path}: no row has {column!r} (columns {key}={column}): {_of(column, names)}")

    def _plan(self, names: tuple[str, ...], where: str) -> list[_Column] | None:
        """How rows with these columns are read; None: as they are."""
        self._unseen.difference_update(names)
        plan = [_Column(column, *_parts(key)) for key, column in self._keys.items() if column in names]
        mapped = set(self._keys.values())
        for name in names:
            if name in mapped:
                continue
            if name not in self._keys and self._is_key(name):
                plan.append(_Column(name, *_parts(name)))
            elif not name and self._rest != ["ignore"]:
                raise UserError(f"{where}: a column has no name: name it, remove it, or leave it out by columns ignore=*")
            elif not self._rest:
                raise UserError(f"{where}: {self._unused(name)}")
            elif self._rest != ["ignore"]:
                plan.append(_Column(name, self._rest[0], name))
        for whole in {column.key for column in plan if not column.entry}:
            if both := [column for column in plan if column.key == whole and column.entry]:
                raise UserError(f"{where}: {whole!r} and {whole}.{both[0].entry} are both given: keep one of them")
        as_it_is = not self.mapping and all(not column.entry for column in plan)
        self._plans[names] = None if as_it_is else plan
        return self._plans[names]

    def _is_key(self, key: str) -> bool:
        first, dot, entry = key.partition(".")
        if not dot:
            return key in KEYS
        return bool(entry) and (first in _OPEN or (first in _OF_STEPS and entry in self._steps))

    def _unknown_key(self, key: str) -> str:
        first, _, entry = key.partition(".")
        if first in _OF_STEPS and entry:
            return f"columns has {key}, but no step is named {entry!r}: {_of(entry, self._steps, 'the steps are')}"
        return f"columns has the key {key!r}: {_of(key, (*KEYS, 'fields.NAME', 'tags.NAME', 'ignore'), 'keys are')}"

    def _unused(self, name: str) -> str:
        if name in self._keys:
            fix = f"{name} is read from {self._keys[name]!r}: remove one of the two columns, or leave it out by columns ignore=*"
            return f"the column {name!r} is not used, because {fix}"
        return unknown_key(name)


def unknown_key(name: str) -> str:
    """The message for a key or column that the schema does not know and the mapping does not name."""
    near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.75)
    if near:
        return f"unknown key {name!r}: did you mean {near[0]!r}? The setting columns maps it, as {near[0]}={name}"
    return (
        f"unknown key {name!r}: product fields go into 'fields', strata into 'tags'; in the setting columns, fields.{name}="
        f"{name} maps it, fields=* all such columns, and ignore=* leaves them out"
    )


def _parts(key: str) -> tuple[str, str]:
    first, _, entry = key.partition(".")
    return first, entry


def _of(name: str, known: Sequence[str], are: str = "the columns are") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"the nearest is {near[0]!r}" if near else f"{are} {', '.join(known)[:200]}"


def _as_text(value: Any) -> Any:
    """A number or truth value as text, 12.0 as 12; other values as they are, for the error of the row's check."""
    text = spelled(value)
    return value if text is None else text
