"""`python -m srpo` lists the programs, from their source alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from programs import ROOT, programs


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_every_program_is_listed_with_its_line() -> None:
    done = run("-m", "srpo")
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"^  (srpo\.\w+) +(\S.*\S)$", done.stdout, flags=re.MULTILINE))
    assert lines.keys() == programs().keys() and "srpo.train" in lines
    assert all(line.isascii() and "`" not in line for line in lines.values())
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert run("-m", "srpo", "-h").stdout == done.stdout


@pytest.mark.parametrize("module", sorted(programs()))
def test_a_docstring_begins_with_purpose_and_command(module: str) -> None:
    """Otherwise the program's line in the list would be cut off in the wrong place."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    assert re.match(rf"\w.{{10,80}}: `python -m {re.escape(module)}\b", first), first


def test_the_list_imports_only_the_standard_library() -> None:
    code = (
        "import runpy, sys\ntry:\n    runpy.run_module('srpo', run_name='__main__')\nfinally:\n    print(*sys.modules, sep='\\n')"
    )
    done = run("-c", code)
    assert done.returncode == 0 and "srpo.train " in done.stdout, done.stderr
    assert not {"torch", "tyro", "numpy", "transformers", "srpo.train", "srpo.core.settings"} & set(done.stdout.splitlines())


def test_a_program_after_it_is_refused() -> None:
    done = run("-m", "srpo", "train")
    assert done.returncode == 2 and "python -m srpo.train" in done.stderr and not done.stdout
