"""The list of srpo's programs, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def programs() -> dict[str, str]:
    """{module: name of its settings} of every file of srpo/ that calls `run_program(main, Settings)`."""
    names = {}
    for path in sorted((ROOT / "srpo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_program":
                names[".".join(path.relative_to(ROOT).with_suffix("").parts)] = ast.unparse(node.args[1])
    return names
