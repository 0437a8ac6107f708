"""The settings of the programs: the files in configs/ parse, the set of flags is frozen, resolved settings read back equal."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import tyro
from programs import programs

from srpo.core.config.train import Config
from srpo.core.settings import apply_toml, dump_toml, flags, load
from srpo.core.steps import StepSpec

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


@dataclass(frozen=True)
class Lost:
    """Settings with two flags without a help text: one has no comment, and the other's is inside the value's parentheses."""

    path: tyro.conf.Positional[str] = ""  # where to read
    switch: bool = False  # turns it on (or off)
    number: tuple[int, ...] = (1, 2)
    prompt: str = (
        "Query: {query}\n"  # the text that the model reads
        "Item: {item}"
    )
    # a text that goes on over more than one line, because the width of the terminal does not suffice for it
    long: Literal["yes", "no", "perhaps", "sometimes", "on weekdays"] = "no"


def settings_of(module: str) -> type:
    return getattr(importlib.import_module(module), programs()[module])


@pytest.mark.golden
def test_the_set_of_flags_is_frozen(golden) -> None:
    lines = []
    for module in programs():
        lines += ["", f"python -m {module}"]
        lines += [f"  {name}: {kind} = {default!r}" for name, kind, default in flags(settings_of(module))]
    golden("flags.txt", "\n".join(lines).lstrip() + "\n")


def printed_help(cls: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The output of `-h`, in one column."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        load(cls, ["-h"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def help_texts(printed: str) -> dict[str, str]:
    """{flag: its help text without "(default: ...)"} from the output of `-h`, whose boxes are drawn with lines or with blanks."""
    texts: dict[str, str] = {}
    name = ""
    for line in printed.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").splitlines():
        if start := re.match(r"  (?:(--\w[\w.-]*)|\[([A-Z-]+)\])", line):
            name = start[1] or start[2]
            line = "".join(re.split(r"\s{2,}", line.strip(), maxsplit=1)[1:])  # two spaces end the names and types of a flag
        elif not line.startswith("   "):  # the edge, title or description of a box, or -h
            name = ""
        if name:
            texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return {
        name: re.split(r"\((?:default|required|fixed|optional|repeatable)\b", text)[0].strip() for name, text in texts.items()
    }


@pytest.mark.parametrize("module", sorted(programs()))
def test_help_of_every_program_lists_every_flag_with_a_text(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The comment after or above a setting is its help text. ruff-format moves the comment of a long line inside the parentheses
    of the value, where tyro does not see it: such a flag fails here, too. A field without a comment takes over the comment above
    the field before it, so no two flags of a section may have the same text."""
    cls = settings_of(module)
    printed = printed_help(cls, monkeypatch, capsys)
    assert f"python -m {module}" in printed
    texts = help_texts(printed)
    assert texts.keys() == {name for name, _, _ in flags(cls)}
    short = [name for name, text in texts.items() if len(text.split()) < 2]
    assert not short, f"give each of these a help text of two words or more: {', '.join(short)}"
    owners: dict[tuple[str, str], str] = {}  # (section, text) -> flag
    for name, text in texts.items():
        owner = owners.setdefault((name.rpartition(".")[0], text), name)
        assert owner == name, f"{name} shows the help text of {owner}: its own comment is missing, or inside parentheses"


def test_a_missing_or_lost_help_text_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert help_texts(printed_help(Lost, monkeypatch, capsys)) == {
        "PATH": "where to read",
        "--switch": "turns it on (or off)",
        "--number": "",
        "--prompt": "",
        "--long": "a text that goes on over more than one line, because the width of the terminal does not suffice for it",
    }


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
    """The values of 5.1.5 and 5.1.7."""
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
        [steps]
        preset = "own"

        [steps.evidence]
        header = "^evidence:"
        reward = 0.5

        [steps.verdict]
        header = "^verdict:"
        answer = '\\b(yes|no)\\b'
        options = ["no", "yes"]
        sources = ["gold"]
        reward = 1

        [grades]
        names = ["no", "yes"]
        """,
        encoding="utf-8",
    )
    first, last = load(Config, ["@", str(path)]).schema.specs
    assert first == StepSpec("evidence", "^evidence:", reward=0.5)
    assert (last.options, last.sources, last.reward) == (("no", "yes"), ("gold",), 1.0)
