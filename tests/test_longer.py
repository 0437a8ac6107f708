"""A run goes on with a larger num_steps, and with other settings that cannot affect the past."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import small_world as small
from same_numbers import digests

import srpo.dpo
import srpo.sft
import srpo.train
from srpo.core.config.sft import SftConfig
from srpo.core.config.train import Config
from srpo.core.metrics import read_metrics
from srpo.sft import sft
from srpo.train import train
from srpo.training.optim import learning_rate

SHORT = {"num_prompts": 2, "group_size": 4, "max_new_tokens": 32}


def config(world: Any, run_dir: Path, num_steps: int, **changes: Any) -> Config:
    cfg = world.config(run_dir, num_steps=num_steps, rollout=SHORT, train={"keep_checkpoints": 1})
    return small.changed(small.changed(cfg, {"sampler": {"difficulty_low": -1, "difficulty_high": 2}}), changes)


def differing(a: Path, b: Path) -> set[str]:
    first, second = digests(a), digests(b)
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)} - {"config.toml"}


def test_a_longer_run_is_the_run_of_that_length_unless_its_schedule_falls(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = {"optimizer": {"schedule": "constant"}}
    for num_steps in (2, 3, 5):  # 5 needs no further checkpoint than those of 2 and 3
        train(config(world, tmp_path / "run", num_steps, **constant), small.ONE)
    train(config(world, tmp_path / "whole", 5, **constant), small.ONE)
    assert differing(tmp_path / "run", tmp_path / "whole") == {"changes.jsonl"}
    out = capsys.readouterr().out
    assert "num_steps: 2 until optimizer step 2, 3 from then on (recorded in " in out and "schedule" not in out

    falling = config(world, tmp_path / "falling", 2)
    train(falling, small.ONE)
    before = (tmp_path / "falling" / "metrics.jsonl").read_bytes()
    longer = small.changed(falling, {"num_steps": 4})
    train(longer, small.ONE)
    out = capsys.readouterr().out
    assert "num_steps: 2 until optimizer step 2, 4 from then on" in out and "optimizer.schedule is 'linear'" in out
    assert (tmp_path / "falling" / "metrics.jsonl").read_bytes().startswith(before)
    rates = [line["train/lr"] for line in read_metrics(tmp_path / "falling" / "metrics.jsonl")]
    assert rates == [learning_rate(longer.optimizer, step, 2 if step < 2 else 4) for step in range(4)]
    (change,) = (tmp_path / "falling" / "changes.jsonl").read_text().splitlines()
    assert json.loads(change) == {"after_step": 2, "setting": "num_steps", "from": 2, "to": 4}
    line = small.complaint(srpo.train.main, small.changed(falling, {"num_steps": 3}), tmp_path, capsys)
    assert "num_steps is 3" in line and "has done 4 optimizer steps: set it to 4 or more" in line


def test_settings_that_cannot_affect_the_past_change_without_a_word(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(world, tmp_path / "run", 4, data={"eval": str(world.eval)}, train={"checkpoint_every": 50, "eval_examples": 2})
    calls, real = iter(range(10)), srpo.train.collect

    def stopping(*args: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(srpo.train, "collect", stopping)
        train(cfg, small.ONE)
    steered = small.changed(cfg, {"train": {"checkpoint_every": 1, "keep_checkpoints": 2, "eval_every": 2}})
    capsys.readouterr()
    train(steered, small.ONE)  # step 3 was logged, and there was no checkpoint every 50 steps to go on from
    assert [bool("eval/macro_f1" in line) for line in small.metrics_of(tmp_path / "run")] == [False, True, False, True]
    logged = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    changes = {"eval_every": 1, "keep_checkpoints": 1, "checkpoint_every": 7, "log_rollouts": False, "micro_batch_tokens": 900}
    changes = {key: value for key, value in changes.items() if random.random() < 0.7}
    capsys.readouterr()
    last = small.changed(steered, {"train": changes, "reward": {"judge_timeout_s": 3.0, "audit": "warn"}})
    train(last, small.ONE)
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if not line.startswith("SRPO ")] == []
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == logged
    line = small.complaint(srpo.train.main, small.changed(last, {"train": {"eval_examples": 3}}), tmp_path, capsys)
    assert "train.eval_examples = 2, this one has 3" in line


def test_supervised_runs_grow_too(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def settings(name: str, num_steps: int, **changes: Any) -> SftConfig:
        return world.sft_config(tmp_path / name, num_steps=num_steps, batch_size=4, **changes)

    constant = {"optimizer": {"schedule": "constant"}}
    sft(settings("run", 2, **constant), small.ONE)
    sft(settings("run", 4, checkpoint_every=3, micro_batch_tokens=9000, **constant), small.ONE)
    sft(settings("whole", 4, **constant), small.ONE)
    assert differing(tmp_path / "run", tmp_path / "whole") == {"changes.jsonl"}
    capsys.readouterr()
    sft(settings("falling", 2), small.ONE)
    sft(settings("falling", 3), small.ONE)
    assert "num_steps: 2 until optimizer step 2, 3 from then on" in capsys.readouterr().out
    line = small.complaint(srpo.sft.main, settings("falling", 1), tmp_path, capsys)
    assert "num_steps is 1" in line and "has done 3 optimizer steps" in line
