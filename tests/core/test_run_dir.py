from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from srpo.core.config.sft import SftConfig
from srpo.core.config.train import Config, LossConfig
from srpo.core.run_dir import claim_run_dir
from srpo.core.settings import apply_toml


def test_claim_leaves_the_resolved_settings(tmp_path: Path) -> None:
    cfg = Config(run_dir=str(tmp_path / "a" / "b"), seed=7)
    claim_run_dir(tmp_path / "a" / "b", cfg, is_main=True)
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.toml"]
    assert apply_toml(Config(), tmp_path / "a" / "b" / "config.toml") == cfg


def test_the_same_settings_claim_it_again_also_after_a_move(tmp_path: Path) -> None:
    cfg = Config(run_dir=str(tmp_path / "old"))
    claim_run_dir(tmp_path / "old", cfg, is_main=True)
    claim_run_dir(tmp_path / "old", cfg, is_main=False)
    shutil.move(tmp_path / "old", tmp_path / "new")
    claim_run_dir(tmp_path / "new", replace(cfg, run_dir=str(tmp_path / "new")), is_main=True)


@pytest.mark.parametrize("is_main", [True, False])
def test_other_settings_are_refused_by_name_and_change_nothing(tmp_path: Path, is_main: bool) -> None:
    claim_run_dir(tmp_path, Config(), is_main=True)
    before = (tmp_path / "config.toml").read_bytes()
    with pytest.raises(ValueError, match=r"loss\.kl_coef = 0\.001, this one has 0\.5: give another run_dir, or remove"):
        claim_run_dir(tmp_path, Config(loss=LossConfig(kl_coef=0.5)), is_main)
    with pytest.raises(ValueError, match=r"steps = .*give another run_dir"):
        claim_run_dir(tmp_path, Config(steps=Config().steps[:4]), is_main)
    assert (tmp_path / "config.toml").read_bytes() == before


def test_a_setting_that_is_younger_than_the_folder_had_its_default(tmp_path: Path) -> None:
    claim_run_dir(tmp_path, Config(), is_main=True)
    path = tmp_path / "config.toml"
    old = [line for line in path.read_text().splitlines() if not line.startswith(("kl_coef", "tensor_parallel_size"))]
    path.write_text("\n".join(old))
    claim_run_dir(tmp_path, Config(), is_main=True)
    with pytest.raises(ValueError, match=r"loss\.kl_coef = 0\.001, this one has 0\.5"):
        claim_run_dir(tmp_path, Config(loss=LossConfig(kl_coef=0.5)), is_main=True)
    path.write_text("\n".join([*old, "", "[unheard]", "of = 1"]))
    with pytest.raises(ValueError, match=r"unheard\.of = 1, this one has None"):
        claim_run_dir(tmp_path, Config(), is_main=True)


@dataclass(frozen=True)
class Claim:
    """Settings without defaults, like `RecordSettings`."""

    seed: int
    data: str


def test_settings_without_defaults_claim_a_folder_again(tmp_path: Path) -> None:
    claim_run_dir(tmp_path, Claim(3, "x"), is_main=True)
    claim_run_dir(tmp_path, Claim(3, "x"), is_main=True)
    with pytest.raises(ValueError, match="data = 'x', this one has 'y'"):
        claim_run_dir(tmp_path, Claim(3, "y"), is_main=True)


def test_a_folder_of_another_program_is_refused(tmp_path: Path) -> None:
    claim_run_dir(tmp_path, SftConfig(), is_main=True)
    with pytest.raises(ValueError, match="give another run_dir"):
        claim_run_dir(tmp_path, Config(), is_main=True)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    claim_run_dir(tmp_path / "run", Config(), is_main=False)
    assert not (tmp_path / "run").exists()
