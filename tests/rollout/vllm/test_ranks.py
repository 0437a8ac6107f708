"""FSDP2 over two processes, each with its own fake engine (tests/helpers/fake_engine.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from srpo.core.config.demo import TinyConfig
from srpo.policy.model import make_tiny

HELPER = Path(__file__).resolve().parents[2] / "helpers" / "vllm_ranks.py"
ROOT = HELPER.parents[2]


@pytest.mark.slow
def test_sharded_weights_arrive_whole_on_every_rank_although_one_engine_dies(tmp_path, world):
    """The rank whose engine fails still takes part in the other rank's gathers, so neither waits forever."""
    from srpo.data.tokenizer import load_tokenizer

    size = TinyConfig(hidden_size=32, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=32, num_experts=3, expert_size=32)
    make_tiny(load_tokenizer(world.policy), size, seed=1).save_pretrained(tmp_path)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "--local-addr=127.0.0.1", str(HELPER), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result["sums"] == pytest.approx([result["total"], 2 * result["total"]], rel=1e-5)
        assert (result["num_restarts"], result["num_warnings"]) == (rank, rank) and result["num_buckets"] > 2
