"""The dead-code check of `make lint` finds dead code, and no entry of its allow-list in pyproject.toml has become useless."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

vulture = pytest.importorskip("vulture", reason="needs vulture: `make lint` installs it")

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["vulture"]


def unused(paths: list[Path], **settings: Any) -> set[str]:
    """Names that vulture reports for these files and folders."""
    checker = vulture.Vulture(**settings)
    checker.scavenge([str(path) for path in paths])
    return {item.name for item in checker.get_unused_code()}


def test_dead_functions_methods_classes_and_constants_are_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        """
CONSTANT = 1
def function(): ...
class Class:
    def method(self): ...
class Used:
    def used(self): ...
    def on_start(self): ...
Used().used()
""",
        encoding="utf-8",
    )
    settings = {name: SETTINGS[name] for name in ("ignore_names", "ignore_decorators")}
    assert unused([path], **settings) == {"CONSTANT", "function", "Class", "method"}


def test_every_entry_of_the_allow_list_is_needed() -> None:
    paths = [ROOT / folder for folder in SETTINGS["paths"]]
    names = unused(paths, ignore_decorators=SETTINGS["ignore_decorators"])
    assert [entry for entry in SETTINGS["ignore_names"] if not any(fnmatchcase(name, entry) for name in names)] == []
    assert "_" in unused(paths)  # without ignore_decorators
