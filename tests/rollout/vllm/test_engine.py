"""Protocol, lifetime and faults of the engine's process, with a fake in place of vLLM (tests/helpers/fake_engine.py)."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from srpo.core.config.demo import TinyConfig
from srpo.core.config.train import RolloutConfig, VllmConfig
from srpo.core.errors import MissingPackage, UserError
from srpo.policy.checkpoint_names import iter_checkpoint_blocks
from srpo.policy.model import make_tiny
from srpo.rollout.engine import SamplingParams
from srpo.rollout.vllm.engine import VllmEngine
from srpo.rollout.vllm.process import EngineError, EngineProcess, child_environment
from srpo.rollout.vllm.settings import worker_environment

FAKE = Path(__file__).resolve().parents[2] / "helpers" / "fake_engine.py"
ROOT = FAKE.parents[2]
PARAMS = SamplingParams(max_new_tokens=4, group_size=2)
PROMPTS = [(1, 2), (3,), (4, 5, 6), (7,)]


@pytest.fixture(scope="module")
def policy(world) -> nn.Module:
    from srpo.data.tokenizer import load_tokenizer

    size = TinyConfig(hidden_size=32, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=32, num_experts=2, expert_size=32)
    return make_tiny(load_tokenizer(world.policy), size, seed=1)


@pytest.fixture
def engine_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: None):
    """A function that opens an engine on the fake with these tricks; all are closed at the end. `fork=False`: start the fake in a
    new interpreter, which takes seconds."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # logs of failed processes stay
    opened: list[VllmEngine] = []
    (tmp_path / "config.json").write_text("{}")

    def make(timeout_s: float = 60.0, fork: bool = True, **tricks: object) -> VllmEngine:
        command = (str(FAKE), json.dumps({"marker": str(tmp_path / f"failed{len(opened)}"), **tricks}))
        command = command if fork else ("-u", *command)
        opened.append(VllmEngine(tmp_path, config=VllmConfig(bucket_mib=1, timeout_s=timeout_s), command=command))
        opened[-1]._store.bucket_bytes = 20_000  # several buckets for a small model
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


def total(policy: nn.Module) -> float:
    return sum(float(p.detach().double().sum()) for p in policy.parameters())


def check(engine: VllmEngine, policy: nn.Module, version: int) -> None:
    """Every prompt has its samples once, in order, sampled with the policy's weights."""
    samples = engine.generate(PROMPTS, PARAMS, seed=5)
    assert [s.prompt_index for s in samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [s.response_ids[0] for s in samples] == [s.prompt_index for s in samples]
    assert {s.policy_version for s in samples} == {version} == {engine.policy_version}
    assert all(s.sampling_logprobs == pytest.approx([-total(policy)] * 2, rel=1e-6) for s in samples)


@pytest.fixture
def update(policy: nn.Module) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.rand_like(parameter))

    return step


def test_samples_come_from_the_weights_of_the_last_sync(engine_with, policy, update):
    engine = engine_with(fork=False)
    assert engine.policy_version == -1 and engine.max_context == 64
    assert engine.generate([], PARAMS, 0) == []
    for version in (0, 1, 4):
        update()
        engine.sync_weights(policy, version)
        check(engine, policy, version)
    assert len(engine._store.buckets) > 2
    first, second = (engine.generate(PROMPTS, PARAMS, seed) for seed in (5, 6))
    assert first == engine.generate(PROMPTS, PARAMS, 5) and first != second  # each prompt has a seed of its own
    assert len({s.response_ids for s in first}) == len(PROMPTS)
    stats = engine.stats()
    assert stats["num_tokens"] == 16 and stats["sync_bytes"] == 4 * sum(p.numel() for p in policy.parameters())
    assert stats["num_restarts"] == 0
    engine.sleep()  # does nothing on a CPU: the weights stay
    check(engine, policy, 4)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([(1,), ()], PARAMS, 0)
    with pytest.raises(ValueError, match="context of 64"):
        engine.generate([(1,) * 61], PARAMS, 0)
    log = engine.process.log
    engine.close()
    assert not log.exists()


def test_replies_have_signs_of_life_between_groups(engine_with):
    replies = list(engine_with(pause_s=1.1).replies(PROMPTS[:2], PARAMS, 0))
    assert None in replies and [reply[0] for reply in replies if reply is not None] == [1, 0]


def test_a_process_killed_while_it_samples_is_replaced(engine_with, policy, update):
    """The replacement gets the weights of the sync, although the trainer has updated its own, and samples the missing groups."""
    engine = engine_with(die="generate:3")
    update()
    engine.sync_weights(policy, 3)
    synced, pid = total(policy), engine.process.pid
    update()
    with pytest.warns(RuntimeWarning, match="2 of 4 prompts.*exit code -9"):
        samples = engine.generate(PROMPTS, PARAMS, seed=5)
    assert [s.prompt_index for s in samples] == [0, 0, 1, 1, 2, 2, 3, 3] and engine.process.pid != pid
    assert all(s.sampling_logprobs == pytest.approx([-synced] * 2, rel=1e-6) for s in samples)
    assert engine.stats()["num_restarts"] == 1
    assert samples == engine.generate(PROMPTS, PARAMS, seed=5)


