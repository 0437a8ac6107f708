"""The programs with `policy.lora`: they train, resume with the same bits, and leave an adapter and a merged policy."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small
import torch

import srpo.train
from srpo.core.config.dpo import DpoConfig
from srpo.core.config.export import ExportConfig
from srpo.core.config.judge import JudgeConfig, JudgeGrpoConfig, MineConfig
from srpo.core.config.train import LoraConfig, LossConfig, OptimizerConfig, PolicyConfig, RolloutConfig, SamplerConfig
from srpo.core.digests import digest_of_model
from srpo.data.pairs import read_pairs
from srpo.data.tokenizer import load_tokenizer
from srpo.dpo import dpo
from srpo.export import export
from srpo.policy.adapters import add_adapter, iter_merged_params
from srpo.policy.model import load_policy, make_tiny
from srpo.policy.scalar import load_scalar
from srpo.sft import sft
from srpo.train import main, train
from srpo.train_judge import train_judge

LORA = {"lora": {"rank": 4}}


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The parameters of the base with the adapter in the folder."""
    policy = PolicyConfig(path=str(base), lora=LoraConfig(start=str(adapter)))
    return dict(iter_merged_params(add_adapter(load_policy(base), policy, 0)))


def check_outputs(run_dir: Path, base: Path) -> None:
    """The run's policy is the base with the run's adapter, and not the base itself."""
    policy = small.parameters_of(run_dir / "policy")
    assert small.same_bits(policy, merged(base, run_dir / "adapter"))
    assert not small.same_bits(policy, small.parameters_of(base))


def test_srpo_trains_an_adapter(world: Any, tmp_path: Path) -> None:
    before = digest_of_model(world.policy)
    cfg = world.config(tmp_path / "run", num_steps=2, policy=LORA, loss={"kl_coef": 0.1}, optimizer={"lr": 1e-2})
    train(cfg, small.ONE)
    first, second = small.metrics_of(tmp_path / "run")
    assert first["policy/kl"] == 0 < second["policy/kl"]  # the reference is the policy without its adapter
    assert all(abs(line["rollout/mismatch_kl"]) < 1e-6 and line["rollout/mismatch_max"] < 1e-4 for line in (first, second))
    check_outputs(tmp_path / "run", world.policy)
    assert digest_of_model(world.policy) == before


def test_the_best_adapter_is_kept_beside_the_last_and_any_step_is_exported(world: Any, tmp_path: Path) -> None:
    best = {"eval_every": 1, "checkpoint_every": 1, "best": "eval/parse_rate", "eval_examples": 4, "keep_checkpoints": 9}
    changes: dict[str, Any] = {"train": best, "data": {"eval": str(world.eval)}, "optimizer": {"lr": 1e-2}}
    train(world.config(tmp_path / "run", num_steps=3, policy=LORA, **changes), small.ONE)
    step = int(max(small.metrics_of(tmp_path / "run"), key=lambda line: (line["eval/parse_rate"], -line["step"]))["step"])
    kept = small.parameters_of(tmp_path / "run" / "policy-best")
    assert small.same_bits(kept, merged(world.policy, tmp_path / "run" / "adapter-best"))
    check_outputs(tmp_path / "run", world.policy)
    out = export(ExportConfig(run_dir=str(tmp_path / "run"), step=str(step), out=str(tmp_path / "out")))
    assert small.same_bits(small.parameters_of(out), kept)
    assert small.same_bits(kept, merged(world.policy, tmp_path / "out-adapter"))
    rounded = export(ExportConfig(run_dir=str(tmp_path / "run"), step=str(step), out=str(tmp_path / "bf16"), dtype="bfloat16"))
    once = {name: tensor.bfloat16().float() for name, tensor in kept.items()}  # merged in fp32, then rounded
    assert small.same_bits(small.parameters_of(rounded), once)


