"""Groups that arrive as they finish, from the local engine and from a fake engine's process, and how sampling is stopped."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from srpo.core.config.train import VllmConfig
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.rollout.vllm.engine import VllmEngine
from srpo.rollout.vllm.process import EngineError

FAKE = Path(__file__).resolve().parents[2] / "helpers" / "fake_engine.py"
PARAMS = SamplingParams(max_new_tokens=4, group_size=2)
PROMPTS = [(1, 2), (3,), (4, 5, 6), (7,)]
VOCAB = 60
Process = tuple[VllmEngine, Path]  # the engine, the diary file of its process


@pytest.fixture
def local() -> LocalEngine:
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,  # pyright: ignore[reportCallIssue]
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LocalEngine(Qwen3MoeForCausalLM(config).eval(), max_rows=4)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory, forks: None) -> Iterator[Process]:
    """One engine on the fake for all tests; it takes 50 ms per group."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "config.json").write_text("{}")
    tricks = {"marker": str(folder / "failed"), "diary": str(folder / "diary"), "pause_s": 0.05}
    engine = VllmEngine(folder, config=VllmConfig(timeout_s=60.0), command=(str(FAKE), json.dumps(tricks)))
    yield engine, folder / "diary"
    engine.close()


@pytest.fixture
def engine(process: Process) -> VllmEngine:
    process[1].write_text("")
    return process[0]


@pytest.fixture
def diary(process: Process) -> Callable[[], str]:
    """Reads the diary that the process has written during this test."""
    return process[1].read_text


# ---- the local engine ----------------------------------------------------------------------------------------------------------


def test_a_stream_put_in_order_is_generate(local: LocalEngine) -> None:
    params = SamplingParams(12, 1.0, 10, group_size=2, stop_ids=(1, 2, 3, 4))
    streamed = list(local.stream(PROMPTS, params, seed=5))
    assert [i for i, _ in streamed] == [1, 3, 0, 2]  # two waves, short prompts first
    assert [s for _, samples in sorted(streamed) for s in samples] == local.generate(PROMPTS, params, seed=5)
    assert all({s.prompt_index for s in samples} == {i} and len(samples) == 2 for i, samples in streamed)
    assert list(local.stream([], params, seed=5)) == []
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        local.stream([()], params, seed=5)  # at once, not at the first group


