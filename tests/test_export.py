"""Any checkpoint of a run becomes a Hugging Face folder, whose scores are those that the run has logged at that step."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
import small_world as small
import smallest
import torch
from same_numbers import digests
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, AutoTokenizer

import srpo.evaluate
import srpo.export
from srpo.core.config.evaluation import BootstrapConfig, EvaluateConfig
from srpo.core.config.export import ExportConfig
from srpo.core.config.train import Config, PolicyConfig
from srpo.core.digests import digest_of_model
from srpo.core.errors import UserError
from srpo.dpo import dpo
from srpo.evaluate import evaluate
from srpo.export import check_target, export, restored
from srpo.policy.checkpoint_folders import latest_checkpoint
from srpo.policy.scalar import HEAD_FILE, load_scalar
from srpo.rewards.guidelines import GUIDELINES
from srpo.sft import sft
from srpo.train import train
from srpo.train_judge import train_judge


@pytest.fixture(scope="module")
def run(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run with the checkpoints of steps 1 to 3."""
    train_settings = {"checkpoint_every": 1, "keep_checkpoints": 3, "eval_every": 1, "best": "eval/accuracy"}
    cfg = world.config(
        tmp_path_factory.mktemp("exported") / "run",
        data={"eval": str(world.eval)},
        rollout={"num_prompts": 8},
        optimizer={"lr": 3e-3},
        train=train_settings,
    )
    train(cfg, small.ONE)
    return cfg


def of(run: Config, **changes: Any) -> ExportConfig:
    return replace(ExportConfig(run_dir=run.run_dir), **changes)