@pytest.mark.parametrize("inputs", ["logits", "hidden"])
def test_a_killed_run_ends_with_the_same_bits(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: str) -> None:
    """It starts from an adapter, which is also the reference of the KL term."""
    sft(world.sft_config(tmp_path / "sft", num_steps=2, policy={"path": str(world.policy), **LORA}), small.ONE)
    policy = {"lora": {"start": str(tmp_path / "sft" / "adapter")}}
    changes: dict[str, Any] = {"loss": {"kl_coef": 0.1, "inputs": inputs}, "train": {"checkpoint_every": 1}}
    cfg = world.config(tmp_path / "whole", num_steps=3, policy=policy, **changes)
    train(cfg, small.ONE)
    want = small.outcome(tmp_path / "whole", tmp_path / "flat.pt")
    assert any("lora_A" in name for name in want) and not any("embed_tokens" in name for name in want)
    adapter = (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()

    def die(run: Any, batches: Any, step: int) -> dict[str, float]:
        if step == 2:
            raise InterruptedError("killed")
        return whole(run, batches, step)

    whole = srpo.train.policy_update
    cfg = replace(cfg, run_dir=str(tmp_path / "killed"))
    with monkeypatch.context() as patch:
        patch.setattr(srpo.train, "policy_update", die)
        with pytest.raises(InterruptedError):
            train(cfg, small.ONE)
    train(cfg, small.ONE)
    got = small.outcome(tmp_path / "killed", tmp_path / "flat.pt")
    assert sorted(name for name in got.keys() | want.keys() if got.get(name) != want.get(name)) == []
    assert (tmp_path / "killed" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    check_outputs(tmp_path / "killed", world.policy)
    shutil.rmtree(tmp_path / "sft" / "adapter")
    shutil.copytree(tmp_path / "killed" / "adapter", tmp_path / "sft" / "adapter")
    with pytest.raises(ValueError, match=r"the starting adapter at .* is not the one that"):
        train(cfg, small.ONE)


@pytest.mark.parametrize("inputs", ["logits", "hidden"])
def test_sft_trains_an_adapter(world: Any, tmp_path: Path, inputs: str) -> None:
    cfg = world.sft_config(tmp_path / "run", num_steps=12, inputs=inputs, policy=LORA, optimizer={"warmup_steps": 0})
    sft(cfg, small.ONE)
    losses = [line["train/loss"] for line in small.metrics_of(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.1
    check_outputs(tmp_path / "run", world.base)


def test_dpo_trains_an_adapter(world: Any, tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": c, "rejected": "no"} for p, c in list(read_pairs(world.pairs))[:20]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DpoConfig(run_dir=str(tmp_path / "run"), pairs=str(tmp_path / "pairs.jsonl"), num_steps=2, batch_size=8)
    cfg = small.changed(cfg, {"policy": {"path": str(world.policy), **LORA}, "optimizer": {"lr": 1e-2, "warmup_steps": 0}})
    dpo(cfg, small.ONE)
    first, second = small.metrics_of(tmp_path / "run")
    assert first["dpo/margin"] == pytest.approx(0, abs=1e-6) and second["dpo/margin"] != first["dpo/margin"]
    check_outputs(tmp_path / "run", world.policy)


@pytest.fixture(scope="module")
def base(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained policy whose context has room for a response and its verdicts."""
    folder = tmp_path_factory.mktemp("roomy")
    tokenizer = load_tokenizer(world.base)
    make_tiny(tokenizer, replace(small.TINY, max_context=640), 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rollouts(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled")
    train(world.config(folder, num_steps=1, rollout={"num_prompts": 16}), small.ONE)
    return folder / "rollouts.jsonl"


def judge_settings(world: Any, base: Path, run_dir: Path, sampled: Path) -> JudgeConfig:
    rollout = RolloutConfig(num_prompts=4, group_size=3)
    return JudgeConfig(
        run_dir=str(run_dir),
        data=str(world.train),
        rollouts=str(sampled),
        held_out=6,
        num_votes=2,
        max_new_tokens=40,
        annotator_reasons=False,
        sft=world.sft_config(run_dir, num_steps=2, batch_size=12, policy={"path": str(base), **LORA}),
        mine=MineConfig(num_votes=2, num_cases=8, solve_low=-1.0, solve_high=2.0),  # of an untrained judge, all are cases
        grpo=JudgeGrpoConfig(
            num_steps=2,
            rollout=rollout,
            loss=LossConfig(kl_coef=0.1),
            optimizer=OptimizerConfig(lr=1e-2),
            sampler=SamplerConfig(difficulty_low=-1.0, difficulty_high=2.0),
        ),
    )


def test_both_stages_of_the_judge_train_one_adapter(world: Any, base: Path, rollouts: Path, tmp_path: Path) -> None:
    """The second stage goes on with the first one's adapter of the same base."""
    report = train_judge(judge_settings(world, base, tmp_path / "judge", rollouts), small.ONE)
    assert {"sft", "mine", "grpo"} <= report.keys()
    first, last = (merged(base, tmp_path / "judge" / stage / "adapter") for stage in ("sft", "grpo"))
    assert small.same_bits(first, small.parameters_of(tmp_path / "judge" / "sft" / "policy"))
    assert small.same_bits(last, small.parameters_of(tmp_path / "judge" / "policy"))
    assert small.metrics_of(tmp_path / "judge" / "grpo")[0]["policy/kl"] == 0


def test_the_scalar_judge_trains_an_adapter_and_its_head(world: Any, base: Path, rollouts: Path, tmp_path: Path) -> None:
    train_judge(replace(judge_settings(world, base, tmp_path / "judge", rollouts), kind="scalar"), small.ONE)
    model = load_scalar(tmp_path / "judge" / "policy").model
    before = small.parameters_of(base)
    changed = {name for name, p in model.named_parameters() if name not in before or not torch.equal(p, before[name])}
    assert {"scalar_head.weight", "scalar_head.bias"} < changed
    assert all("self_attn" in name or "experts" in name or "scalar_head" in name for name in changed)


def test_an_adapter_as_a_policy_is_one_line(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft(world.sft_config(tmp_path / "sft", num_steps=1, policy=LORA), small.ONE)
    cfg = world.config(tmp_path / "run", policy={"path": str(tmp_path / "sft" / "adapter")})
    assert "holds an adapter and no model: give its base as policy.path" in small.complaint(main, cfg, tmp_path, capsys)
    assert not (tmp_path / "run").exists()
