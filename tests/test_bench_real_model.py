"""bench/real_model.py: its arithmetic limit is that of torch's own count, and its bars read the right rows."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return import_module("real_model")


def test_operations_are_those_that_torch_counts(bench: Any) -> None:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )
    model = LlamaForCausalLM(config)
    length, labelled = random.randint(5, 40), random.randint(1, 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(300, (1, length)), logits_to_keep=labelled)
    # torch counts the masked half of the attention, too.
    sizes = bench.Sizes.of(model)
    masked = 4 * sizes.width * (length**2 - length * (length + 1) / 2)
    assert counter.get_total_flops() == pytest.approx(sizes.forward([length], labelled) + masked, rel=1e-9)
    pairs = [((1,) * 7, (2,) * 3), ((1,) * 4, (2,) * 5)]
    assert sizes.training(pairs) == 3 * sizes.forward([9, 8], 8)


def test_generation_counts_each_prompt_once(bench: Any) -> None:
    sizes = bench.Sizes(body=1000, head=0, width=0)
    work = bench.Work(3, 8, 10, 5, 0, 0, 0)
    assert sizes.generation(work) == 2 * 1000 * (3 * 10 + 3 * 8 * 4)


def test_bars(bench: Any) -> None:
    rows = {
        "srpo logits bfloat16": {"tokens_per_s": 300.0, "times_limit": 1.4},
        "srpo hidden float32": {"tokens_per_s": 90.0, "times_limit": 1.6},
        "trl bfloat16": {"tokens_per_s": 100.0, "times_limit": 4.0},
        "trl float32": {"tokens_per_s": 50.0, "times_limit": 3.0},
    }
    assert bench.bars(rows) == {
        "srpo logits bfloat16": {"times_trl": 3.0, "passes_trl": True, "passes_limit": True},
        "srpo hidden float32": {"times_trl": 1.8, "passes_trl": False, "passes_limit": False},
    }
