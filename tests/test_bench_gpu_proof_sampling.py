"""bench/gpu_proof: the stage sampling refuses an engine that answers nonsense."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_modules import proof_fixture

proof = proof_fixture("sampling", "parts")


@pytest.fixture
def engine_with(proof: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """engine_with(values) -> a Sampling whose engine gives these log-probabilities; the trainer's are -1."""
    monkeypatch.setattr(proof.sampling, "small", lambda: True)

    def make(values: list[float]) -> Any:
        it = proof.sampling.Sampling(real=False)
        sample = SimpleNamespace(prompt_index=0, response_ids=(3,) * len(values), sampling_logprobs=values)
        it.__dict__["engine"] = SimpleNamespace(
            generate=lambda *args, **flags: [sample],
            sleep=lambda: None,
            sync_weights=lambda *args: None,
        )
        it.__dict__["policy"] = torch.nn.Linear(1, 1)
        it.logprobs = lambda ids, first: torch.full((len(ids) - first,), -1.0)
        return it

    return make


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([math.nan] * 40, "of 40 differences 40 are NaN and 0 infinite"),
        ([math.nan, *[-1.0] * 39], "of 40 differences 1 are NaN and 0 infinite"),
        ([*[-math.inf] * 3, *[-1.0] * 37], "of 40 differences 0 are NaN and 3 infinite"),
        ([], "of 0 differences"),
    ],
)
def test_log_probabilities_that_are_no_numbers_are_wrong(
    proof: SimpleNamespace, engine_with: Any, values: list[float], words: str
) -> None:
    with pytest.raises(proof.parts.Wrong, match=words):
        engine_with(values).gap()


def test_few_tokens_at_the_edge_of_top_k_are_left_out(engine_with: Any) -> None:
    assert engine_with([-math.inf, *[-1.5] * 39]).gap() == pytest.approx(0.5)


def test_a_gap_that_is_no_number_does_not_pass_after_waking(
    proof: SimpleNamespace, engine_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = engine_with([-1.0])
    monkeypatch.setattr(proof.sampling.lab, "device", lambda: torch.device("cpu"))
    assert it.sleep_and_wake()["figures"][0]["value"] == 0
    monkeypatch.setattr(it, "gap", lambda: math.nan)
    with pytest.raises(proof.parts.Wrong, match="gaps after waking"):
        it.sleep_and_wake()
