"""The fences of the house, read from the source: who may import what, which way the arrows point, names, sizes, ASCII."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in ("srpo", "kernels") for p in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted(p for folder in ("bench", "tools") for p in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 400

# The layer of a module is the first name below srpo; files of srpo/ itself are programs. A module imports its own room or a lower
# layer, a program any room and no program.
ROOMS = {
    "srpo_kernels": 0,
    "core": 1,
    "algorithm": 2,
    "data": 2,
    "policy": 3,
    "scores": 3,
    "rollout": 4,
    "rewards": 5,
    "training": 6,
}
ROOMS |= dict.fromkeys(("judge_training", "selection", "experiments"), 7)
PROGRAMS = 8
# Their stages are runs of other programs: of srpo.reproduce in the lab, of srpo.train without settings in the first run.
RUNS_PROGRAMS = ("srpo.demo", "srpo.start", "srpo.train_judge", "srpo.experiments.lab", "srpo.experiments.first_run")

TRACKERS = ("srpo/core/metrics.py",)
FENCES = {
    "triton": ("kernels/",),
    "vllm": ("srpo/rollout/",),
    "megablocks": ("srpo/policy/experts.py",),
    "grouped_gemm": ("srpo/policy/experts.py",),
    "flash_attn": ("srpo/policy/varlen_kernels.py",),
    "peft": ("srpo/policy/",),
    "transformers": ("srpo/policy/", "srpo/data/tokenizer.py"),
    "tensorboard": TRACKERS,
    "torch.utils.tensorboard": TRACKERS,
    "wandb": TRACKERS,
    "trackio": TRACKERS,
    "torch.distributed": ("srpo/policy/parallel.py", "srpo/policy/checkpoint.py", "srpo/rollout/", "programs"),
}


def imports(tree: ast.AST, typing_only: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether under TYPE_CHECKING) of everything imported, also by import_module("x") and torch.distributed.x."""
    for node in ast.iter_child_nodes(tree):
        under_typing = typing_only or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        if isinstance(node, ast.Import):
            yield from ((alias.name, under_typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", under_typing) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__"):
            yield from ((str(arg.value), under_typing) for arg in node.args[:1] if isinstance(arg, ast.Constant))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed", under_typing
        yield from imports(node, under_typing)


@cache
def imported(path: Path) -> list[tuple[str, bool]]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8"))))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(module: str) -> str:
    """The room of a dotted module name: its first name below srpo; "programs" for the files of srpo/ itself."""
    names = module.split(".")
    return names[0] if names[0] == "srpo_kernels" else names[1] if len(names) > 1 and names[1] in ROOMS else "programs"


def module_of(path: Path) -> str:
    name = relative(path).removeprefix("kernels/").removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


def trespasses(path: Path) -> list[str]:
    """Third-party imports of a file outside their fence."""
    here = relative(path)
    found = []
    for name, _ in imported(path):
        for package, allowed in FENCES.items():
            inside = here.startswith(allowed) or ("programs" in allowed and room(module_of(path)) == "programs")
            if (name + ".").startswith(package + ".") and not inside:
                found.append(f"{here} imports {name}; {package} only in {', '.join(allowed)}")
    return found


def upward(path: Path) -> list[str]:
    """Imports of a file that point up or across."""
    module = module_of(path)
    here = room(module)
    problems = []
    for name, _ in imported(path):
        if name.partition(".")[0] not in ("srpo", "srpo_kernels"):
            continue
        there = room(name)
        down = ROOMS.get(there, PROGRAMS) < ROOMS.get(here, PROGRAMS)
        own = here == there and here != "programs"
        if not (down or own or (there == "programs" and module in RUNS_PROGRAMS)):
            problems.append(f"{module} ({here}) imports {name} ({there})")
    return problems


def test_third_party_packages_stay_inside_their_fences() -> None:
    assert [problem for path in SOURCES for problem in trespasses(path)] == []


def test_layer_arrows_point_down() -> None:
    assert [problem for path in SOURCES for problem in upward(path)] == []


def test_algorithm_knows_no_config() -> None:
    files = [path for path in SOURCES if relative(path).startswith("srpo/algorithm/")]
    assert files
    assert [
        (relative(p), n) for p in files for n, _ in imported(p) if n.startswith(("srpo.core.config.train", "srpo.core.settings"))
    ] == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("srpo/train.py", "import triton.language as tl"),
        ("srpo/core/batch.py", "from transformers import AutoModel"),
        ("srpo/training/update.py", "import torch\n\n\ndef f():\n    torch.distributed.barrier()"),
        ("srpo/policy/model.py", "import importlib\nimportlib.import_module('megablocks')"),
        ("srpo/scores/evaluation.py", "from torch.utils.tensorboard import SummaryWriter"),
    ],
)
def test_a_trespass_is_seen(where: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "imported", lambda _: list(imports(ast.parse(line))))
    assert len(trespasses(ROOT / where)) == 1


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("kernels/srpo_kernels/reference.py", "from srpo.core.batch import Batch"),
        ("srpo/core/batch.py", "from srpo import data"),
        ("srpo/data/esci.py", "from srpo.rewards.judge import Judge"),
        ("srpo/rollout/engine.py", "if TYPE_CHECKING:\n    from srpo.rewards.judge import Judge"),
        ("srpo/policy/model.py", "import srpo.train"),
        ("srpo/compare.py", "from srpo.evaluate import evaluate"),
    ],
)
def test_an_arrow_upward_is_seen(where: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "imported", lambda _: list(imports(ast.parse(line))))
    assert len(upward(ROOT / where)) == 1


def test_kernels_and_tests_are_no_packages() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [relative(p) for p in TESTS if p.name == "__init__.py"] == []
    assert [relative(p) for p in (ROOT / "tests").rglob("kernels*")] == []


def test_no_module_takes_a_name_that_others_import() -> None:
    """A script's folder is sys.path[0]: `logging.py` beside it would be everybody's logging."""
    taken = {*sys.stdlib_module_names, "kernels", "torch", "transformers", "triton", "vllm", "numpy"}
    named = [relative(p) for p in (*SOURCES, *SCRIPTS, *TESTS) if p.stem in taken]
    assert named == ["srpo/select.py"]  # in a package and never run by path: `python -m srpo.select`


def test_no_file_has_two_nouns() -> None:
    lengths = {relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in (*SOURCES, *SCRIPTS, *TESTS)}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_source_is_ascii() -> None:
    files = [*SOURCES, *SCRIPTS, ROOT / "Makefile", ROOT / "pyproject.toml", *(ROOT / "configs").rglob("*.toml")]
    assert [relative(p) for p in files if not p.read_bytes().isascii()] == []


def test_no_large_or_generated_file_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert [relative(p) for p in paths if p.is_file() and p.stat().st_size > 1_000_000] == []
    generated = [relative(p) for p in paths if p.suffix in {".pyc", ".so", ".safetensors", ".pt"}]
    assert generated == ["tests/golden/start/model.safetensors"]  # 300 KB: what the golden runs start from
