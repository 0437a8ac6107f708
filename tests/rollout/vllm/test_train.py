"""Training with the real vLLM on its CPU backend, through `srpo.train`."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import small_world as small
import torch

from srpo.core.batch import read_rollouts
from srpo.core.config.train import Config
from srpo.data.readers import write_examples
from srpo.data.tokenizer import load_tokenizer
from srpo.data.world import World
from srpo.policy.model import load_policy, make_tiny
from srpo.sft import sft
from srpo.train import train

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("error:restarting vLLM:RuntimeWarning", "error:vLLM failed:RuntimeWarning"),
]

VLLM = {"engine": "vllm", "vllm": {"kv_cache_mib": 64, "bucket_mib": 1}}


@pytest.fixture(scope="module")
def policy(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world's policy with heads of 32, the shortest that vLLM's CPU attention takes."""
    folder = tmp_path_factory.mktemp("long_heads")
    tokenizer = load_tokenizer(world.policy)
    make_tiny(tokenizer, dataclasses.replace(small.TINY, head_dim=32), 0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    settings = world.sft_config(folder / "sft", num_steps=120, policy={"path": str(folder / "base")})
    return sft(settings, small.ONE)


@pytest.fixture
def run(world: Any, policy: Path) -> Callable[..., tuple[Config, list[dict[str, float]]]]:
    """A function that trains from the policy and returns the settings and the metrics."""

    def trained(folder: Path, **changes: Any) -> tuple[Config, list[dict[str, float]]]:
        cfg = world.config(folder, policy={"path": str(policy)}, **changes)
        assert train(cfg, small.ONE) == folder / "policy"
        return cfg, small.metrics_of(folder)

    return trained


def test_a_run_samples_with_vllm_from_the_trainers_weights(run, world, policy, tmp_path):
    changes = {"num_steps": 3, "data": {"train": str(world.train), "eval": str(world.eval)}}
    cfg, lines = run(tmp_path / "run", rollout={**VLLM, "num_prompts": 4, "group_size": 16}, **changes)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
        assert line["rollout/num_responses"] == 64 and line["rollout/parse_rate"] > 0.1
        assert abs(line["rollout/mismatch_kl"]) < 1e-6 and line["rollout/mismatch_max"] < 1e-3
    assert lines[-1]["eval/num_examples"] == 12
    versions = [(step, rollout.policy_version) for step, rollout in read_rollouts(Path(cfg.run_dir) / "rollouts.jsonl")]
    assert versions == [(step, step - 1) for step in (1, 2, 3) for _ in range(64)]
    assert not small.same_bits(small.parameters_of(policy), small.parameters_of(Path(cfg.run_dir) / "policy"))
    assert load_policy(Path(cfg.run_dir) / "policy").config.head_dim == 32


@pytest.mark.slow
def test_training_gains_with_vllm_what_it_gains_with_the_local_engine(run, tmp_path):
    """On pairs whose item is always of another kind: the right answer is always the same, and the policy seldom gives it."""
    examples = World(0).examples("train", 4000, start=small.NUM_PAIRS)
    write_examples(tmp_path / "strangers.jsonl", islice((e for e in examples if e.gold[2] == "mismatch"), 16))
    seed = torch.seed() % 1000
    print("seed", seed)
    changes = {"seed": seed, "num_steps": 10, "data": {"train": str(tmp_path / "strangers.jsonl")}, "optimizer": {"lr": 3e-3}}
    last = {}
    for engine, rollout in {"vllm": VLLM, "local": {}}.items():
        _, lines = run(tmp_path / engine, rollout={**rollout, "num_prompts": 8, "group_size": 8}, **changes)
        rewards = [line["reward/total"] for line in lines]
        last[engine] = statistics.mean(rewards[-3:])
        assert last[engine] > rewards[0] + 0.3, (engine, rewards)
    assert abs(last["vllm"] - last["local"]) < 0.3, last
