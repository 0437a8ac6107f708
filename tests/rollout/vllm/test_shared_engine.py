"""Ranks that share an engine: threads of one process on tests/helpers/fake_engine.py, and processes under torchrun at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from threads_meet import Meeting, both
from torch import nn

from srpo.core.config.demo import TinyConfig
from srpo.core.config.train import VllmConfig
from srpo.policy.model import make_tiny
from srpo.policy.parallel import Parallel
from srpo.rollout.engine import Sample, SamplingParams
from srpo.rollout.vllm import shared_start as sharing
from srpo.rollout.vllm.engine import VllmEngine
from srpo.rollout.vllm.process import EngineError
from srpo.rollout.vllm.settings import check_split, derive_seed
from srpo.rollout.vllm.shared_engine import SharedEngine
from srpo.rollout.vllm.shared_server import SharedServer
from srpo.rollout.vllm.shared_start import check_groups, open_shared

FAKE = Path(__file__).resolve().parents[2] / "helpers" / "fake_engine.py"
HELPER, ROOT = FAKE.with_name("shared_ranks.py"), FAKE.parents[2]
PARAMS = SamplingParams(max_new_tokens=2, group_size=2)
Pair = tuple[SharedEngine, SharedEngine]


@pytest.fixture(scope="module")
def policy(world) -> nn.Module:
    from srpo.data.tokenizer import load_tokenizer

    size = TinyConfig(hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32, num_experts=2, expert_size=32)
    return make_tiny(load_tokenizer(world.policy), size, seed=1)


@pytest.fixture
def pair_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: None) -> Iterator[Callable[..., Pair]]:
    """A function that opens the engines of two ranks that share one fake engine with these tricks; the first rank owns it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    opened: list[Pair] = []

    def make(timeout_s: float = 60.0, **tricks: object) -> Pair:
        config = VllmConfig(bucket_mib=1, timeout_s=timeout_s, tensor_parallel_size=2)
        command = (str(FAKE), json.dumps({"marker": str(tmp_path / "failed"), **tricks}))
        engine, meeting, pipes = VllmEngine(tmp_path, config=config, command=command), Meeting(2), [Pipe(), Pipe()]
        server = SharedServer(engine, [theirs for _, theirs in pipes])
        first = SharedEngine(pipes[0][0], engine.max_context, meeting.of(0), server=server)
        opened.append((first, SharedEngine(pipes[1][0], engine.max_context, meeting.of(1))))
        return opened[-1]

    yield make
    for first, second in opened:
        second.close()
        first.close()


def sync(pair: Pair, policy: nn.Module, version: int) -> None:
    both(*(lambda engine=engine: engine.sync_weights(policy, version) for engine in pair))


def total(policy: nn.Module) -> float:
    return sum(float(p.detach().double().sum()) for p in policy.parameters())


def sample_both(pair: Pair, params: SamplingParams = PARAMS) -> list[list[Sample]]:
    """Four prompts, split over the ranks as in training."""
    prompts = [(1,), (2,), (3,), (4,)]
    return both(*(lambda r=r: pair[r].generate(prompts[r::2], params, 5, numbers=[r, r + 2]) for r in (0, 1)))


def check(pair: Pair, policy: nn.Module, version: int) -> None:
    """Each rank gets its own samples in order, from the policy's weights, with the seeds that they have without sharing."""
    for rank, samples in enumerate(sample_both(pair)):
        assert [s.prompt_index for s in samples] == [0, 0, 1, 1]
        assert [s.response_ids[1] for s in samples[::2]] == [derive_seed(5, n) % 1000 for n in (rank, rank + 2)]
        assert {s.policy_version for s in samples} == {version} == {pair[rank].policy_version}
        assert all(s.sampling_logprobs == pytest.approx([-total(policy)] * 2, rel=1e-5) for s in samples)


def test_both_ranks_sample_from_one_engine_before_and_after_syncs(pair_with, policy, tmp_path):
    pair = pair_with(journal=str(tmp_path / "journal"))
    assert pair[1].max_context == pair[0].max_context == 64
    with torch.no_grad():
        for version in range(3):
            for parameter in policy.parameters():
                parameter.add_(torch.rand_like(parameter))
            sync(pair, policy, version)
            check(pair, policy, version)
    assert (tmp_path / "journal").read_text().split().count("start") == 1
    assert pair[0].stats()["num_tokens"] == pair[1].stats()["num_tokens"] == 8
    assert pair[0].stats()["sync_bytes"] == 4 * sum(p.numel() for p in policy.parameters())
    assert pair[1].stats().keys() == pair[0].stats().keys() and pair[1].stats()["sync_s"] > 0


def test_a_support_table_and_a_prompt_that_does_not_fit(pair_with, policy):
    pair = pair_with()
    sync(pair, policy, 0)
    for samples in sample_both(pair, SamplingParams(max_new_tokens=2, group_size=1, top_k=2, support=True)):
        assert all(s.support is not None and s.support.shape == (2, 2) and s.support[1].tolist() == [8, 9] for s in samples)
    for engine in pair:
        with pytest.raises(ValueError, match="prompt 0 has 64 tokens"):
            engine.stream([(1,) * 64], PARAMS, 0)
    check(pair, policy, 0)


