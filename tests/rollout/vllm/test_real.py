"""The real vLLM on its CPU backend: equality with the trainer, weight syncs, faults, memory."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from srpo.core.batch import IGNORE, Batch
from srpo.core.config.train import LoraConfig, PolicyConfig, VllmConfig
from srpo.policy.adapters import add_adapter
from srpo.policy.model import Policy, load_policy
from srpo.rollout.engine import Sample, SamplingParams
from srpo.rollout.vllm.engine import VllmEngine
from srpo.rollout.vllm.process import EngineError

pytestmark = pytest.mark.vllm

BOUND = 1e-5  # nats: largest difference of any token's log-probability, fp32
VOCAB = 500
PARAMS = SamplingParams(max_new_tokens=12, group_size=16, stop_ids=(2, 9, 11))
Prompts = Sequence[tuple[int, ...]]
PROMPTS = [(3, 4, 5) * 4, (7, 8), tuple(range(20, 60)), (100,)]
CONFIG = VllmConfig(kv_cache_mib=64, max_num_seqs=64, bucket_mib=1, timeout_s=120)


def make_checkpoint(folder: Path, tied: bool) -> Path:
    """A Qwen3-MoE of two layers and eight experts. vLLM's CPU attention begins at heads of 32."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # pyright: ignore[reportCallIssue]
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


Pair = tuple[VllmEngine, Policy]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """(engine, policy) of a checkpoint with a head of its own."""
    yield from opened(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The same with a head tied to the embedding."""
    yield from opened(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The same split over two processes (rollout.vllm.tensor_parallel_size)."""
    yield from opened(tmp_path_factory.mktemp("split"), tied=True, config=replace(CONFIG, tensor_parallel_size=2))


def opened(folder: Path, tied: bool, config: VllmConfig = CONFIG) -> Iterator[Pair]:
    engine = VllmEngine(make_checkpoint(folder, tied), config=config)
    yield engine, Policy(load_policy(folder))
    engine.close()


@pytest.fixture(params=["untied", "tied", "split"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


def randomize(policy: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)


def difference(policy: Policy, samples: Sequence[Sample], params: SamplingParams, prompts: Prompts = PROMPTS) -> float:
    """Largest |sampler - trainer| of any token: the trainer's own forward over all samples packed, filtered here by hand."""
    ids = [torch.tensor(prompts[s.prompt_index] + s.response_ids) for s in samples]
    labels = [torch.full((len(row),), IGNORE) for row in ids]
    for sample, row, label in zip(samples, ids, labels, strict=True):
        first = len(prompts[sample.prompt_index]) - 1
        label[first:-1] = row[first + 1 :]
    num_rows = sum(map(len, ids))
    batch = Batch(
        input_ids=torch.cat(ids),
        labels=torch.cat(labels),
        position_ids=torch.cat([torch.arange(len(row)) for row in ids]),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(map(len, ids))], dtype=torch.int32),
        step_ends=torch.ones(len(ids), 1, dtype=torch.int32),
        step_advantages=torch.zeros(len(ids), 1),
        weights=torch.zeros(num_rows),
        sampling_logprobs=torch.zeros(num_rows),
    )
    with torch.no_grad():
        logits = policy(batch).float() / params.temperature
    kept, ids_of_kept = logits.topk(params.top_k or VOCAB)
    filtered = torch.full_like(logits, -torch.inf).scatter(1, ids_of_kept, kept).log_softmax(-1)
    trainer = filtered.gather(1, batch.labels[batch.labels != IGNORE][:, None])[:, 0]
    return float((trainer - torch.tensor([x for s in samples for x in s.sampling_logprobs])).abs().max())


def largest_difference(engine: VllmEngine, policy: Policy, params: SamplingParams = PARAMS, seed: int = 1) -> float:
    samples = engine.generate(PROMPTS, params, seed)
    assert [s.prompt_index for s in samples] == [i for i in range(len(PROMPTS)) for _ in range(params.group_size)]
    for sample in samples:
        ends = [t in params.stop_ids for t in sample.response_ids]
        assert sample.finish == ("stop" if ends[-1] else "length") and not any(ends[:-1])
        assert len(sample.response_ids) == params.max_new_tokens or sample.finish == "stop"
        assert sample.policy_version == engine.policy_version
    return difference(policy, samples, params)


def test_sampler_and_trainer_agree_over_successive_syncs(pair):
    engine, policy = pair
    assert largest_difference(engine, policy) < BOUND  # as loaded
    worst = 0.0
    for version in range(20):
        randomize(policy, version)
        engine.sync_weights(policy, version)
        worst = max(worst, largest_difference(engine, policy, seed=version))
    assert worst < BOUND, worst
    assert engine.stats()["num_restarts"] == 0


def test_an_adapter_samples_as_it_trains(pair):
    """The sync sends merged weights; its proof compares their sums. Afterwards the base alone is back."""
    engine, policy = pair
    randomize(policy, 31)
    model = add_adapter(copy.deepcopy(policy.model), PolicyConfig(path="base", lora=LoraConfig(rank=4)), 0)
    adapted = Policy(model)
    for version in range(2):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        engine.sync_weights(adapted, version)
        assert largest_difference(engine, adapted, seed=version) < BOUND
    assert difference(policy, engine.generate(PROMPTS, PARAMS, 1), PARAMS) > 0.01
    engine.sync_weights(policy, 2)
    assert largest_difference(engine, policy) < BOUND


def test_the_biases_of_routers_are_sent(tmp_path: Path):
    """A buffer of transformers' model, and a parameter of vLLM's."""
    from transformers import AutoModelForCausalLM, Glm4MoeConfig

    def redraw(model: nn.Module) -> None:
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.rand(buffer.shape) + 0.5)

    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32, "n_routed_experts": 8}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    more = {"vocab_size": VOCAB, "max_position_embeddings": 256, "initializer_range": 0.1, "first_k_dense_replace": 1}
    model = AutoModelForCausalLM.from_config(Glm4MoeConfig(**sizes, **counts, **ids, **more))
    redraw(model)
    model.save_pretrained(tmp_path)
    policy, engine = Policy(load_policy(tmp_path)), VllmEngine(tmp_path, config=CONFIG)
    try:
        assert largest_difference(engine, policy) < BOUND
        randomize(policy, 1)
        redraw(policy)
        engine.sync_weights(policy, 1)
        assert largest_difference(engine, policy) < BOUND
    finally:
        engine.close()


