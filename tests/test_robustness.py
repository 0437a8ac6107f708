"""Faults of the file system, damaged files, two processes in one folder, inputs that change: the same bits, or one sentence.

A sample in every run; `make nightly` and `tools/robustness.py` try every file operation and every file.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fault_lab
import pytest
import small_world as small
import smallest
from same_numbers import digests

import srpo.sft
import srpo.train
from srpo.core.config.train import Config
from srpo.core.run_lock import LOCK
from srpo.train import train

SHORT = {"data": {"eval": ""}, "rollout": {"num_prompts": 2, "group_size": 4, "max_new_tokens": 64}}
SHORT |= {"sampler": {"difficulty_low": -1.0, "difficulty_high": 2.0}, "train": {"checkpoint_every": 1}}

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the faults")


def check(found: list[dict[str, Any]], least: int) -> None:
    print(Counter((result["program"], result["fault"], result["outcome"]) for result in found))
    assert [result for result in found if result["problem"]] == []
    assert len(found) >= least


@needs_compiler
def test_a_sample_of_faults(world: Any, tmp_path: Path) -> None:
    programs = ["train", random.choice(["ppo", "sft", "dpo", "export", "select", "evaluate"])]
    jobs = [{"program": program, "faults": 1, "damage": 1} for program in programs]
    check(fault_lab.launch(world.folder, tmp_path, jobs, 30), 2)


@needs_compiler
@pytest.mark.nightly
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("program", smallest.PROGRAMS)
def test_faults_at_every_file_operation(world: Any, tmp_path: Path, program: str) -> None:
    check(fault_lab.launch(world.folder, tmp_path, [{"program": program, "faults": 0, "damage": 0}], 3600), 10)


def run_config(world: Any, folder: Path, **changes: Any) -> Config:
    return small.changed(world.config(folder, **{**SHORT, "num_steps": 3}), changes)


def test_a_second_process_in_the_folder_is_refused(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = run_config(world, tmp_path / "run")
    first = small.Program("srpo.train", cfg, tmp_path / "log")
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run" / LOCK).exists() and first.running() and time.monotonic() < until:
            time.sleep(0.01)
        first.process.send_signal(signal.SIGSTOP)
        line = small.complaint(srpo.train.main, cfg, tmp_path, capsys)
        assert f"another process (pid {first.process.pid} on " in line and f"works in {tmp_path / 'run'}" in line
        line = small.complaint(srpo.sft.main, world.sft_config(tmp_path / "run"), tmp_path, capsys)
        assert "another process" in line
        assert first.running()
    finally:
        first.kill()
    train(small.changed(cfg, {"run_dir": str(tmp_path / "whole")}), small.ONE)
    train(cfg, small.ONE)  # the lock of a killed process is nobody's
    expected, found = digests(tmp_path / "whole"), digests(tmp_path / "run")
    assert {name for name in expected if expected[name] != found.get(name)} == {"config.toml"}


@pytest.fixture
def stopped(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run that was stopped before its third step, with inputs of its own."""
    for name in ("policy", "reference"):
        shutil.copytree(world.policy, tmp_path / name)
    for name in ("train", "eval"):
        shutil.copy(getattr(world, name), tmp_path / f"{name}.jsonl")
    cfg = run_config(
        world,
        tmp_path / "run",
        data={"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        policy={"path": str(tmp_path / "policy"), "reference": str(tmp_path / "reference")},
        train={"eval_examples": 2},
    )
    calls = iter(range(10))

    def stopping(*args: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    real = srpo.train.collect
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(srpo.train, "collect", stopping)
        train(cfg, small.ONE)
    return cfg


def test_inputs_that_change_between_kill_and_resume_are_refused_by_name(
    world: Any, stopped: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(tmp_path / "run")

    def line(cfg: Config = stopped) -> str:
        text = small.complaint(srpo.train.main, cfg, tmp_path, capsys)
        assert digests(tmp_path / "run") == before
        return text

    for name, words in (("train", "the training data"), ("eval", "the evaluation data")):
        path = tmp_path / f"{name}.jsonl"
        kept = path.read_text()
        small.rewrite_line(path, path, 1, lambda row: {**row, "title": row["title"] + " x"})
        assert f"{words} at {path} is not the one that {tmp_path / 'run'} was started with" in line()
        path.write_text(kept)
    for name, words in (("policy", "the starting policy"), ("reference", "the reference")):
        path = tmp_path / name
        path.rename(tmp_path / "kept")
        shutil.copytree(world.base, path)
        assert f"{words} at {path} is not the one that {tmp_path / 'run'} was started with" in line()
        shutil.rmtree(path)
        (tmp_path / "kept").rename(path)
    for folder in ("policy", "reference"):  # the same contents elsewhere are the same run
        (tmp_path / folder).rename(tmp_path / f"moved_{folder}")
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    moved = small.changed(
        stopped,
        {
            "data": {"train": str(tmp_path / "moved.jsonl")},
            "policy": {"path": str(tmp_path / "moved_policy"), "reference": str(tmp_path / "moved_reference")},
        },
    )
    train(moved, small.ONE)
    assert [row["step"] for row in small.metrics_of(tmp_path / "run")] == [1, 2, 3]


def test_a_damaged_run_is_refused_and_goes_on_as_the_message_says(
    stopped: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    weights = next((run_dir / "checkpoints" / "step_000002").glob("*.distcp"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    line = small.complaint(srpo.train.main, stopped, tmp_path, capsys)
    assert f"{weights} is damaged" in line and line.endswith(f"goes on from {run_dir / 'checkpoints' / 'step_000001'}")
    shutil.rmtree(weights.parent)
    kept = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text("")
    line = small.complaint(srpo.train.main, stopped, tmp_path, capsys)
    assert "metrics.jsonl is damaged: it lacks the lines of optimizer steps 1." in line
    (run_dir / "metrics.jsonl").write_text(kept)
    shutil.move(run_dir / "checkpoints", tmp_path / "kept")
    line = small.complaint(srpo.train.main, stopped, tmp_path, capsys)
    assert f"logs up to optimizer step 2, but no complete checkpoint: restore {run_dir / 'checkpoints'}" in line
    assert (run_dir / "metrics.jsonl").read_text() == kept
    shutil.move(tmp_path / "kept", run_dir / "checkpoints")
    train(stopped, small.ONE)
    whole = small.changed(stopped, {"run_dir": str(tmp_path / "whole")})
    train(whole, small.ONE)
    expected, found = digests(tmp_path / "whole"), digests(run_dir)
    assert {name for name in expected if expected[name] != found.get(name)} == {"config.toml"}


def test_a_run_that_diverged_goes_on_with_a_lower_learning_rate(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    cfg = run_config(world, run_dir, optimizer={"schedule": "constant", "warmup_steps": 0}, num_steps=4)
    wild = small.changed(cfg, {"optimizer": {"lr": 1e25, "grad_clip": 0.0}})
    line = small.complaint(srpo.train.main, wild, tmp_path, capsys)
    assert "not finite" in line and "optimizer.lr" in line
    calm = small.changed(wild, {"optimizer": {"lr": 1e-4}})
    assert "not finite" in small.complaint(srpo.train.main, calm, tmp_path, capsys)  # so is the checkpoint: finite, but wild
    (newest,) = (run_dir / "checkpoints").iterdir()
    shutil.rmtree(newest)  # as the message says
    train(calm, small.ONE)
    *_, change = (run_dir / "changes.jsonl").read_text().splitlines()
    assert change == '{"after_step": 0, "setting": "optimizer.lr", "from": 1e+25, "to": 0.0001}'
    assert [row["train/lr"] for row in small.metrics_of(run_dir)] == [1e-4] * 4
    train(calm, small.ONE)
    assert len((run_dir / "changes.jsonl").read_text().splitlines()) == 1
    (run_dir / "changes.jsonl").unlink()
    assert "changes.jsonl is missing: restore it" in small.complaint(srpo.train.main, calm, tmp_path, capsys)
    (run_dir / "changes.jsonl").write_text(change.replace("0.0001", "0.0002") + "\n")
    line = small.complaint(srpo.train.main, calm, tmp_path, capsys)
    assert "changes.jsonl is damaged: its bytes up to optimizer step 4 are not those that were written" in line
