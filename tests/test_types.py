"""`make types` gives the same answer with and without each optional package: pyright sees the stubs in typings/ instead."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
import venv
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("pyright", reason="needs pyright: `make types` installs it")

ROOT = Path(__file__).resolve().parents[1]
TYPINGS = ROOT / "typings"
OPTIONAL = ("triton", "vllm", "megablocks", "grouped_gemm", "flash_attn", "trl", "datasets")
OPTIONAL += ("tensorboard", "torch.utils.tensorboard", "wandb", "trackio")
STUB = "from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n"


@cache
def optional_imports() -> dict[str, set[str]]:
    """{module: names imported from it} of all import statements that name an optional package."""
    imports: dict[str, set[str]] = {}
    for path in (path for folder in ("srpo", "kernels", "tests", "bench", "tools") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named = {alias.name: set() for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                named = {str(node.module): {alias.name for alias in node.names}}
            else:
                continue
            for module, names in named.items():
                if f"{module}.".startswith(tuple(f"{package}." for package in OPTIONAL)):
                    imports.setdefault(module, set()).update(names)
    return imports


def test_every_import_of_an_optional_package_has_a_stub() -> None:
    """Pyright takes a submodule without a stub from the installed package, even if the package itself has one."""
    stubs = {path.relative_to(TYPINGS).with_suffix("").as_posix().replace("/", "."): path for path in TYPINGS.rglob("*.pyi")}
    assert {name.removesuffix(".__init__") for name in stubs} == optional_imports().keys()
    assert [name for name, path in stubs.items() if path.read_text(encoding="utf-8") != STUB] == []


def pyright_errors(python: Path, file: Path) -> set[str]:
    """Messages of pyright on the file, with the settings of pyproject.toml and the packages of that interpreter."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]
    settings |= {"include": [file.name], "extraPaths": [], "stubPath": str(TYPINGS)}
    del settings["venv"], settings["venvPath"]  # a venv of the settings that exists wins over --pythonpath
    (file.parent / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", str(file.parent), "--pythonpath", str(python)]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False, timeout=240)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    return {f"{item['range']['start']['line'] + 1}: {item['message']}" for item in report["generalDiagnostics"]}


def test_installed_packages_do_not_decide(tmp_path: Path) -> None:
    """The same import statements in an environment without packages, and in one where each optional module exists, is typed and
    is empty, so that every name from it would be an error. `not_stubbed` shows that pyright looks into these environments."""
    lines = ["from not_stubbed import value", "import not_stubbed.part as part"]
    for index, (module, names) in enumerate(sorted(optional_imports().items())):
        lines += [f"import {module} as module_{index}", f"print(module_{index}.anything(1).more)"]
        lines += [line for name in sorted(names) for line in (f"from {module} import {name}", f"print({name}.anything)")]
    file = tmp_path / "imports.py"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    errors = {}
    for packages in ("none", "all"):
        venv.create(tmp_path / packages, with_pip=False, symlinks=True)
        (site,) = (tmp_path / packages).glob("lib/python*/site-packages")
        for module in ("not_stubbed", *optional_imports()) if packages == "all" else ():
            folder = site.joinpath(*module.split("."))
            folder.mkdir(parents=True, exist_ok=True)
            for parent in (folder, *folder.relative_to(site).parents[:-1]):
                (site / parent / "__init__.py").touch()
            (site / module.partition(".")[0] / "py.typed").touch()
        errors[packages] = pyright_errors(tmp_path / packages / "bin" / "python", file)
    assert errors == {
        "none": {'1: Import "not_stubbed" could not be resolved', '2: Import "not_stubbed.part" could not be resolved'},
        "all": {'1: "value" is unknown import symbol', '2: Import "not_stubbed.part" could not be resolved'},
    }