WAYS: list[dict[str, Any]] = [
    {"greedy": True},
    {"greedy": True, "top_k": 0, "temperature": 1.0},
    {"greedy": True, "top_k": 0},
    {"top_k": 0},
    {"top_k": 1},
    {"temperature": 0.5},
    {"top_k": VOCAB + 1, "group_size": 1},
    {"ignore_eos": True, "stop_ids": ()},
]


@pytest.mark.parametrize(
    ("pair", "change"),
    [*(("untied", way) for way in WAYS), *((kind, way) for kind in ("tied", "split") for way in (WAYS[0], WAYS[3]))],
    indirect=["pair"],
    ids=str,
)
def test_every_way_to_sample_reports_its_own_distribution(pair, change):
    engine, policy = pair
    randomize(policy, 77)
    engine.sync_weights(policy, 77)
    params = replace(PARAMS, **change)
    assert largest_difference(engine, policy, replace(params, top_k=min(params.top_k, VOCAB))) < BOUND
    samples = engine.generate(PROMPTS, params, 1)
    if params.greedy:
        assert all(len({s.response_ids for s in samples if s.prompt_index == i}) == 1 for i in range(len(PROMPTS)))
    elif params.top_k != 1:
        assert len({s.response_ids for s in samples}) > len(samples) // 2


def test_more_prompts_than_are_computed_at_once(untied):
    """15,000 tokens of prompts. Chunked prefill would end the process, because CPU generators cannot rewind."""
    engine, policy = untied
    prompts = [tuple(torch.randint(3, VOCAB, (75,), generator=torch.Generator().manual_seed(i)).tolist()) for i in range(100)]
    samples = engine.generate(prompts, params := replace(PARAMS, group_size=2), 1)
    assert [s.prompt_index for s in samples] == [i for i in range(100) for _ in range(2)]
    randomize(policy, 8)
    engine.sync_weights(policy, 8)
    samples = engine.generate(prompts, params, 1)
    assert difference(policy, samples, params, prompts) < BOUND


@pytest.mark.slow
def test_a_full_key_value_cache_delays_and_loses_nothing(tmp_path):
    """1 MiB is 1,024 tokens of this model; 64 responses need 13,000."""
    folder = make_checkpoint(tmp_path, tied=False)
    engine, policy = VllmEngine(folder, config=replace(CONFIG, kv_cache_mib=1)), Policy(load_policy(folder))
    params = replace(PARAMS, max_new_tokens=190, ignore_eos=True, stop_ids=())
    samples = engine.generate(PROMPTS, params, 1)
    assert [len(s.response_ids) for s in samples] == [190] * 64
    assert difference(policy, samples, params) < 2 * BOUND
    engine.close()


