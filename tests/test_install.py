"""`tools/install.py`: no CUDA build of torch without a GPU, everything pinned."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path("/nowhere/bin/python")


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("srpo_install", ROOT / "tools" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(monkeypatch: pytest.MonkeyPatch, module: ModuleType, chosen: list[str], installed: str = "") -> list[list[str]]:
    """Let pip choose these packages in a dry run and python report this torch; returns the commands that are run."""
    commands: list[list[str]] = []

    def run(command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        commands.append(words)
        if "--report" in words:
            report = {"install": [{"metadata": {"name": name}} for name in chosen]}
            Path(words[words.index("--report") + 1]).write_text(json.dumps(report), encoding="utf-8")
        return subprocess.CompletedProcess(words, 0, stdout=installed + "\n")

    monkeypatch.setattr(module.subprocess, "run", run)
    return commands


@pytest.mark.parametrize("extra", ["nvidia-cudnn-cu13", "nvidia_nccl_cu13", "cuda-toolkit"])
def test_an_index_of_cuda_builds_is_left_for_the_cpu_index(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    monkeypatch.setenv("TORCH_CPU_INDEX", "https://cpu.example/simple")
    commands = answer(monkeypatch, install, ["torch", "sympy", extra])
    install.install_cpu_torch(PYTHON)
    version = install.pinned("torch")
    assert commands[-1][-4:] == ["--no-deps", "--index-url", "https://cpu.example/simple", f"torch=={version}+cpu"]


def test_an_index_that_serves_the_cpu_build_is_used(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = answer(monkeypatch, install, ["torch", "sympy", "networkx"])
    install.install_cpu_torch(PYTHON)
    assert commands[-1][-1] == f"torch=={install.pinned('torch')}"
    assert not any("--index-url" in command for command in commands)
    assert not any("--dry-run" in command for command in commands[-1:])


@pytest.mark.parametrize("local", ["", "+cpu"])
def test_a_torch_that_is_there_is_kept(install: ModuleType, monkeypatch: pytest.MonkeyPatch, local: str) -> None:
    commands = answer(monkeypatch, install, ["nvidia-cublas"], installed=install.pinned("torch") + local)
    install.install_cpu_torch(PYTHON)
    assert not any("install" in command for command in commands)


def test_constraints_pin_what_the_project_names(install: ModuleType) -> None:
    lines = [line for line in install.CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-zA-Z0-9._-]+==[a-zA-Z0-9.]+", line)] == []
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert sorted(names) == sorted(set(names))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["dev"], *extras["bench"], *extras["wandb"], *extras["trackio"]]
    assert {re.split(r"[\[><=;]", requirement)[0] for requirement in wanted} <= set(names)
