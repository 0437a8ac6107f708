"""Tables on the smallest world: each stage is made once and then read from files, and bad input is refused."""

from __future__ import annotations

import fcntl
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small

from srpo.core.config.reproduce import ReproduceConfig, Scale
from srpo.experiments import lab as stages
from srpo.experiments.lab import Lab
from srpo.experiments.tables import TABLES
from srpo.reproduce import lab_of, main, reproduce

SCALE = Scale(
    num_steps=2,
    num_prompts=4,
    group_size=4,
    eval_every=1,
    eval_examples=8,
    num_eval=8,
    dpo_prompts=24,
    dpo_steps=2,
)


@pytest.fixture
def start(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every `Lab` use the data and the SFT policy of the small world."""
    files = {"train.jsonl": world.train, "eval.jsonl": world.eval, "eval_balanced.jsonl": world.eval}
    monkeypatch.setattr(Lab, "data", lambda self, name="train.jsonl": files[name])
    monkeypatch.setattr(Lab, "sft", lambda self: world.policy)


def settings(folder: Path, table: str, **changes: Any) -> ReproduceConfig:
    return ReproduceConfig(**{"table": table, "run_dir": str(folder), "seeds": (0,), "scale": SCALE, **changes})


@pytest.mark.usefixtures("start")
def test_a_table_is_made_once_and_shares_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (table4,) = reproduce(settings(tmp_path, "table4"), small.ONE)
    assert json.loads((tmp_path / "table4.json").read_text())["rows"] == table4["rows"]
    assert [row["recipe"] for row in table4["rows"]] == ["dpo", "grpo", "grpo_diverse"]
    assert {"command", "commit", "minutes", "versions"} <= table4.keys()
    assert (tmp_path / "table4.png").stat().st_size > 10_000
    assert "GRPO w diverse sampling" in capsys.readouterr().out

    trained: list[str] = []
    monkeypatch.setattr(stages, "train", lambda cfg, parallel: trained.append(cfg.run_dir))
    monkeypatch.setattr(stages, "dpo", lambda cfg, parallel: trained.append(cfg.run_dir))
    monkeypatch.setattr(stages, "evaluate_policy", None)
    (again,) = reproduce(settings(tmp_path, "table4"), small.ONE)
    assert again["rows"] == table4["rows"] and not trained

    with pytest.raises(TypeError):  # table 6 shares `dpo` and `grpo`; the stand-in trains the first other row
        reproduce(settings(tmp_path, "table6"), small.ONE)
    assert [Path(run_dir).name for run_dir in trained] == ["grpo_queries"]


@pytest.mark.usefixtures("start")
def test_the_headline_compares_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = reproduce(settings(tmp_path, "headline"), small.ONE)
    assert [num for num, _ in result["curves"]["srpo"][0]] == [16, 32]
    assert (tmp_path / "headline.png").is_file()
    assert set(result["rivals"]) == {"srpo", "srpo_discounted"}
    assert "seed 0: final macro F1 of grpo" in capsys.readouterr().out


@pytest.mark.usefixtures("start")
def test_train_only_writes_no_table(tmp_path: Path) -> None:
    assert reproduce(settings(tmp_path, "table4", train_only=True), small.ONE) == []
    assert not (tmp_path / "table4.json").exists() and (tmp_path / "seed-0" / "grpo" / "balanced.json").is_file()


def test_bad_input_gets_an_error_that_says_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(config: ReproduceConfig) -> str:
        return small.complaint(main, config, tmp_path, capsys)

    assert "table7" in error(settings(tmp_path, "table7")) and all(name in error(settings(tmp_path, "table7")) for name in TABLES)
    assert "table7" in error(settings(tmp_path, "table7", background=True)) and not (tmp_path / "table7.log").exists()
    assert "each once" in error(settings(tmp_path, "table4", seeds=(1, 1)))
    (tmp_path / "seed-0").mkdir()
    with (tmp_path / "seed-0" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process works on seed 0" in error(settings(tmp_path, "table4"))


def test_a_folder_belongs_to_one_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lab_of(settings(tmp_path, "table4"), 0, small.ONE):
        pass
    other = settings(tmp_path, "table4", scale=replace(SCALE, num_steps=3))
    assert "num_steps" in small.complaint(main, other, tmp_path, capsys)