def test_a_seed_is_a_batch(pair):
    engine, _ = pair
    first = engine.generate(PROMPTS, PARAMS, 3)
    assert first == engine.generate(PROMPTS, PARAMS, 3) != engine.generate(PROMPTS, PARAMS, 4)


@pytest.mark.parametrize(
    "how", [pytest.param(signal.SIGKILL, id="killed"), pytest.param(signal.SIGSTOP, id="hangs", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["untied", pytest.param("split", marks=pytest.mark.slow)])
def test_a_process_that_fails_while_it_samples_loses_and_doubles_nothing(request, kind, how):
    engine, policy = request.getfixturevalue(kind)
    randomize(policy, 50)
    engine.sync_weights(policy, 50)
    params = replace(PARAMS, max_new_tokens=190, ignore_eos=True, stop_ids=())
    restarts = engine.stats()["num_restarts"]
    engine.process.timeout_s = 5.0
    threading.Timer(0.3, os.kill, (engine.process.pid, how)).start()
    with pytest.warns(RuntimeWarning, match="restarting vLLM"):
        samples = engine.generate(PROMPTS, params, 1)
    assert engine.stats()["num_restarts"] == restarts + 1
    assert [s.prompt_index for s in samples] == [i for i in range(len(PROMPTS)) for _ in range(16)]
    assert difference(policy, samples, params) < 2 * BOUND  # at most 190 tokens deep
    randomize(policy, 51)
    assert largest_difference(engine, policy) > 0.1  # the trainer has new weights, the engine has not before the next sync
    engine.sync_weights(policy, 51)
    assert largest_difference(engine, policy) < BOUND


@pytest.mark.slow
def test_killed_before_a_sync_it_comes_back_with_the_new_weights(untied):
    engine, policy = untied
    os.kill(engine.process.pid, signal.SIGKILL)
    time.sleep(0.5)
    randomize(policy, 60)
    engine.sync_weights(policy, 60)
    assert largest_difference(engine, policy) < BOUND


def test_a_checkpoint_that_vllm_cannot_run_is_one_clear_error(tmp_path):
    folder = make_checkpoint(tmp_path, tied=False)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"Qwen3MoeForCausalLM"', '"NoSuchModelForCausalLM"'))
    with pytest.raises(EngineError, match="NoSuchModel"):
        VllmEngine(folder, config=CONFIG)


def worker_with(hole: str) -> tuple[str, str]:
    """The worker without one of the repairs of `reload`."""
    script = f"import sys; from srpo.rollout.vllm import reload, worker; {hole}; "
    return "-c", script + "worker.serve(worker.VllmBackend(), sys.argv)"


@pytest.mark.slow
def test_experts_that_come_back_unpacked_are_found_at_the_start(tmp_path):
    folder = make_checkpoint(tmp_path, tied=False)
    hole = "reload.Reloader._fused_experts = lambda self: iter(())"
    with pytest.raises(EngineError, match=r"does not restore 4 of .* first model\.layers\.0\.mlp\.experts"):
        VllmEngine(folder, config=CONFIG, command=worker_with(hole)).close()


@pytest.mark.slow
def test_a_tied_head_that_stays_behind_is_found_at_the_sync(tmp_path):
    folder = make_checkpoint(tmp_path, tied=True)
    hole = "reload.KernelWatch.dispatch_again = lambda self, layer: None"
    engine, policy = VllmEngine(folder, config=CONFIG, command=worker_with(hole)), Policy(load_policy(folder))
    randomize(policy, 1)
    with pytest.raises(EngineError, match=r"in 1 of .*first \['model\.embed_tokens\.weight \(packed\)"):
        engine.sync_weights(policy, 1)
    with pytest.raises(EngineError, match="interrupted"):
        engine.generate(PROMPTS, PARAMS, 1)
    engine.close()


@pytest.mark.parametrize(
    ("pair", "num_cycles"),
    [("untied", 30), ("split", 30), *(pytest.param(kind, 110, marks=pytest.mark.slow) for kind in ("untied", "tied", "split"))],
    indirect=["pair"],
)
def test_cycles_of_sync_and_sampling_leave_memory_flat(pair, num_cycles):
    engine, policy = pair

    def resident() -> int:
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in (os.getpid(), engine.process.pid))

    sizes = []
    for version in range(num_cycles):
        randomize(policy, version)
        engine.sync_weights(policy, version)
        engine.generate(PROMPTS, PARAMS, version)
        sizes.append(resident())
    assert max(sizes[10:]) < 1.02 * sizes[9], [size >> 20 for size in sizes[::10]]
