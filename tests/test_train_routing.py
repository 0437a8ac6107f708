"""srpo.train with rollout.routing = "replay"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_world as small
from transformers import LlamaConfig, LlamaForCausalLM

import srpo.train
import srpo.training.collect
from srpo.data.tokenizer import load_tokenizer
from srpo.policy.model import load_policy
from srpo.train import train

REPLAY = {"routing": "replay"}


def test_a_run_replays_what_its_engine_routed(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's routers are inverted after sampling, so only replayed experts equal those of the engine."""
    sampled = srpo.training.collect.generate

    def then_turn(run: Any, *args: Any) -> Any:
        yield from list(sampled(run, *args))
        for layer in run.policy.model.model.layers:  # the first choice becomes the last
            layer.mlp.gate.weight.data.neg_()

    monkeypatch.setattr(srpo.training.collect, "generate", then_turn)
    flips = []
    for name, rollout in (("replay", REPLAY), ("recompute", {})):
        cfg = world.config(tmp_path / name, num_steps=1, rollout=rollout, train={"checkpoint_every": 9})
        train(cfg, small.ONE)
        (line,) = small.metrics_of(tmp_path / name)
        flips.append(line.get("rollout/routing_flip_frac"))
    assert flips == [1.0, None]  # the two best of four experts are now the two worst, of every token in every layer
    assert '"routed"' not in (tmp_path / "replay/rollouts.jsonl").read_text().partition("\n")[0]


def test_with_nothing_to_undo_it_is_the_same_run_to_rounding(world: Any, tmp_path: Path) -> None:
    """Two steps of several micro-batches, with a reference model, which uses its own routing."""
    lines = []
    for name, rollout in (("replay", REPLAY), ("recompute", {})):
        train(world.config(tmp_path / name, num_steps=2, rollout=rollout), small.ONE)
        lines.append(small.metrics_of(tmp_path / name))
    for replayed, own in zip(*lines, strict=True):
        assert replayed.pop("rollout/routing_flip_frac") < 0.001
        assert replayed["rollout/mismatch_max"] < 1e-4
        assert replayed["policy/kl"] == pytest.approx(own["policy/kl"], abs=1e-5)
        assert replayed == pytest.approx(own, rel=1e-3, abs=1e-5)


def test_a_dense_policy_is_refused(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(world.policy)
    config = load_policy(world.policy).config
    sizes = {
        name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
    }
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, intermediate_size=32)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    cfg = world.config(tmp_path / "run", policy={"path": str(tmp_path / "dense")}, rollout=REPLAY)
    line = small.complaint(srpo.train.main, cfg, tmp_path, capsys)
    assert "LlamaForCausalLM has no experts to route to: set rollout.routing to 'recompute'" in line
    assert not (tmp_path / "run").exists()