def test_a_hanging_process_leaves_its_stacks_and_is_replaced(engine_with, policy):
    engine = engine_with(timeout_s=3.0, hang="generate:2")
    engine.sync_weights(policy, 0)
    pid = engine.process.pid
    with pytest.warns(RuntimeWarning, match=r"(?s)3 of 4 prompts.*no sign of life for 3 s.*fake_engine\.py.* in here"):
        engine.generate(PROMPTS, PARAMS, seed=5)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    check(engine, policy, 0)


@pytest.mark.parametrize(
    "place", [pytest.param("begin", marks=pytest.mark.slow), "load:2", pytest.param("finish", marks=pytest.mark.slow)]
)
def test_a_process_that_dies_in_a_sync_is_replaced_by_one_with_the_new_weights(engine_with, policy, update, place):
    engine = engine_with(die=place)
    update()
    with pytest.warns(RuntimeWarning, match="weight sync"):
        engine.sync_weights(policy, 2)
    check(engine, policy, 2)


@pytest.mark.slow
def test_a_process_that_hangs_in_a_sync_does_not_block_the_trainer(engine_with, policy, update):
    """The process stops reading requests, so the socket is full before the last bucket has been announced."""
    engine = engine_with(timeout_s=3.0, hang="load:1")
    engine._store.bucket_bytes = 1
    with socket.fromfd(engine.process._channel.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    update()
    with pytest.warns(RuntimeWarning, match="(?s)no sign of life for 3 s.* in here"):
        engine.sync_weights(policy, 5)
    check(engine, policy, 5)


class HostSender:
    """Takes the place of `CudaSender`, but sends the buckets through shared memory."""

    num_bytes = 0

    def __init__(self, engine: VllmEngine) -> None:
        self.engine, self.store = engine, engine._store

    def send(self, process: EngineProcess, policy: nn.Module, version: int) -> dict[str, int]:
        process.send("begin")
        process._sent.clear()  # the end of the last update has unmapped every segment
        for bucket in self.store.write(iter_checkpoint_blocks(policy, {}), version):
            self.engine._send_bucket(process, bucket)
        return self.store.sums

    def release(self) -> None:
        self.engine.released += 1  # pyright: ignore[reportAttributeAccessIssue]


def test_weights_are_woken_before_a_sync_and_the_cache_after_it(engine_with, policy, update, tmp_path, monkeypatch):
    """Then two copies of the weights never exist, nor weights in transit together with a full cache. Before either wakes, the
    trainer gives back the memory that it only caches (CUDA is pretended here)."""
    engine = engine_with(journal=str(tmp_path / "journal"))
    engine._sender, engine._device, engine.released = HostSender(engine), torch.device("cuda"), 0

    def note(word: str) -> None:
        with (tmp_path / "journal").open("a") as journal:
            journal.write(word + "\n")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: note("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: note("empty_cache"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 12345)
    engine.sync_weights(policy, 0)
    check(engine, policy, 0)
    engine.sleep()
    engine.sleep()  # does nothing: it sleeps already
    with pytest.raises(EngineError, match="sync_weights again"):
        engine.generate(PROMPTS, PARAMS, 0)
    update()
    engine.sync_weights(policy, 1)
    check(engine, policy, 1)
    done = [name for name, _ in itertools.groupby((tmp_path / "journal").read_text().splitlines())]
    sync, give_back = ["begin", "load", "finish"], ["wait", "empty_cache"]
    woken = [*give_back, "wake ['weights']", *sync, *give_back, "wake ['kv_cache']"]
    assert done == ["start", *sync, "generate", "sleep", *woken, "generate"]
    assert engine.stats()["trainer_reserved_bytes"] == 12345 and engine.released == 2


def test_an_engine_that_dies_in_its_sleep_is_replaced(engine_with, policy, update):
    engine = engine_with(die="sleep")
    engine._sender, engine.released = HostSender(engine), 0
    engine.sync_weights(policy, 0)
    with pytest.warns(RuntimeWarning, match="failed while falling asleep"):
        engine.sleep()
    update()
    engine.sync_weights(policy, 1)
    check(engine, policy, 1)
    assert engine.stats()["num_restarts"] == 1


def test_a_restart_has_the_key_value_cache_of_the_first_start(engine_with, policy, tmp_path, monkeypatch):
    """vLLM demands gpu_memory_frac of the GPU's memory as free at its start, and by now the trainer's state is there."""
    emptied = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len((tmp_path / "starts").read_text().splitlines())))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    engine = engine_with(die="generate:2", facts={"kv_cache_bytes": 777 << 20}, settings=str(tmp_path / "starts"))
    engine._device = torch.device("cuda")
    monkeypatch.setattr(VllmEngine, "_environment", {})
    engine.sync_weights(policy, 0)
    with pytest.warns(RuntimeWarning, match="restarting vLLM"):
        check(engine, policy, 0)
    first, second = map(json.loads, (tmp_path / "starts").read_text().splitlines())
    assert first["kv_cache_bytes"] == 1 << 30 and first["gpu_memory_frac"] == VllmConfig().gpu_memory_frac
    assert second == first | {"kv_cache_bytes": 777 << 20, "gpu_memory_frac": 0.01}
    assert emptied == [1]  # between the two starts


