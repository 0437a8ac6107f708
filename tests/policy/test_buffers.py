"""Buffers that a checkpoint stores, such as the biases of routers: in saved policies, training state and weight syncs."""

from __future__ import annotations

from pathlib import Path

import policy_lab as lab
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from srpo.core.config.train import LoraConfig, PolicyConfig
from srpo.policy.adapters import add_adapter, merged_into
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.checkpoint_names import iter_checkpoint_blocks, iter_checkpoint_params
from srpo.policy.model import Policy, load_policy, save_policy
from srpo.policy.scalar import ScalarModel, load_scalar, save_scalar
from srpo.rollout.local import LocalEngine

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy as `save_policy` writes it."""
    path = tmp_path_factory.mktemp("biased") / "policy"
    save_policy(Policy(lab.biased()), lab.tokenizer(), path)
    return path


def changed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Double the biases in place. Returns their new values."""
    for buffer in lab.biases(model).values():
        buffer.mul_(2)
    return {name: buffer.clone() for name, buffer in lab.biases(model).items()}


@pytest.mark.parametrize("rank", [0, 2])
def test_a_saved_policy_keeps_them(folder: Path, tmp_path: Path, rank: int) -> None:
    model = load_policy(folder)
    kept = changed(model)
    if rank:
        model = add_adapter(model, PolicyConfig(path=str(folder), lora=LoraConfig(rank=rank)), 0)
    save_policy(Policy(model), lab.tokenizer(), tmp_path / "policy")
    assert list(kept) == [BIAS] and bool((kept[BIAS] >= 2).all())
    assert lab.same_bits(lab.biases(load_policy(tmp_path / "policy")), kept)
    assert lab.same_bits(lab.biases(AutoModelForCausalLM.from_pretrained(tmp_path / "policy")), kept)
    if rank:
        assert lab.same_bits(lab.biases(merged_into(Policy(model), load_policy(folder))), kept)


def test_a_saved_scalar_judge_keeps_them(folder: Path, tmp_path: Path) -> None:
    model = ScalarModel(load_policy(folder))
    kept = changed(model)
    save_scalar(model, lab.tokenizer(), tmp_path / "judge")
    assert kept and lab.same_bits(lab.biases(load_scalar(tmp_path / "judge")), kept)


def test_training_state_keeps_them(folder: Path, tmp_path: Path) -> None:
    policy, other = Policy(load_policy(folder)), Policy(load_policy(folder))
    kept = changed(policy)
    optimizer = torch.optim.AdamW(policy.parameters())
    path = save_checkpoint(tmp_path, 1, policy, optimizer, {}, lab.one_process())
    load_checkpoint(path, other, torch.optim.AdamW(other.parameters()), lab.one_process())
    assert lab.same_bits(lab.biases(other), kept)


def test_a_weight_sync_sends_them(folder: Path) -> None:
    policy = Policy(load_policy(folder))
    engine = LocalEngine(load_policy(folder))
    kept = changed(policy.model)
    engine.sync_weights(policy, 1)
    assert lab.same_bits(lab.biases(engine.model), kept)


def test_they_travel_under_the_names_of_a_checkpoint(folder: Path) -> None:
    policy, stored = Policy(load_policy(folder)), load_file(folder / "model.safetensors")
    assert lab.same_bits({name: tensor.clone() for name, tensor in iter_checkpoint_params(policy)}, stored)
    parts = {part.name: part.shape for _, parts in iter_checkpoint_blocks(policy, {}) for part in parts}
    assert parts == {name: tuple(tensor.shape) for name, tensor in stored.items()} and BIAS in parts