@pytest.mark.parametrize("where", ["die", pytest.param("hang", marks=pytest.mark.slow)])
def test_a_follower_gets_its_samples_from_the_engine_that_replaces_a_failed_one(pair_with, policy, where):
    pair = pair_with(timeout_s=60.0 if where == "die" else 2.0, **{where: "generate:2"})
    sync(pair, policy, 0)
    with pytest.warns(RuntimeWarning, match="restarting vLLM"):
        check(pair, policy, 0)
    assert pair[0].stats()["num_restarts"] == 1


@pytest.mark.slow
def test_an_engine_that_keeps_failing_is_an_error_on_both_ranks(pair_with, policy):
    pair = pair_with(die="generate", always=True)
    sync(pair, policy, 0)
    for engine in pair:
        with pytest.raises(EngineError, match="died with exit code"), pytest.warns(RuntimeWarning):
            engine.generate([(1,)], PARAMS, 0)


def test_a_sync_that_fails_is_an_error_on_both_ranks(pair_with, policy):
    pair = pair_with(stale=[next(name for name, _ in policy.named_parameters() if "norm" in name)])
    sync(pair, policy, 0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.rand_like(parameter))

    def failing(engine: Any) -> str:
        with pytest.raises(EngineError) as caught:
            engine.sync_weights(policy, 1)
        return str(caught.value)

    first, second = both(*(lambda engine=engine: failing(engine) for engine in pair))
    assert "holds other weights" in first and first in second
    for engine in pair:
        with pytest.raises(EngineError, match="sync_weights again"):
            engine.generate([(1,)], PARAMS, 0)


def test_the_rank_that_comes_to_a_sync_first_still_serves_the_other(pair_with, policy):
    """With prefetch a rank may still sample with the old weights when the other already syncs: neither waits for the other."""
    pair = pair_with(pause_s=0.2)
    sync(pair, policy, 0)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(pair[0].sync_weights, policy, 1)
        time.sleep(0.5)
        samples = pair[1].generate([(1,), (2,)], PARAMS, 0)
        assert {s.policy_version for s in samples} == {0} and not done.done()
        pair[1].sync_weights(policy, 1)
        done.result(timeout=30)
    check(pair, policy, 1)


def test_ranks_that_sync_different_versions(pair_with, policy):
    pair = pair_with()

    def failing(rank: int) -> None:
        with pytest.raises(EngineError, match=r"different versions of the weights: \[7, 8\]"):
            pair[rank].sync_weights(policy, 7 + rank)

    both(*(lambda rank=rank: failing(rank) for rank in (0, 1)))
    sync(pair, policy, 0)
    check(pair, policy, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_has_enough_can_ask_again_and_sync(pair_with, policy, tmp_path, rank):
    pair = pair_with(pause_s=0.1, diary=str(tmp_path / "diary"))
    sync(pair, policy, 0)
    with closing(pair[rank].stream([(i,) for i in range(1, 40)], PARAMS, 0)) as groups:
        assert next(groups)[0] == 38
    assert len(pair[rank].generate([(9,)], PARAMS, 0)) == 2
    sync(pair, policy, 1)
    check(pair, policy, 1)
    pair[0].sleep()  # does nothing on a CPU
    check(pair, policy, 1)
    assert (tmp_path / "diary").read_text().count("g") < 20  # the rest was stopped


@pytest.mark.parametrize(
    "hosts, size, error",
    [
        (["a"], 2, "a has 1 ranks"),
        (["a", "a", "a"], 2, "a has 3 ranks"),
        (["a", "a", "a", "b", "b", "b"], 2, "a has 3 ranks"),
        (["a", "b", "a", "b"], 2, "ranks 0 to 1"),
        (["a"] * 4, 3, "a has 4 ranks"),
        (["a", "a", "b", "b"], 2, ""),
        (["a"] * 8, 4, ""),
    ],
)
def test_ranks_that_cannot_share(hosts, size, error):
    if not error:
        check_groups(hosts, size)
        return
    with pytest.raises(ValueError, match=error):
        check_groups(hosts, size)


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "moe_intermediate_size"])
def test_a_model_that_cannot_be_split(tmp_path, key):
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "moe_intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    check_split(tmp_path, 4)
    (tmp_path / "config.json").write_text(json.dumps({**sizes, key: 6}))
    with pytest.raises(ValueError, match=f"{key} of .* is 6"):
        VllmEngine(tmp_path, config=VllmConfig(tensor_parallel_size=4), command=("-c", "raise SystemExit"))