def tensors(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", ["1", "2", "3"])
def test_an_export_has_the_scores_that_were_logged_at_its_step(run: Config, step: str) -> None:
    out = export(of(run, step=step))
    assert out == Path(run.run_dir) / "export" / f"step_00000{step}"
    evaluate(EvaluateConfig(checkpoint=str(out), out=str(out / "scores"), bootstrap=BootstrapConfig(num_draws=0)), small.ONE)
    found = json.loads((out / "scores" / "results.json").read_text())
    logged = small.metrics_of(Path(run.run_dir))[int(step) - 1]
    assert [logged[f"eval/{name}"] for name in ("macro_f1", "accuracy", "good_f1", "parse_rate", "num_examples")] == [
        found[name] for name in ("macro_f1", "accuracy", "good_f1", "parse_rate", "num_examples")
    ]
    assert [logged[f"eval/class_f1/{grade}"] for grade in range(1, 5)] == found["class_f1"]
    assert [logged[f"eval/step_accuracy/{spec.name}"] for spec in run.schema.specs] == found["step_accuracy"]


def test_last_and_best_are_the_policies_of_the_run(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = export(of(run, out=str(tmp_path / "last")))
    best = export(of(run, step="best", out=str(tmp_path / "best")))
    number = small.metrics_of(Path(run.run_dir))[-1]["best/step"]
    assert "best eval/accuracy up to optimizer step 3: " in capsys.readouterr().out
    assert json.loads((best / "export.json").read_text())["checkpoint"] == f"step_{int(number):06d}"
    for folder, name in ((last, "policy"), (best, "policy-best")):
        policy = Path(run.run_dir) / name
        for file in sorted(policy.iterdir()):
            assert file.name == "COMPLETE" or file.read_bytes() == (folder / file.name).read_bytes(), file
    digest_of_model(best)  # whole
    assert AutoTokenizer.from_pretrained(last)("red shoes")["input_ids"]


def test_an_export_is_made_again_and_nothing_else_is_replaced(
    run: Config, world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(Path(run.run_dir))
    out = tmp_path / "out"
    export(of(run, step="1", out=str(out)))
    first = digests(out)
    (out / "model.safetensors").write_bytes(b"damaged")
    export(of(run, step="1", out=str(out)))
    assert digests(out) == first
    export(of(run, step="2", out=str(out)))
    assert digests(out) != first and set(digests(out)) == set(first)

    shutil.copytree(world.policy, tmp_path / "model")
    (tmp_path / "file").touch()
    taken = [tmp_path / "model", tmp_path / "file", Path(run.run_dir), Path(run.run_dir) / "policy"]
    for path in taken:
        line = small.complaint(srpo.export.main, of(run, out=str(path)), tmp_path, capsys)
        assert f"out is {path}, which exists and is no export" in line
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", Path(run.run_dir))
    for name in ("checkpoints/step_000009", "critic/x"):
        with pytest.raises(UserError, match="which the run clears: give another folder"):
            check_target(Path(run.run_dir) / name, Path(run.run_dir))
    after = digests(Path(run.run_dir))
    assert {name: after[name] for name in before} == before


def test_steps_that_are_not_there_are_answered_with_those_that_are(
    run: Config, world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in ("4", "0", "-1", "first", "1.0"):
        line = small.complaint(srpo.export.main, of(run, step=step), tmp_path, capsys)
        assert f"has no checkpoint of step {step}: give last, best or one of 1, 2, 3" in line
    plain = world.sft_config(tmp_path / "sft", num_steps=1, batch_size=2)
    sft(plain, small.ONE)
    line = small.complaint(srpo.export.main, of(plain, step="best"), tmp_path, capsys)
    assert "knows no best step, because train.best is not set" in line
    for folder, words in (
        (tmp_path, f"{tmp_path} has no complete checkpoint: name the folder of a run (or of a stage) that has some; here sft"),
        (tmp_path / "nowhere", f"no such folder: {tmp_path / 'nowhere'}"),
        (Path(run.run_dir) / "checkpoints", "has no complete checkpoint"),
        ("", "no run folder: name one"),
    ):
        assert words in small.complaint(srpo.export.main, ExportConfig(run_dir=str(folder)), tmp_path, capsys)
    (tmp_path / "sft" / "config.toml").unlink()
    assert "sft is not the folder of a run of srpo.train" in small.complaint(srpo.export.main, of(plain), tmp_path, capsys)
    shutil.rmtree(tmp_path / "sft" / "checkpoints")
    assert "has no complete checkpoint" in small.complaint(srpo.export.main, of(plain), tmp_path, capsys)


def test_damage_and_another_start_are_named(run: Config, world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.run_dir, folder)
    shutil.copytree(world.policy, tmp_path / "start")
    moved = ExportConfig(run_dir=str(folder), step="2", policy=str(tmp_path / "start"), out=str(tmp_path / "out"))
    export(moved)
    line = small.complaint(srpo.export.main, replace(moved, policy=str(world.base)), tmp_path, capsys)
    assert f"the starting policy at {world.base} is not the one" in line
    line = small.complaint(srpo.export.main, replace(moved, policy=str(tmp_path / "gone")), tmp_path, capsys)
    assert "is not there: say where it is with --policy DIR" in line
    files = sorted(path for path in (folder / "checkpoints" / "step_000002").iterdir() if path.name != "COMPLETE")
    assert len(files) == 3
    for file in files:
        kept = file.read_bytes()
        data = bytearray(kept)
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        file.write_bytes(data)
        line = small.complaint(srpo.export.main, replace(moved, out=str(tmp_path / "new")), tmp_path, capsys)
        assert file.name in line and "restore it, or give another --step" in line and not (tmp_path / "new").exists()
        file.write_bytes(kept)


def test_bfloat16_rounds_every_weight_once(run: Config, tmp_path: Path) -> None:
    exact = AutoModelForCausalLM.from_pretrained(export(of(run, out=str(tmp_path / "exact"))))
    rounded = export(of(run, dtype="bfloat16", out=str(tmp_path / "rounded")))
    assert len(tensors(rounded)) < 0.6 * len(tensors(tmp_path / "exact"))
    model = AutoModelForCausalLM.from_pretrained(rounded)
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    pairs = zip(exact.named_parameters(), model.named_parameters(), strict=True)
    assert all(a == b and torch.equal(x.to(torch.bfloat16), y) for (a, x), (b, y) in pairs)


def test_a_checkpoint_of_several_ranks_is_read_by_one(two_ranks: Path, tmp_path: Path) -> None:
    checkpoint = latest_checkpoint(two_ranks / "checkpoints")
    assert checkpoint is not None and len(list(checkpoint.glob("rank_*.pt"))) == 2
    lab.tiny(99).save_pretrained(tmp_path / "start")
    dcp_to_torch_save(checkpoint, tmp_path / "flat.pt")
    flat = torch.load(tmp_path / "flat.pt", weights_only=True)
    found = dict(restored(checkpoint, PolicyConfig(path=str(tmp_path / "start"))).model.named_parameters())
    assert {f"policy/{name}" for name in found} == {name for name in flat if name.startswith("policy/")}
    assert all(torch.equal(tensor, flat[f"policy/{name}"]) for name, tensor in found.items())


def test_runs_of_sft_dpo_and_both_kinds_of_judge(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smallest.make_inputs(world)
    monkeypatch.chdir(tmp_path)
    smaller = {"sft": sft, "dpo": dpo, "scalar": train_judge, "train_judge": train_judge}
    Path("guidelines.txt").write_text("A knife is no fork.\n")
    for program, work in smaller.items():
        asked = {"guidelines": "guidelines.txt"} if program == "train_judge" else {}
        work(replace(smallest.settings_of(program, world), run_dir=program, **asked), small.ONE)
    for name in ("sft", "dpo", "scalar/sft", "train_judge/sft", "train_judge/grpo"):
        out = export(ExportConfig(run_dir=name, out=f"out/{name}"))
        assert tensors(out) == tensors(Path(name) / "policy"), name
    assert (Path("out/scalar/sft") / HEAD_FILE).read_bytes() == (Path("scalar/sft/policy") / HEAD_FILE).read_bytes()
    load_scalar("out/scalar/sft")
    for stage in ("sft", "grpo"):  # a judge is asked as in its training wherever its folder came from
        kept = [Path(folder) / GUIDELINES for folder in (f"out/train_judge/{stage}", f"train_judge/{stage}/policy")]
        assert kept[0].read_bytes() == kept[1].read_bytes() and "A knife" in kept[0].read_text()
    assert not (Path("out/sft") / GUIDELINES).exists()
    with pytest.raises(UserError, match="that has some; here grpo and sft"):
        export(ExportConfig(run_dir="train_judge"))


def test_evaluate_points_to_the_export(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(run.run_dir)
    for path, step in ((folder / "checkpoints", 3), (folder / "checkpoints" / "step_000002", 2), (folder, 3)):
        line = small.complaint(srpo.evaluate.main, EvaluateConfig(checkpoint=str(path)), tmp_path, capsys)
        assert f"`python -m srpo.export {folder} --step {step}`" in line and f"step_00000{step}" in line
