"""Helpers as fixtures: nothing under tests/ can be imported by name."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def load(name: str) -> ModuleType:
    """A module of this folder."""
    spec = importlib.util.spec_from_file_location(f"policy_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def lab() -> ModuleType:
    """The module lab.py."""
    return load("lab")


@pytest.fixture(scope="session")
def ppo_lab() -> ModuleType:
    """The module ppo_lab.py."""
    return load("ppo_lab")


@pytest.fixture(scope="session")
def ranks(lab: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two ranks under torchrun wrote, in a subfolder for each lab. One launch does for all: most of its time is
    that of imports."""
    out = tmp_path_factory.mktemp("ranks")
    for name in ("lab", "ppo_lab", "loading_lab"):
        (out / name).mkdir()
    load("loading_lab").write_checkpoints(lab, out / "loading_lab")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{HERE}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [*launch, "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(HERE / "ranks.py"), str(out)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return out


@pytest.fixture(scope="session")
def two_ranks(ranks: Path) -> Path:
    """Folder with what lab.py wrote."""
    return ranks / "lab"
