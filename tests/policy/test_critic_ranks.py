"""Two ranks under FSDP2 make the advantages and the critic's step that one process makes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

LAB = Path(__file__).with_name("ppo_lab.py")


@pytest.fixture(scope="module")
def ppo_lab() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ppo_lab", LAB)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks have written."""
    out, root = tmp_path_factory.mktemp("ppo_ranks"), LAB.parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [*launch, "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(LAB), str(out)]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(out / "saved.pt", weights_only=True)


@pytest.mark.parametrize("name", ["uneven", "idle"])
def test_two_ranks_are_one(lab: ModuleType, ppo_lab: ModuleType, saved: dict[str, Any], tmp_path: Path, name: str) -> None:
    one = ppo_lab.step(lab, lab.batches(7), lab.one_process(), tmp_path / "dump.pt")
    two = saved[name]
    torch.testing.assert_close(two["advantages"], one["advantages"], rtol=1e-4, atol=1e-5)
    assert one["advantages"].abs().max() == 1.5 and one["metrics"]["advantage/clip_frac"] > 0
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)
    for key, grad in one["gradients"].items():
        assert (two["gradients"][key] - grad).norm() <= 1e-4 * grad.norm() + 1e-8, key


def test_a_sharded_critic_goes_on_bit_for_bit(saved: dict[str, Any]) -> None:
    assert saved["same"] == [[True, True]] * 2
