from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from srpo.core.config.chat import ChatConfig
from srpo.core.config.dpo import DpoConfig
from srpo.core.config.sft import SftConfig
from srpo.core.config.train import Config, DataConfig, LossConfig, OptimizerConfig, PolicyConfig
from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.core.run_dir import check_unchanged, claim_run_dir, record_changes, run_settings
from srpo.core.settings import apply_toml, dump_toml
from srpo.core.step_presets import StepsConfig


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
    with pytest.raises(ValueError, match=r"steps\.preset = 'paper', this one has 'verdict': give another run_dir"):
        claim_run_dir(tmp_path, Config(steps=StepsConfig("verdict")), is_main)
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


@pytest.mark.parametrize("text", ["seed = [", "seed = " + "[" * 5000, "\xff"])
def test_damaged_settings_of_a_run_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.toml").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.toml is damaged \(.*\): restore it, or give another run_dir"):
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


def test_results_without_their_settings_are_nobodys(tmp_path: Path) -> None:
    claim_run_dir(tmp_path, Config(), is_main=True)
    (tmp_path / "checkpoints").mkdir()
    claim_run_dir(tmp_path, Config(), is_main=True)
    (tmp_path / "config.toml").unlink()
    with pytest.raises(ValueError, match=r"has checkpoints, but no config\.toml"):
        claim_run_dir(tmp_path, Config(), is_main=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl", "timing.jsonl", "policy", "config.json", "COMPLETE"])
def test_a_folder_whose_files_a_run_would_replace_is_not_taken(name: str, tmp_path: Path) -> None:
    """A checkpoint, the results of another program, or an input of this one."""
    (tmp_path / name).write_text("kept")
    with pytest.raises(UserError, match=rf"has {name}, but no config\.toml .*give another run_dir"):
        claim_run_dir(tmp_path, Config(), is_main=True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "kept")]


def test_only_inputs_that_are_there_are_compared(tmp_path: Path) -> None:
    claim_run_dir(tmp_path, Config(), is_main=True, inputs={"the judge": ("a", "1"), "the reference": ("b", "2")})
    check_unchanged(tmp_path, {"the judge": ("elsewhere", "1"), "the critic": ("c", "3")})
    check_unchanged(tmp_path / "nowhere", {"the judge": ("a", "1")})
    with pytest.raises(UserError, match="the judge at a is not the one"):
        check_unchanged(tmp_path, {"the judge": ("a", "9")})


def test_inputs_are_known_by_their_contents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, inputs = Config(), {"the reference": ("a", "1"), "the judge": ("b", "2")}
    moved = replace(cfg, policy=replace(cfg.policy, path="elsewhere"))
    claim_run_dir(tmp_path, cfg, True, inputs=inputs)
    claim_run_dir(tmp_path, moved, True, inputs=inputs, paths=("policy.path",))
    for other, message in (
        ({**inputs, "the judge": ("b", "3")}, "the judge at b is not the one that .* was started with"),
        ({**inputs, "the critic": ("c", "4")}, "was started without the critic, which is now c"),
        ({"the judge": ("b", "2")}, "was started with the reference, which is not set now"),
    ):
        with pytest.raises(ValueError, match=message):
            claim_run_dir(tmp_path, cfg, False, inputs=other)
    for text in ("", "[]", '{"the judge": 1}', "\x00"):
        (tmp_path / "inputs.json").write_text(text)
        with pytest.raises(ValueError, match=r"inputs\.json is damaged|was started without"):
            claim_run_dir(tmp_path, cfg, True, inputs=inputs)
    (tmp_path / "inputs.json").unlink()
    with pytest.raises(ValueError, match=r"holds a run with policy.path"):  # nothing says that the contents are the same
        claim_run_dir(tmp_path, moved, True, inputs=inputs, paths=("policy.path",))
    claim_run_dir(tmp_path, cfg, True, inputs=inputs)
    assert "recorded from now on" in capsys.readouterr().out
    claim_run_dir(tmp_path, moved, True, inputs=inputs, paths=("policy.path",))


def test_changes_are_recorded_with_their_step(tmp_path: Path) -> None:
    def at(lr: float, step: int) -> list[str]:
        return record_changes(tmp_path, Config(optimizer=OptimizerConfig(lr=lr)), ("optimizer.lr",), step)

    claim_run_dir(tmp_path, Config(optimizer=OptimizerConfig(lr=1.0)), is_main=True)
    assert at(1.0, 0) == at(1.0, 5) == [] and not (tmp_path / "changes.jsonl").exists()
    assert "optimizer.lr: 1.0 until optimizer step 5, 0.5 from then on" in at(0.5, 5)[0]
    assert at(0.5, 7) == []
    assert len(at(0.25, 9)) == 1
    assert len((tmp_path / "changes.jsonl").read_text().splitlines()) == 2
    assert at(0.5, 6) == []  # back at an older checkpoint: the change after step 9 never was
    assert len((tmp_path / "changes.jsonl").read_text().splitlines()) == 1
    (tmp_path / "changes.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"changes\.jsonl is damaged"):
        at(0.5, 6)


def test_a_folder_of_another_program_is_refused(tmp_path: Path) -> None:
    claim_run_dir(tmp_path, SftConfig(), is_main=True)
    with pytest.raises(ValueError, match="give another run_dir"):
        claim_run_dir(tmp_path, Config(), is_main=True)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    claim_run_dir(tmp_path / "run", Config(), is_main=False)
    assert not (tmp_path / "run").exists()


def run_of(folder: Path, settings: Any) -> Path:
    """A file in the folder of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(dump_toml(settings))
    return folder / "policy"


@pytest.mark.parametrize("settings", [SftConfig, DpoConfig])
def test_a_warm_start_is_evaluated_with_its_steps_and_grades(
    settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grades, policy = Grades(("no", "maybe", "yes")), PolicyConfig(path="base", bos="none", chat=ChatConfig(system="You judge."))
    steps, around = StepsConfig(preset="verdict"), "Pair: {prompt}\n"
    made = run_of(tmp_path / "sft", settings(steps=steps, grades=grades, policy=policy, prompt=around))
    assert run_settings(made, "") == Config(steps=steps, grades=grades, policy=policy)
    line = capsys.readouterr().out
    assert f"steps, grades and policy are those of {tmp_path / 'sft' / 'config.toml'}" in line and line.count("\n") == 1
    assert "--config FILE with [data] prompt and guidelines (with its prompt, 'Pair: {prompt}\\n', around them)" in line
    assert "[rollout] max_new_tokens" in line and "[steps], [grades] and [policy]" in line


def test_the_run_around_a_warm_start_knows_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Config(data=DataConfig(prompt="{query} {title}"))
    run_of(tmp_path, run)
    assert run_settings(run_of(tmp_path / "sft", SftConfig()), "") == run
    assert capsys.readouterr().out == f"steps, prompt and lengths are those of {tmp_path / 'config.toml'}\n"


def test_without_a_run_a_line_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_settings(tmp_path / "a" / "b" / "c" / "d" / "policy", "") == Config()
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--config FILE", "[steps]", "[grades]", "[data] prompt", "[rollout] max_new_tokens"))
