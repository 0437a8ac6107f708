"""Helpers as fixtures: nothing under tests/ can be imported by name."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

LAB = Path(__file__).with_name("lab.py")


@pytest.fixture(scope="session")
def lab() -> ModuleType:
    """The module lab.py."""
    spec = importlib.util.spec_from_file_location("policy_lab", LAB)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what lab.py's main wrote under torchrun with two processes."""
    out = tmp_path_factory.mktemp("two_ranks")
    root = LAB.parents[2]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, f"--master-port={port}", str(LAB), str(out)]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return out
