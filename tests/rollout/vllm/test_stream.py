"""The real vLLM on its CPU backend: groups as they finish, aborts, the support, and training one step behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small
import torch

from srpo.core.batch import read_rollouts
from srpo.core.config.demo import TinyConfig
from srpo.core.config.train import Config, VllmConfig
from srpo.core.grades import Grades
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSpec
from srpo.data.readers import write_examples
from srpo.data.tokenizer import load_tokenizer
from srpo.policy.model import load_policy, make_tiny
from srpo.rollout.engine import SamplingParams
from srpo.rollout.vllm.engine import VllmEngine
from srpo.train import train

pytestmark = pytest.mark.vllm

SIZE = TinyConfig(  # vLLM's CPU attention begins at heads of 32
    hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, num_experts=4, expert_size=32, initializer_range=0.2
)
CONFIG = VllmConfig(kv_cache_mib=64, max_num_seqs=8, bucket_mib=1, timeout_s=120)
PROMPTS = [(3, 4, 5, k) for k in range(10, 22)]
LONG = SamplingParams(max_new_tokens=100, group_size=4, ignore_eos=True)
STEPS = (
    StepSpec("look", r"\A.", r"([a-z])", tuple("abcdefg"), ("rule",), 0.5),
    StepSpec("verdict", r"[^a-z\s]", r"([a-z])", ("k", "w"), ("rule",), 1.0),
)


@pytest.fixture(scope="module")
def checkpoint(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = load_tokenizer(world.policy)
    make_tiny(tokenizer, SIZE, seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(checkpoint, config=CONFIG)
    yield engine
    engine.close()


def test_groups_come_while_others_wait(engine: VllmEngine) -> None:
    """Two groups fit at a time, so the first arrive long before the last."""
    engine.generate(PROMPTS[:1], LONG, 1)
    start, times, order = time.perf_counter(), [], []
    for i, samples in engine.stream(PROMPTS, LONG, 1):
        times.append(time.perf_counter() - start)
        order.append(i)
        assert [len(s.response_ids) for s in samples] == [100] * 4
    assert sorted(order) == list(range(12)) and times[0] < times[-1] / 2


def test_aborted_requests_stop_and_the_process_goes_on(engine: VllmEngine) -> None:
    """An abort after a quarter of the groups saves time, and later samples are those of before, without the aborted tokens."""
    pid, restarts = engine.process.pid, engine.stats()["num_restarts"]
    start = time.perf_counter()
    want = engine.generate(PROMPTS, LONG, 1)
    whole_s = time.perf_counter() - start
    aborted_s = []
    for _ in range(3):
        start = time.perf_counter()
        with closing(engine.stream(PROMPTS, LONG, 1)) as groups:
            taken = [next(groups) for _ in range(3)]
        aborted_s.append(time.perf_counter() - start)
        assert engine.stats()["num_tokens"] == 3 * 4 * 100 == sum(len(s.response_ids) for _, group in taken for s in group)
    assert min(aborted_s) < 0.7 * whole_s
    got = engine.generate(PROMPTS, LONG, 1)
    assert [s.response_ids for s in got] == [s.response_ids for s in want]
    assert all(a.sampling_logprobs == pytest.approx(b.sampling_logprobs, abs=1e-4) for a, b in zip(got, want, strict=True))
    assert engine.process.pid == pid and engine.stats()["num_restarts"] == restarts


def test_the_support_is_the_trainer_s(engine: VllmEngine, checkpoint: Path) -> None:
    params = SamplingParams(max_new_tokens=12, group_size=3, top_k=7, temperature=0.8, stop_ids=(2,), support=True)
    samples = engine.generate(PROMPTS, params, 3)
    model: Any = load_policy(checkpoint)
    model.config._attn_implementation = "eager"
    bare = engine.generate(PROMPTS, replace(params, support=False), 3)
    assert [s.response_ids for s in samples] == [s.response_ids for s in bare]
    for sample in samples:
        prompt = PROMPTS[sample.prompt_index]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *sample.response_ids]])).logits[0, len(prompt) - 1 : -1]
        assert sample.support is not None and sample.support.shape == (len(sample.response_ids), 7)
        assert torch.from_numpy(sample.support.copy()).long().sort().values.equal(logits.topk(7).indices.sort().values)
        assert all(token in row for token, row in zip(sample.response_ids, sample.support.tolist(), strict=True))


def settings(world: Any, checkpoint: Path, folder: Path, **changes: Any) -> Config:
    unlabelled = (None, None)
    write_examples(folder / "pairs.jsonl", (replace(e, gold=unlabelled, truth=unlabelled, tags={}) for e in world.examples()))
    common: dict[str, Any] = {
        "num_steps": 4,
        "steps": StepsConfig.of(STEPS),
        "grades": Grades(STEPS[-1].options),
        "data": {"train": str(folder / "pairs.jsonl")},
        "policy": {"path": str(checkpoint)},
        "reward": {"judge": "none"},
        "sampler": {"difficulty_high": 2.0},
        "optimizer": {"lr": 1e-3},
    }
    rollout = {"engine": "vllm", "vllm": vars(CONFIG), "num_prompts": 8, "group_size": 4, "max_new_tokens": 24}
    return world.config(folder / "run", **{**common, **changes, "rollout": {**rollout, **changes.get("rollout", {})}})


def test_training_one_step_behind(world: Any, checkpoint: Path, tmp_path: Path) -> None:
    """With cut groups, prefetch and the engine's support: trainer and sampler differ by one update, and within bounds."""
    rollout = {"off_policy_steps": 1, "oversample": 0.5, "support": "replay", "top_k": 50}
    train(settings(world, checkpoint, tmp_path, rollout=rollout, loss={"importance": "truncate"}), small.ONE)
    lines = small.metrics_of(tmp_path / "run")
    versions: dict[int, set[int]] = {}
    for step, r in read_rollouts(tmp_path / "run/rollouts.jsonl"):
        versions.setdefault(step, set()).add(r.policy_version)
    assert versions == {1: {0}, 2: {0}, 3: {1}, 4: {2}}
    assert [line["rollout/num_cut_groups"] for line in lines] == [4] * 4
    assert [line["rollout/num_responses"] for line in lines] == [32] * 4
    assert lines[0]["rollout/mismatch_kl"] < 1e-8 < 1e-6 < lines[1]["rollout/mismatch_kl"] < 0.5
    assert lines[0]["rollout/mismatch_ratio_max"] == pytest.approx(1.0, abs=1e-4)
    mean, p99, largest = (lines[1][f"rollout/mismatch_ratio_{name}"] for name in ("mean", "p99", "max"))
    assert mean < p99 < largest
    assert all(0 <= line["rollout/importance_clip_frac"] < 0.5 for line in lines)


@pytest.mark.slow
def test_scored_meanwhile_or_afterwards(world: Any, checkpoint: Path, tmp_path: Path) -> None:
    """The first step, with the checkpoint's weights, gives the same rollouts and scores either way."""
    runs = []
    for overlap in ("auto", "off"):
        (tmp_path / overlap).mkdir()
        cfg = settings(world, checkpoint, tmp_path / overlap, num_steps=1, rollout={"overlap": overlap})
        train(cfg, small.ONE)
        rows = [(r.group, r.response_ids, r.step_rewards) for _, r in read_rollouts(tmp_path / overlap / "run/rollouts.jsonl")]
        runs.append(rows)
    assert runs[0] == runs[1]
