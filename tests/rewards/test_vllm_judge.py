"""The judge on the real vLLM, as a worker process and behind `vllm serve`, writes the same texts as the local judge."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small
import torch
from judge_server import free_port

from srpo.core.batch import Rollout
from srpo.core.config.demo import TinyConfig
from srpo.core.config.train import RewardConfig, VllmConfig
from srpo.core.step_presets import PAPER
from srpo.data.tokenizer import load_tokenizer
from srpo.policy.model import make_tiny
from srpo.rewards.build import build_judge, open_service_judge, open_vllm_judge
from srpo.rewards.engine_writer import EngineWriter
from srpo.rewards.judge import GenerativeJudge
from srpo.rollout.vllm.engine import VllmEngine
from srpo.rollout.vllm.settings import worker_environment

pytestmark = pytest.mark.vllm

SCHEMA = PAPER
# vLLM's CPU attention needs a head size of at least 32.
SIZE = TinyConfig(
    hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, num_experts=4, expert_size=64, max_context=256
)


@pytest.fixture(scope="module")
def checkpoint(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge with random weights: its texts are long and differ between prompts."""
    folder, tokenizer = tmp_path_factory.mktemp("judge"), load_tokenizer(world.policy)
    model = make_tiny(tokenizer, SIZE, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(checkpoint: Path, **changes: Any) -> RewardConfig:
    vllm = VllmConfig(kv_cache_mib=64, max_num_seqs=16, timeout_s=120)
    plain = RewardConfig("generative", str(checkpoint), judge_max_new_tokens=24, judge_vllm=vllm)
    return replace(plain, **changes)


def asked_about(world: Any) -> tuple[list[Rollout], list[Any]]:
    examples = world.examples()[:12]
    texts = [f"response {i} " * (1 + 30 * (i == 7)) for i in range(12)]  # response 7 is too long for the context
    rollouts = [Rollout.from_answers(e.example_id, (None,) * 5, text=texts[i], group=i) for i, e in enumerate(examples)]
    return rollouts, examples


def written(judge: Any, world: Any) -> list[str]:
    assert isinstance(judge, GenerativeJudge)
    return [text for (text,) in judge.write(*asked_about(world), judge.params, 0)]


@pytest.fixture(scope="module")
def local(world: Any, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cfg = replace(world.config(tmp_path_factory.mktemp("run")), reward=settings(checkpoint))
    texts = written(build_judge(cfg, SCHEMA, small.ONE), world)
    assert texts[7] == "" and len(set(texts)) == 12
    return texts


def test_a_judge_in_vllm_s_process_writes_what_the_local_one_does(
    world: Any, checkpoint: Path, local: list[str], tmp_path: Path
) -> None:
    cfg = replace(world.config(tmp_path), reward=settings(checkpoint, judge_engine="vllm"))
    judge = build_judge(cfg, SCHEMA, small.ONE)
    assert written(judge, world) == local
    assert isinstance(judge, GenerativeJudge) and isinstance(judge.writer, EngineWriter)
    engine = judge.writer.engine
    assert isinstance(engine, VllmEngine) and engine.policy_version == -1
    counts = judge.take_counts()
    assert (counts["num_calls"], counts["num_too_long"]) == (11, 1)
    pid = engine.process.pid
    os.kill(pid, signal.SIGKILL)  # a restarted process loads the checkpoint's weights; none were ever synced
    time.sleep(0.5)
    assert written(judge, world) == local and engine.stats()["num_restarts"] == 1
    pid = engine.process.pid
    del judge, engine
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()  # the process ends with its judge


def test_settings_of_the_judge_s_engine_are_called_by_their_names(checkpoint: Path) -> None:
    cfg = settings(checkpoint, judge_vllm=VllmConfig(max_num_seqs=0))
    with pytest.raises(ValueError, match=r"the judge's engine: reward\.judge_vllm\.max_num_seqs is 0"):
        open_vllm_judge(checkpoint, None, SCHEMA, cfg, device=torch.device("cpu"), dtype=torch.float32)
    cfg = settings(checkpoint, judge_vllm=VllmConfig(tensor_parallel_size=2))
    with pytest.raises(ValueError, match=r"reward\.judge_vllm\.tensor_parallel_size is 2"):
        open_vllm_judge(checkpoint, None, SCHEMA, cfg, device=torch.device("cpu"), dtype=torch.float32)


@contextmanager
def vllm_serve(checkpoint: Path, log: Path) -> Iterator[str]:
    """Run `vllm serve` on a loopback port; yields its base address."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "r_phi", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--max-num-seqs", "16", "--generation-config", "vllm", "--api-key", "sk-test"]
    env = {**os.environ, **worker_environment(torch.device("cpu")), "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_judge_behind_vllm_serve_writes_what_the_local_one_does(
    world: Any, checkpoint: Path, local: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with vllm_serve(checkpoint, tmp_path / "log") as url:
        cfg = settings(checkpoint, judge_engine="url", judge_url=url, judge_api="completions")
        judge = open_service_judge(SCHEMA, cfg)
        assert judge.writer.identity == f"{url} r_phi completions"
        # A server decodes token by token and omits bytes that do not complete a character.
        texts = [[text.replace("\ufffd", "") for text in row] for row in (written(judge, world), local)]
        assert texts[0] == texts[1] and sum(map(bool, texts[0])) >= 8
        counts = judge.take_counts()
        assert (counts["num_calls"], counts["num_too_long"], counts.get("num_failed", 0)) == (12, 1, 0)
        judge.close()
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        with pytest.raises(ValueError, match="HTTP 401") as refused:
            open_service_judge(SCHEMA, cfg)
        assert "sk-" not in str(refused.value)
