"""bench/real_model.py: its arithmetic limit is that of torch's own count, and its bars read the right rows."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from srpo.core.config.train import LoraConfig, PolicyConfig
from srpo.policy.adapters import add_adapter

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return import_module("real_model")


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )
    return LlamaForCausalLM(config)


def masked(sizes: Any, length: int) -> float:
    """Operations of the masked half of a forward's attention, which torch counts, too."""
    return 4 * sizes.width * length**2 - sizes.attention([length])


def test_operations_are_those_that_torch_counts(bench: Any, model: LlamaForCausalLM) -> None:
    length, labelled = random.randint(5, 40), random.randint(1, 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(300, (1, length)), logits_to_keep=labelled)
    sizes = bench.Sizes.of(model)
    assert counter.get_total_flops() == pytest.approx(sizes.forward([length], labelled) + masked(sizes, length), rel=1e-9)
    pairs = [((1,) * 7, (2,) * 3), ((1,) * 4, (2,) * 5)]
    assert sizes.training(pairs) == 3 * sizes.forward([9, 8], 8)


def test_operations_of_an_adapter_are_those_that_torch_counts(bench: Any, model: LlamaForCausalLM) -> None:
    sizes, rank, num_prompt, labelled = bench.Sizes.of(model), random.randint(1, 9), random.randint(5, 40), random.randint(1, 5)
    add_adapter(model, PolicyConfig(path="base", lora=LoraConfig(rank)), seed=0)
    model.enable_input_require_grads()  # the first layer passes a gradient on, too, as all others do
    length = num_prompt + labelled - 1
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(300, (1, length)), logits_to_keep=labelled).logits.sum().backward()
    pairs = [((1,) * num_prompt, (2,) * labelled)]
    assert counter.get_total_flops() == pytest.approx(sizes.training(pairs, rank) + 3 * masked(sizes, length), rel=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_arm_moves_the_weights_that_it_trains(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    policies: list[Any] = []
    shard = type(bench.ONE).shard
    monkeypatch.setattr(type(bench.ONE), "shard", lambda *a, **k: policies.append(shard(*a, **k)) or policies[-1])
    lab.tiny().save_pretrained(tmp_path / "base")
    work = bench.Work(1, 1, 6, 4, pairs=3, response_tokens=4, micro_batch_tokens=16)
    pairs = bench.make_pairs(lab.VOCAB, work)
    full = bench.srpo_arms(tmp_path / "base", dtype, pairs, work, tmp_path)
    lora = bench.srpo_arms(tmp_path / "base", dtype, pairs, work, tmp_path, rank=2)
    assert (full.keys(), lora.keys()) == ({"logits", "hidden"}, {"lora"})
    for policy, arm in zip(policies, (full["hidden"], lora["lora"]), strict=True):
        before = {name: p.detach().clone() for name, p in policy.named_parameters()}
        arm(0)
        moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
        assert moved and moved <= {name for name, p in policy.named_parameters() if p.requires_grad}
        assert any(".lora_B." in name for name in moved) == (arm is lora["lora"])


def test_generation_counts_each_prompt_once(bench: Any) -> None:
    sizes = bench.Sizes(body=1000, head=0, width=0, sides=0)
    work = bench.Work(3, 8, 10, 5, 0, 0, 0)
    assert sizes.generation(work) == 2 * 1000 * (3 * 10 + 3 * 8 * 4)


def test_bars(bench: Any) -> None:
    rows = {
        "srpo logits bfloat16": {"tokens_per_s": 300.0, "times_limit": 1.4},
        "srpo hidden float32": {"tokens_per_s": 90.0, "times_limit": 1.6},
        "srpo lora float32": {"tokens_per_s": 150.0, "times_limit": 1.5},
        "trl bfloat16": {"tokens_per_s": 100.0, "times_limit": 4.0},
        "trl float32": {"tokens_per_s": 50.0, "times_limit": 3.0},
    }
    assert bench.bars(rows) == {
        "srpo logits bfloat16": {"times_trl": 3.0, "passes_trl": True, "passes_limit": True},
        "srpo hidden float32": {"times_trl": 1.8, "passes_trl": False, "passes_limit": False},
        "srpo lora float32": {"times_trl": None, "passes_trl": None, "passes_limit": True},
    }
