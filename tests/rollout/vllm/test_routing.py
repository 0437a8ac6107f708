"""The experts that vLLM reports: how they become part of a sample, and that its CPU backend cannot report them."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from srpo.rollout.engine import SamplingParams
from srpo.rollout.vllm.client import sample_of
from srpo.rollout.vllm.engine import VllmEngine
from srpo.rollout.vllm.worker import VllmBackend, _sample


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("num_more", [0, 1])
def test_what_vllm_reports_becomes_a_sample(dtype: type, num_more: int) -> None:
    """Rows of prompt (3 tokens) and response (4 tokens). The last token is never an input, so vLLM may omit its row."""
    reported = np.random.default_rng(0).integers(0, 200, (6 + num_more, 5, 2)).astype(dtype)
    entry = [{token: SimpleNamespace(logprob=-1.0)} for token in (7, 8, 9, 2)]
    done = SimpleNamespace(token_ids=[7, 8, 9, 2], logprobs=entry, finish_reason="stop", routed_experts=reported)
    response: Any = _sample(done, SamplingParams(4, top_k=3, routing=True), 3)
    sample = sample_of(0, 3, *response)
    assert sample.routed is not None and sample.routed.dtype == np.int16 and sample.support is None
    assert np.array_equal(sample.routed, reported[:6].astype(np.int16))
    response = _sample(done, SamplingParams(4, top_k=3), 3)
    assert sample_of(0, 3, *response).routed is None
    for missing in (None, reported[:5]):
        done.routed_experts = missing
        with pytest.raises(RuntimeError, match=r"vLLM reported experts of shape .* for 6 tokens"):
            _sample(done, SamplingParams(4, top_k=3, routing=True), 3)


def test_a_table_goes_over_the_wire_whole() -> None:
    table = np.arange(24, dtype="<i2").reshape(4, 3, 2)
    sample = sample_of(0, 1, [1], [-1.0], "stop", None, (3, 2, base64.b64encode(table.tobytes()).decode()))
    assert sample.routed is not None and np.array_equal(sample.routed, table)


def test_an_engine_that_was_started_without_does_not_make_them_up() -> None:
    backend = VllmBackend()
    backend._llm = SimpleNamespace(llm_engine=None)
    with pytest.raises(ValueError, match=r"was started with rollout.routing 'recompute'"):
        next(backend.generate([(0, [1])], SamplingParams(4, routing=True), [1]))


@pytest.mark.vllm
def test_the_cpu_backend_says_that_it_cannot(world: Any) -> None:
    with pytest.raises(ValueError, match=r"set rollout.routing to 'recompute', or rollout.engine to 'local'") as refused:
        VllmEngine(Path(world.policy), routing=True)
    assert "enable_return_routed_experts" in str(refused.value) or "Model Runner V2" in str(refused.value)
