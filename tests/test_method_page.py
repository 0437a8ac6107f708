"""docs/method.md against the source: the names that it points to exist, and the equations stand where it says.

An anchor is "`file` with `name`, `name` (Eq. 6, line 12)". The marks in parentheses are optional and belong to the file.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from srpo.core.config.train import Config
from srpo.select import SelectConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "method.md"

_NAME = r"`[A-Za-z_][\w.]*`"
_ANCHOR = re.compile(rf"`(?P<file>[\w/]+\.(?:py|h|cpp|cuh))` with (?P<names>{_NAME}(?:, {_NAME})*)(?: \((?P<marks>[^)]*)\))?")
_NUMBERS = r"\d+(?:-\d+)?(?:(?:, | and )\d+(?:-\d+)?)*"
_MARK = re.compile(rf"\b(Eq\.|lines?) ({_NUMBERS})")


def anchors(text: str) -> list[tuple[str, tuple[str, ...], str]]:
    """(file, names, marks) of every anchor."""
    return [(m["file"], tuple(re.findall(r"`([^`]+)`", m["names"])), m["marks"] or "") for m in _ANCHOR.finditer(text)]


def marks(text: str) -> set[str]:
    """The equations and lines of Algorithm 1 that a text mentions, ranges spelled out: {"Eq. 6", "line 12"}."""
    named = set()
    for match in _MARK.finditer(text):
        kind = "Eq." if match[1] == "Eq." else "line"
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", match[2]):
            named |= {f"{kind} {number}" for number in range(int(first), int(last or first) + 1)}
    return named


@cache
def source(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@cache
def defined(file: str) -> frozenset[str]:
    """Functions, classes, constants and `Class.member` of a Python file, read from its syntax tree."""
    return frozenset(_defined(ast.parse(source(file)).body))


def _defined(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from _defined(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id
        elif isinstance(node, ast.Assign):
            yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))


ANCHORS = anchors(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "names", "expected"), ANCHORS, ids=[f"{a[0]}-{a[1][0]}" for a in ANCHORS])
def test_an_anchor_points_to_something(file: str, names: tuple[str, ...], expected: str) -> None:
    assert (ROOT / file).is_file(), f"docs/method.md names {file}"
    if file.endswith(".py"):
        missing = [name for name in names if name not in defined(file)]
    else:
        missing = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", source(file))]
    assert missing == [], f"docs/method.md looks for them in {file}"
    assert sorted(marks(expected) - marks(source(file))) == [], f"docs/method.md says that {file} mentions them"


def test_every_equation_and_every_part_of_the_method_has_an_anchor() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {f"Eq. {n}" for n in range(2, 7)} <= {mark for _, _, given in ANCHORS for mark in marks(given)}
    parts = re.findall(r"^## ([34]\.\S+)", text, re.MULTILINE)
    assert parts == ["3.2", "3.2.1", "4.1.1", "4.1.2", "4.2.1", "4.2.2", "4.3", "4.3.1", "4.3.2", "4.3.3"]
    for part, body in zip(parts, re.split(r"^## [34]\.", text, flags=re.MULTILINE)[1:], strict=True):
        assert re.findall(r"^### (.+)", body, re.MULTILINE) == ["Formula", "In code", "Where we chose a reading"], part
        assert anchors(body), part


def test_every_line_of_algorithm_1_has_a_row() -> None:
    cells = re.findall(r"^\| ([\d, -]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {mark for cell in cells for mark in marks(f"lines {cell}")} == {f"line {number}" for number in range(1, 19)}


def test_every_setting_that_the_page_names_exists() -> None:
    def leaves(kind: type, prefix: str = "") -> Iterator[str]:
        for name, hint in get_type_hints(kind).items():
            yield prefix + name
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                yield from leaves(hint, f"{prefix}{name}.")

    known = {*leaves(Config), *leaves(SelectConfig)}
    areas = {name for name in known if "." not in name}
    named = re.findall(r"`([a-z_]+)\.([a-z_]+)(\*?)(?: = [^`]*)?`", PAGE.read_text(encoding="utf-8"))
    settings = [(f"{area}.{name}", star) for area, name, star in named if area in areas]
    assert settings
    assert [key for key, star in settings if not any(k.startswith(key) if star else k == key for k in known)] == []


def test_a_wrong_anchor_is_seen() -> None:
    row = "| 12 | `srpo/a.py` with `f`, `C.x` (line 12, Eq. 2-4): text |"
    assert anchors(row) == [("srpo/a.py", ("f", "C.x"), "line 12, Eq. 2-4")]
    assert marks("Eq. 2-4") == {"Eq. 2", "Eq. 3", "Eq. 4"}
    assert marks("Algorithm 1 lines 2, 4 and 6-7, Eq. 5") == {"line 2", "line 4", "line 6", "line 7", "Eq. 5"}
    assert "AdvantageConfig.gamma" in defined("srpo/core/config/train.py")
    assert "AdvantageConfig.delta" not in defined("srpo/core/config/train.py")
