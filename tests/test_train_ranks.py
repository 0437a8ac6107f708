"""`torchrun --nproc-per-node 2 -m srpo.train` on a CPU: it runs, and its first optimizer step equals, up to rounding, the step
of one process on the same rollouts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from srpo.core.batch import Rollout, read_rollouts
from srpo.core.config.export import ExportConfig
from srpo.core.config.train import Config
from srpo.export import export
from srpo.train import pack_own, policy_update, train
from srpo.training.credit import assign_credit, rollout_metrics
from srpo.training.run import Run

CHANGES = {
    "num_steps": 2,
    "rollout": {"num_prompts": 6},
    "loss": {"kl_coef": 0.1},
    "advantage": {"normalize": "group_step"},
    "sampler": {"refill": 2, "difficulty_low": 0.15},
    "optimizer": {"grad_clip": 0.0},
    "train": {"checkpoint_every": 1, "eval_every": 1},
}


@pytest.fixture(scope="module")
def two_ranks(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two steps under torchrun with two processes."""
    folder = tmp_path_factory.mktemp("two_ranks")
    cfg = world.config(folder / "run", data={"eval": str(world.eval)}, **CHANGES)
    cfg = small.changed(cfg, {"train": {"best": "eval/macro_f1"}})
    small.Program("srpo.train", cfg, folder, num_ranks=2).finish()
    return folder / "run"


def test_two_ranks_leave_one_run(world: Any, two_ranks: Path) -> None:
    files = {path.name for path in two_ranks.iterdir()}
    logs = {"metrics.jsonl", "timing.jsonl", "rollouts.jsonl"}
    assert files == {"config.toml", "inputs.json", *logs, "policy", "policy-best", "checkpoints"}
    lines = small.metrics_of(two_ranks)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert all(value is not None and math.isfinite(value) for value in line.values())
        assert line["rollout/num_groups_in_window"] <= 6 <= line["rollout/num_groups"] == line["rollout/num_responses"] / 4
        assert 0 < line["reward/total"] < 1.8 and line["train/grad_norm"] > 0
        assert abs(line["rollout/mismatch_kl"]) < 1e-6 and line["policy/ratio"] == pytest.approx(1.0)
    assert "eval/macro_f1" in lines[1] and lines[1]["eval/num_examples"] == 12
    assert lines[0]["rollout/num_refill_rounds"] > 0  # so the next test covers a step with refill rounds
    second = [rollout for step, rollout in read_rollouts(two_ranks / "rollouts.jsonl") if step == 2]
    assert [r.group for r in second] == [g for g in range(int(lines[1]["rollout/num_groups"])) for _ in range(4)]
    assert len({r.example_id for r in second}) == lines[1]["rollout/num_groups"]
    policy = AutoModelForCausalLM.from_pretrained(two_ranks / "policy", attn_implementation="sdpa")
    before = small.parameters_of(world.policy)
    assert {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])} == before.keys()


def test_one_process_exports_what_two_ranks_have_saved(two_ranks: Path, tmp_path: Path) -> None:
    for step, name in (("last", "policy"), ("best", "policy-best")):
        out = export(ExportConfig(run_dir=str(two_ranks), step=step, out=str(tmp_path / name)))
        assert (out / "model.safetensors").read_bytes() == (two_ranks / name / "model.safetensors").read_bytes()


def test_two_ranks_sample_what_one_samples(world: Any, two_ranks: Path, tmp_path: Path) -> None:
    """Prompts and responses agree, also those of the refill rounds."""
    train(replace(world.config(tmp_path / "run", **CHANGES), num_steps=1), small.ONE)
    both = ([r for step, r in read_rollouts(run / "rollouts.jsonl") if step == 1] for run in (two_ranks, tmp_path / "run"))
    one, two = ([(r.group, r.example_id, r.response_ids) for r in rollouts] for rollouts in both)
    assert one == two


def first_step(cfg: Config, rollouts: list[Rollout]) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
    """(metrics, gradients by parameter, number of micro-batches) of one process on given rollouts."""
    run = Run.build(cfg, small.ONE)
    credit = assign_credit(rollouts, run.schema, cfg.advantage, cfg.loss, cfg.sampler)
    batches = pack_own(run, rollouts, credit)
    metrics = rollout_metrics(rollouts, run.schema, credit)
    metrics |= policy_update(run, batches, 0)
    momenta = {name: run.optimizer.state[p]["exp_avg"] for name, p in run.policy.model.named_parameters()}
    return metrics, {name: m / (1 - cfg.optimizer.betas[0]) for name, m in momenta.items()}, len(batches)


@pytest.mark.parametrize("rows", [100_000, 450])
def test_the_step_of_two_ranks_is_the_step_of_one(world: Any, two_ranks: Path, tmp_path: Path, rows: int) -> None:
    """The gradients are read from the optimizer: after one step the first moment is (1 - beta_1) times the gradient."""
    rollouts = [r for step, r in read_rollouts(two_ranks / "rollouts.jsonl") if step == 1]
    cfg = world.config(tmp_path / "run", **CHANGES)
    cfg = replace(cfg, train=replace(cfg.train, micro_batch_tokens=rows))
    metrics, gradients, num_batches = first_step(cfg, rollouts)
    assert num_batches == 1 if rows == 100_000 else num_batches >= 4
    line = small.metrics_of(two_ranks)[0]
    # A maximum of last-bit differences depends on the shapes of the matrix products, so it has a bound and need not be equal.
    assert max(line["rollout/mismatch_max"], metrics.pop("rollout/mismatch_max")) < 1e-4
    assert {key: line[key] for key in metrics} == pytest.approx(metrics, rel=1e-5, abs=1e-9)
    assert line["train/loss"] == pytest.approx(metrics["train/loss"], rel=1e-5)

    dcp_to_torch_save(two_ranks / "checkpoints" / "step_000001", tmp_path / "flat.pt")
    flat = torch.load(tmp_path / "flat.pt", weights_only=True)
    for name, want in gradients.items():
        got = flat[f"optimizer/{name}/exp_avg"] / (1 - cfg.optimizer.betas[0])
        assert (got - want).norm() <= 1e-5 * want.norm(), name


def test_one_process_cannot_go_on_with_a_run_of_two(world: Any, two_ranks: Path) -> None:
    cfg = world.config(two_ranks, data={"eval": str(world.eval)}, **CHANGES)
    with pytest.raises(ValueError, match="was written by 2 ranks, this run has 1: start 2 processes"):
        train(cfg, small.ONE)