def test_closed_early_the_other_waves_are_not_computed(local: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    waves: list[int] = []
    original = local._wave
    monkeypatch.setattr(local, "_wave", lambda prompts, *args: (waves.append(len(prompts)), original(prompts, *args))[1])
    params = SamplingParams(6, 1.0, 10, group_size=2, ignore_eos=True)
    with closing(local.stream(PROMPTS, params, seed=5)) as groups:
        next(groups)
    assert waves == [2] and local.stats()["num_tokens"] == 24
    assert len(local.generate(PROMPTS, params, seed=5)) == 8
    assert local.stats()["num_tokens"] == 48


@pytest.mark.parametrize("greedy", [False, True])
def test_the_support_is_what_a_token_was_drawn_from(local: LocalEngine, greedy: bool) -> None:
    """Against the sorted logits of a plain forward over the whole response."""
    params = SamplingParams(15, 0.8, 6, group_size=4, stop_ids=(1, 5, 9), greedy=greedy, support=True)
    bare = SamplingParams(15, 0.8, 6, group_size=4, stop_ids=(1, 5, 9), greedy=greedy)
    samples = local.generate(PROMPTS, params, seed=2)
    assert samples == local.generate(PROMPTS, bare, seed=2)  # asking changes nothing
    assert greedy or len({len(s.response_ids) for s in samples}) > 1
    for sample in samples:
        prompt = PROMPTS[sample.prompt_index]
        ids = torch.tensor([[*prompt, *sample.response_ids]])
        with torch.no_grad():
            logits = tiny_forward(local, ids)[len(prompt) - 1 : -1]
        assert sample.support is not None and sample.support.dtype == np.int32
        assert sample.support.shape == (len(sample.response_ids), 6)
        want = logits.topk(6).indices.sort().values
        assert torch.from_numpy(sample.support).long().sort().values.equal(want)
    assert all(s.support is None for s in local.generate(PROMPTS, bare, seed=2))


@pytest.mark.parametrize("greedy", [False, True])
def test_the_experts_are_those_that_each_token_went_to(local: LocalEngine, greedy: bool) -> None:
    """Against the router logits of a plain forward over the whole response; rows finish at different times, in three waves."""
    params = SamplingParams(15, 0.8, 6, group_size=2, stop_ids=(1, 5, 9), greedy=greedy, routing=True)
    bare = replace(params, routing=False)
    samples = local.generate(PROMPTS, params, seed=2)
    assert samples == local.generate(PROMPTS, bare, seed=2)  # asking changes nothing
    assert greedy or len({len(s.response_ids) for s in samples}) > 1
    for sample in samples:
        ids = torch.tensor([[*PROMPTS[sample.prompt_index], *sample.response_ids[:-1]]])
        with torch.no_grad():
            logits = plain_copy(local)(ids, output_router_logits=True).router_logits
        want = torch.stack([layer.topk(2).indices.sort().values for layer in logits], 1)
        assert sample.routed is not None and sample.routed.dtype == np.int16
        assert torch.from_numpy(sample.routed).long().sort().values.equal(want)  # [prompt + response - 1, layers, 2]
    assert all(s.routed is None for s in local.generate(PROMPTS, bare, seed=2))


def tiny_forward(local: LocalEngine, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, V] logits of a plain copy of the engine's model."""
    return plain_copy(local)(ids).logits[0]


def plain_copy(local: LocalEngine) -> Any:
    plain: Any = Qwen3MoeForCausalLM(local.model.config).eval()
    plain.config._attn_implementation = "eager"
    plain.load_state_dict(local.model.state_dict())
    return plain


def test_a_support_of_everything_is_refused(local: LocalEngine) -> None:
    with pytest.raises(ValueError, match=r"rollout.top_k 60 keeps the whole vocabulary of 60: lower"):
        local.stream(PROMPTS, SamplingParams(4, top_k=VOCAB, support=True), seed=0)
    with pytest.raises(ValueError, match=r"rollout.top_k is 0: without a filter"):
        SamplingParams(4, top_k=0, support=True)


# ---- a process -----------------------------------------------------------------------------------------------------------------


def test_groups_come_as_they_finish(engine: VllmEngine) -> None:
    """The fake samples the last prompt first, and takes 50 ms for each. Groups that came all at once would never be apart."""
    spreads = []
    for _ in range(5):
        times, order = [], []
        for i, samples in engine.stream(PROMPTS, PARAMS, seed=5):
            times.append(time.perf_counter())
            order.append(i)
            assert [s.response_ids[0] for s in samples] == [i, i]
        spreads.append(times[3] - times[0])
        assert order == [3, 2, 1, 0] and engine.stats()["num_tokens"] == 16
    assert max(spreads) > 0.12


def test_closed_early_it_stops_the_process_which_goes_on_serving(engine: VllmEngine, diary: Callable[[], str]) -> None:
    pid = engine.process.pid
    many = [(k + 1,) for k in range(50)]
    with closing(engine.stream(many, PARAMS, seed=5)) as groups:
        assert next(groups)[0] == 49
    assert diary().endswith("a") and diary().count("g") < 10
    assert engine.stats()["num_tokens"] == 4
    for _ in range(2):  # no reply of the aborted request arrives in these
        assert [s.prompt_index for s in engine.generate(PROMPTS, PARAMS, seed=5)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert engine.process.pid == pid and engine.stats()["num_restarts"] == 0


def test_an_abort_that_comes_too_late_does_nothing(engine: VllmEngine, diary: Callable[[], str]) -> None:
    """The process has sent all groups before it receives the abort."""
    for _ in range(2):
        with closing(engine.stream(PROMPTS[:2], PARAMS, seed=5)) as groups:
            next(groups)
            time.sleep(1.0)
        assert len(engine.generate(PROMPTS, PARAMS, seed=5)) == 8
    assert diary() == "g" * 12 and engine.stats()["num_restarts"] == 0


def test_a_consumer_s_error_stops_the_process_too(engine: VllmEngine, diary: Callable[[], str]) -> None:
    many = [(k + 1,) for k in range(50)]
    with pytest.raises(KeyError), closing(engine.stream(many, PARAMS, seed=5)) as groups:
        for _ in groups:
            raise KeyError
    assert diary().endswith("a") and len(engine.generate(PROMPTS, PARAMS, seed=5)) == 8


def test_a_process_s_support_arrives(engine: VllmEngine) -> None:
    params = SamplingParams(max_new_tokens=4, group_size=2, top_k=2, support=True)
    for sample in engine.generate(PROMPTS, params, seed=5):
        assert sample.support is not None and sample.support.tolist() == [[sample.prompt_index, 7], [8, 9]]
    assert all(s.support is None for s in engine.generate(PROMPTS, PARAMS, seed=5))


@pytest.mark.parametrize("support", [False, True])
def test_a_process_s_experts_arrive(engine: VllmEngine, support: bool) -> None:
    params = SamplingParams(max_new_tokens=4, group_size=2, top_k=2, support=support, routing=True)
    for sample in engine.generate(PROMPTS, params, seed=5):
        assert sample.routed is not None and sample.routed.tolist() == [[[sample.prompt_index, 3]], [[4, 5]]]
        assert (sample.support is not None) == support
    assert all(s.routed is None for s in engine.generate(PROMPTS, PARAMS, seed=5))


def test_a_process_that_dies_while_it_stops_is_replaced_when_it_is_needed(engine: VllmEngine) -> None:
    restarts = engine.stats()["num_restarts"]
    groups = engine.stream([(k + 1,) for k in range(50)], PARAMS, seed=5)
    next(groups)
    os.kill(engine.process.pid, signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match="failed while aborting"):
        groups.close()
    assert len(engine.generate(PROMPTS[:2], PARAMS, seed=5)) == 4
    assert engine.stats()["num_restarts"] == restarts + 1


def test_other_requests_while_it_samples_are_a_mistake_that_is_told(engine: VllmEngine) -> None:
    groups = engine.stream([(k + 1,) for k in range(50)], PARAMS, seed=5)
    next(groups)
    engine.process.send("sleep")
    with pytest.raises(EngineError, match="RuntimeError: request 'sleep' during sampling"):
        list(groups)