def open_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], hosts: tuple[str, str] = ("a", "a")
) -> list[SharedEngine | ValueError]:
    """The engine that `open_shared` returns, or the error that it raises, on each of two ranks."""
    meetings = {name: Meeting(2) for name in ("run", "group")}
    config = VllmConfig(tensor_parallel_size=2, timeout_s=60.0)
    monkeypatch.setattr(sharing, "_exchange", lambda parallel, _: meetings["group"].of(parallel.rank))
    monkeypatch.setattr(Parallel, "all_gather_object", lambda self, x: meetings["run"].of(self.rank)((hosts[self.rank], x[1])))

    def one(rank: int) -> SharedEngine | ValueError:
        parallel = Parallel(rank, 2, rank, torch.device("cpu"))
        try:
            return open_shared(folder, parallel, dtype=torch.float32, max_context=48, config=config, command=command)
        except ValueError as error:
            return error

    return both(partial(one, 0), partial(one, 1))


@pytest.mark.usefixtures("forks")
def test_ranks_find_one_another_and_leave_no_socket(tmp_path, policy, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    pair = open_both(tmp_path, monkeypatch, (str(FAKE), json.dumps({"marker": str(tmp_path / "failed")})))
    assert all(isinstance(engine, SharedEngine) and engine.max_context == 48 for engine in pair), pair
    sync(pair, policy, 0)  # pyright: ignore[reportArgumentType]
    check(pair, policy, 0)  # pyright: ignore[reportArgumentType]
    both(*(engine.close for engine in pair))  # pyright: ignore[reportAttributeAccessIssue]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("how", ["no checkpoint", "it ends", "two hosts", "two formats"])
def test_an_engine_that_does_not_start_is_an_error_on_both_ranks(tmp_path, monkeypatch, how):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if how != "no checkpoint":
        (tmp_path / "config.json").write_text("{}")
    hosts = ("a", "b") if how == "two hosts" else ("a", "a")
    tricks = json.dumps({"marker": str(tmp_path / "failed"), "facts": {"other_dtypes": ["gate (float32)"]}})
    command = (str(FAKE), tricks) if how == "two formats" else ("-c", "raise SystemExit('no luck')")
    first, second = open_both(tmp_path, monkeypatch, command, hosts)
    expected = {"no checkpoint": "no model in", "it ends": "no luck", "two hosts": "a has 1 ranks", "two formats": "first gate"}[
        how
    ]
    assert isinstance(first, ValueError) and isinstance(second, ValueError)
    assert expected in str(first) and expected in str(second)
    assert how == "two hosts" or str(second).startswith("the vLLM of rank 0, which rank 1 shares, does not start")


def launch(folder: Path, num_ranks: int, *mode: str) -> list[dict[str, Any]]:
    """The results that the ranks of tests/helpers/shared_ranks.py have written."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", "--rdzv-backend=c10d"]
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    local = ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command = [sys.executable, *launcher, *local, str(HELPER), str(folder), *mode]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.mark.slow
def test_four_ranks_share_two_engines_under_torchrun(tmp_path, world, monkeypatch):
    """The policy is sharded; one of the two engines dies while it samples; at the end one rank of each pair exits."""
    from srpo.data.tokenizer import load_tokenizer

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    size = TinyConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, num_experts=2, expert_size=32)
    make_tiny(load_tokenizer(world.policy), size, seed=1).save_pretrained(tmp_path)
    results = launch(tmp_path, 4)
    for rank, result in enumerate(results):
        assert result["leads"] == (rank % 2 == 0)
        assert [ids[1] for ids, _ in result["samples"]] == [derive_seed(5, rank) % 1000] * 8
        totals = [-logprobs[0] for _, logprobs in result["samples"]]
        assert totals == pytest.approx([result["total"]] * 4 + [2 * result["total"]] * 4, rel=1e-5)
    assert [result["num_restarts"] for result in results] == [0, 0, 1, 0]
    assert "rank that shares a vLLM with this rank has ended" in results[0]["error"]
    assert "rank that owns the vLLM shared by this rank has ended" in results[3]["error"]
    assert not [path for path in temporary.rglob("*") if path.name == "vllm"]  # no socket is left


@pytest.mark.slow
@pytest.mark.vllm
def test_two_ranks_share_a_real_vllm_that_is_split_in_two(tmp_path, world):
    """They get the samples of an engine that is neither shared nor split."""
    import shared_ranks

    from srpo.data.tokenizer import load_tokenizer
    from srpo.policy.model import load_policy

    size = TinyConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, num_experts=4, expert_size=64)
    make_tiny(load_tokenizer(world.policy), size, seed=1).save_pretrained(tmp_path)
    results = launch(tmp_path, 2, "real")
    alone, policy = VllmEngine(tmp_path, config=VllmConfig(bucket_mib=1, kv_cache_mib=64, max_num_seqs=16)), load_policy(tmp_path)
    for version in (1, 2):
        alone.sync_weights(policy, version)
        expected = alone.generate(shared_ranks.PROMPTS, shared_ranks.PARAMS, 5)
        for rank in (0, 1):
            unshared = [s for s in expected if s.prompt_index % 2 == rank]
            shared = results[rank]["samples"][(version - 1) * 8 : version * 8]
            for sample, (ids, logprobs) in zip(unshared, shared, strict=True):
                assert list(sample.response_ids) == ids
                assert logprobs == pytest.approx(sample.sampling_logprobs, abs=1e-5)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(2)
    alone.close()
