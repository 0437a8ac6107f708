"""The settings of the programs: files in configs/ parse, the set of flags is frozen, the resolved settings read back."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from programs import programs

from srpo.core.config.train import Config
from srpo.core.settings import apply_toml, dump_toml, flags, load
from srpo.core.steps import StepSpec

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


def settings_of(module: str) -> type:
    return getattr(importlib.import_module(module), programs()[module])


@pytest.mark.golden
def test_the_set_of_flags_is_frozen(golden) -> None:
    lines = []
    for module in programs():
        lines += ["", f"python -m {module}"]
        lines += [f"  {name}: {kind} = {default!r}" for name, kind, default in flags(settings_of(module))]
    golden("flags.txt", "\n".join(lines).lstrip() + "\n")


@pytest.mark.parametrize("module", sorted(programs()))
def test_help_of_every_program_says_what_each_flag_is(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    cls = settings_of(module)
    with pytest.raises(SystemExit) as caught:
        load(cls, ["-h"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert [name for name, _, _ in flags(cls) if name not in printed] == []
    assert f"python -m {module}" in printed


def test_configs_are_there() -> None:
    assert {"srpo_8gpu_qwen3_30b_a3b.toml", "tiny_cpu.toml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_with_the_program_it_names(path: Path) -> None:
    """The first comment of a file in configs/ is the command that uses it, or the Makefile has that command."""
    text = path.read_text(encoding="utf-8").partition("\n\n")[0] + (ROOT / "Makefile").read_text(encoding="utf-8")
    name = path.relative_to(ROOT / "configs").as_posix()
    command = re.search(rf"-m (srpo\.\w+)(?: @ [\w./]+)* @ configs/{re.escape(name)}(?!\S)", text)
    assert command, f"{name} does not begin with its command: # python -m srpo.train @ configs/{name}"
    cls = settings_of(command[1])
    assert load(cls, ["@", str(path)]) != cls()


def test_the_paper_s_settings_are_the_defaults() -> None:
    """5.1.5 and 5.1.7."""
    cfg = Config()
    assert (cfg.rollout.num_prompts, cfg.rollout.group_size, cfg.rollout.temperature, cfg.rollout.top_k) == (64, 16, 0.99, 100)
    assert (cfg.advantage.normalize, cfg.advantage.clip, cfg.advantage.gamma) == ("batch", 2.0, 1.0)
    assert (cfg.loss.clip_eps_low, cfg.loss.clip_eps_high, cfg.optimizer.lr) == (0.2, 0.2, 1e-6)
    assert (cfg.sampler.difficulty_low, cfg.sampler.difficulty_high) == (0.01, 0.90)


@pytest.mark.parametrize("module", sorted(programs()))
def test_resolved_settings_of_every_program_read_back_equal(module: str, tmp_path: Path) -> None:
    settings = settings_of(module)()
    path = tmp_path / "config.toml"
    path.write_text(dump_toml(settings), encoding="utf-8")
    assert apply_toml(settings_of(module)(), path) == settings


def test_another_number_of_steps_comes_from_toml_alone(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(
        """
        [[steps]]
        name = "evidence"
        header = "^evidence:"
        reward = 0.5

        [[steps]]
        name = "verdict"
        header = "^verdict:"
        answer = '\\b(yes|no)\\b'
        options = ["yes", "no"]
        sources = ["gold"]
        reward = 1
        """,
        encoding="utf-8",
    )
    first, last = load(Config, ["@", str(path)]).steps
    assert first == StepSpec("evidence", "^evidence:", reward=0.5)
    assert (last.options, last.sources, last.reward) == (("yes", "no"), ("gold",), 1.0)
