"""`srpo.train` without settings: the built-in world, said in plain words, resumed by the same command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small_world as small

import srpo.train
from srpo.core.config.demo import DemoConfig
from srpo.core.config.train import Config
from srpo.core.errors import UserError
from srpo.experiments.first_run import WORLD


def test_no_settings_train_a_tiny_policy_on_the_built_in_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"num_demonstrations": 300, "num_train": 64, "num_eval": 12, "vocab_size": 600, "model": small.TINY, "sft_steps": 60}
    training = {"sft_batch": 16, "sft_lr": 1e-2, "rl_steps": 2, "num_prompts": 4, "group_size": 4, "max_new_tokens": 64}
    world: DemoConfig = replace(WORLD, run_dir=str(tmp_path / "world"), **sizes, **training)
    monkeypatch.setattr(srpo.train, "WORLD", world)
    srpo.train.main_of_world(Config())
    said = capsys.readouterr().out
    assert "No settings are given, so this trains a tiny policy on the built-in catalogue world" in said
    assert "python -m srpo.train @ configs/verdict_only.toml --data.train FILE --policy.path DIR" in said
    assert [line["step"] for line in small.metrics_of(tmp_path / "world")] == [1, 2]
    written = {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "world").rglob("*.safetensors")}
    shutil.rmtree(tmp_path / "world" / "policy")
    srpo.train.main_of_world(Config())  # the same command: nothing is trained again
    again = {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "world").rglob("*.safetensors")}
    assert again == written


def test_one_setting_asks_for_the_data() -> None:
    with pytest.raises(UserError, match=r"data\.train is not set"):
        srpo.train.main(Config(num_steps=3))


def test_a_setting_that_has_its_default_value_is_a_setting(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "srpo.train", "--seed", "0", "--data.columns"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2 and ended.stderr.startswith("error: data.train is not set")
    assert list(tmp_path.iterdir()) == []