def test_a_model_that_vllm_keeps_in_two_formats_is_refused_before_anything_is_sent(engine_with, policy):
    engine = engine_with(facts={"other_dtypes": ["model.layers.1.mlp.gate.bias (float32)"]}, die="begin")
    with pytest.raises(UserError, match=r"keeps 1 weights of this model, first model.layers.1.mlp.gate.bias \(float32\)"):
        engine.sync_weights(policy, 0)
    assert engine.stats()["num_restarts"] == 0


def test_nothing_is_sampled_after_a_sync_that_the_trainer_broke_off(engine_with, policy, update, monkeypatch):
    engine = engine_with()
    engine.sync_weights(policy, 0)

    def breaking(model, layouts):
        yield from list(original(model, layouts))[:5]
        raise RuntimeError("a rank is gone")

    import srpo.rollout.vllm.engine as module

    original = module.iter_checkpoint_blocks
    monkeypatch.setattr(module, "iter_checkpoint_blocks", breaking)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        engine.sync_weights(policy, 1)
    with pytest.raises(EngineError, match="interrupted"):
        engine.generate(PROMPTS, PARAMS, 0)
    monkeypatch.undo()
    update()
    engine.sync_weights(policy, 2)
    check(engine, policy, 2)


def test_weights_that_did_not_arrive_stop_the_run(engine_with, policy, update):
    engine = engine_with(stale=["model.layers.1.self_attn.q_proj.weight"])
    engine.sync_weights(policy, 0)
    update()
    with pytest.raises(EngineError, match=r"other weights than the trainer in 1 of \d+ groups, first \['model.layers.1'\]"):
        engine.sync_weights(policy, 1)
    with pytest.raises(EngineError, match="interrupted"):
        engine.generate(PROMPTS, PARAMS, 0)


@pytest.mark.parametrize(
    ("tricks", "message"),
    [
        ({"raise": "generate", "always": True}, "RuntimeError: no luck in generate"),
        ({"lose": 1}, "returned 1 samples for prompt .: expected 2"),
    ],
)
def test_what_another_attempt_would_not_change_is_raised_at_once(engine_with, policy, tricks, message):
    engine = engine_with(**tricks)
    engine.sync_weights(policy, 0)
    with pytest.raises(EngineError, match=message):
        engine.generate(PROMPTS, PARAMS, 0)
    assert engine.stats()["num_restarts"] == 0


@pytest.mark.slow
def test_a_process_that_always_dies_ends_the_run(engine_with, policy):
    engine = engine_with(die="generate", always=True)
    with pytest.warns(RuntimeWarning), pytest.raises(EngineError, match="died with exit code -9"):
        engine.generate(PROMPTS, PARAMS, 0)
    assert engine.stats()["num_restarts"] == 2
    with pytest.raises(EngineError, match="died with exit code -9"):
        engine_with(die="start", always=True)


def test_a_killed_trainer_leaves_no_engine_behind(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    script = (
        "import sys, time\nfrom srpo.rollout.vllm.engine import VllmEngine\n"
        f"engine = VllmEngine({str(tmp_path)!r}, command=({str(FAKE)!r}, '{{}}'))\n"
        "print(engine.process.pid, flush=True)\ntime.sleep(100)\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        os.kill(trainer.pid, signal.SIGKILL)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the engine's process is still there")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("bucket_mib", -1),
        ("timeout_s", 0.0),
        ("start_timeout_s", -1.0),
        ("kv_cache_mib", -1),
        ("gpu_memory_frac", 0.0),
        ("gpu_memory_frac", 1.0),
    ],
)
def test_settings_out_of_range_name_themselves(tmp_path, field, value):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"rollout\.vllm\.{field} is {value}"):
        VllmEngine(tmp_path, config=VllmConfig(**{field: value}), command=("-c", "raise SystemExit"))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no model in .*config\.json"):
        VllmEngine(tmp_path, command=("-c", "raise SystemExit"))


def test_without_vllm_the_engine_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="make vllm"):
        VllmEngine(tmp_path)


def test_the_child_s_environment_knows_nothing_of_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")  # a choice of vLLM's that srpo leaves to the user
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    env = child_environment(worker_environment(torch.device("cuda", 1)))
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & env.keys()
    assert env["VLLM_LOGGING_LEVEL"] == "DEBUG" and env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert env["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert env["CUDA_VISIBLE_DEVICES"] == "5" and "CUDA_VISIBLE_DEVICES" in child_environment({})


def test_local_is_the_default():
    assert RolloutConfig().engine == "local"


def test_an_engine_s_error_keeps_the_lines_of_its_log() -> None:
    assert str(EngineError("it died; its log is x:\n\x1b[31ma\nb")) == "it died; its log is x:\n\\x1b[31ma\nb"
