"""Do two checkouts differ in comments and docstrings only?   python tools/same_code.py BASE NEW

BASE and NEW are folders of checkouts, or git revisions, which are checked out into a temporary folder. Python files are compared
by syntax tree without docstrings, TOML files by value, C++ and CUDA files line by line without comments and blank lines. A file
that exists on one side only is a difference.
Exit code 0: the same code. 1: the files that differ are listed. 2: a side cannot be read.

The comment after a setting is its help text, so `--help` may change while this tool finds the same code.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the default, but not under PYTHONSAFEPATH

from same_numbers import checkout

FOLDERS = ("srpo", "kernels", "csrc", "tests", "bench", "tools", "typings", "configs")
# A literal (kept), or a run of comments, spaces and tabs (becomes one space). The lookbehind leaves out the ' of 1'000.
_C_TOKENS = re.compile(r"""("(?:\\.|[^"\\])*"|(?<!\w)'(?:\\.|[^'\\])*')|(?:/\*.*?\*/|//[^\n]*|[ \t]+)+""", re.DOTALL)


def python_code(text: str) -> str:
    """The syntax tree of a Python file, without docstrings, comments and line numbers."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def c_code(text: str) -> list[str]:
    """The lines of a C++ or CUDA file, without comments, blank lines and indentation."""
    lines = _C_TOKENS.sub(lambda match: match[1] or " ", text).splitlines()
    return [line.strip() for line in lines if line.strip()]


READERS: dict[str, Callable[[str], Any]] = {".py": python_code, ".pyi": python_code, ".toml": tomllib.loads}
READERS |= dict.fromkeys((".cpp", ".cu", ".cuh", ".h"), c_code)


def code(root: Path) -> dict[str, Any]:
    """{relative path: code} of every code file of a checkout. Raises ValueError for a file that cannot be parsed."""
    paths = [root / "pyproject.toml", *(path for folder in FOLDERS for path in sorted((root / folder).rglob("*")))]
    files = {}
    for path in paths:
        if path.suffix in READERS and path.is_file():
            try:
                files[path.relative_to(root).as_posix()] = READERS[path.suffix](path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"{path} cannot be parsed: {error}") from error
    if not files:
        raise ValueError(f"{root} has no code: it is not a checkout of this project")
    return files


def differences(base: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per file that differs or exists on one side only."""
    lines = []
    for name in sorted(base.keys() | new.keys()):
        if name not in new:
            lines.append(f"only in BASE: {name}")
        elif name not in base:
            lines.append(f"only in NEW: {name}")
        elif base[name] != new[name]:
            lines.append(f"differs: {name}")
    return lines


def main() -> int:
    """Compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0].partition("   ")[0])
    parser.add_argument("base", help="checkout or git revision to compare with")
    parser.add_argument("new", help="checkout or git revision under test")
    args = parser.parse_args()
    try:
        with ExitStack() as stack:
            base, new = (code(stack.enter_context(checkout(name))) for name in (args.base, args.new))
    except subprocess.CalledProcessError:
        print("error: git could not check out a side: BASE and NEW are folders or git revisions", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = differences(base, new)
    num_files = len(base.keys() | new.keys())
    print("\n".join([*lines, f"{len(lines)} of {num_files} files differ" if lines else f"same code in {num_files} files"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
