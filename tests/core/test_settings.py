"""Settings: files over defaults, flags over files, and one-line errors with the wrong key and the nearest known one."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from srpo.core.config.train import Config
from srpo.core.errors import UserError
from srpo.core.mappings import Texts
from srpo.core.ranges import Fraction
from srpo.core.settings import apply_toml, dump_toml, flags, load, run_program


@dataclass(frozen=True)
class Row:
    name: str
    size: int = 1
    kinds: tuple[str, ...] = ("a",)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size {self.size} is negative")


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5  # how much
    kl_coef: float = 0.1
    mode: Literal["fast", "slow"] = "fast"
    pair: tuple[float, float] = (0.9, 0.95)
    limit: int | None = None
    share: Fraction = 0.5

    def __post_init__(self) -> None:
        if self.share == 0.25:
            raise UserError("share is 0.25: give a half")


@dataclass(frozen=True)
class Settings:
    """Settings for tests."""

    seed: int = 0
    text: str = ""
    switch: bool = False
    names: tuple[str, ...] = ()
    out: Path = Path("runs")
    sizes: tuple[int, ...] = ()
    columns: Texts = field(default_factory=dict)
    quotas: dict[str, float] = field(default_factory=dict)
    rows: tuple[Row, ...] = (Row("first"), Row("second", 2))
    inner: Inner = field(default_factory=Inner)


def write(folder: Path, text: str, name: str = "x.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_without_arguments_it_is_the_defaults() -> None:
    assert load(Settings, []) == Settings()


def test_later_files_win_over_earlier_and_flags_over_files(tmp_path: Path) -> None:
    first = write(tmp_path, "seed = 1\ntext = 'one'\n[inner]\nrate = 0.25\nkl_coef = 0.75", "first.toml")
    second = write(tmp_path, "text = 'two'\n[inner]\nrate = 1", "second.toml")
    got = load(Settings, ["@", first, f"@{second}", "--inner.kl-coef", "0", "--switch"])
    assert got == Settings(seed=1, text="two", switch=True, inner=Inner(rate=1.0, kl_coef=0.0))
    assert type(got.inner.rate) is float


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    text = """
        names = ["a", "b"]
        out = "there"
        [inner]
        mode = "slow"
        pair = [0, 0.5]
        limit = 3
        [[rows]]
        name = "only"
        kinds = []
    """
    want = Settings(
        names=("a", "b"), out=Path("there"), rows=(Row("only", kinds=()),), inner=Inner(mode="slow", pair=(0.0, 0.5), limit=3)
    )
    assert load(Settings, ["@", write(tmp_path, text)]) == want


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sed = 1", ["unknown key 'sed'", "'seed'"]),
        ("[inner]\nklcoef = 1", ["unknown key 'inner.klcoef'", "'inner.kl_coef'"]),
        ("rate = 1", ["unknown key 'rate'", "'inner.rate'"]),
        ("[iner]\nrate = 1", ["unknown key 'iner'", "'inner'"]),
        ("seed = 'x'", ["seed must be an integer", "the string 'x'"]),
        ("seed = true", ["seed must be an integer", "not true"]),
        ("seed = 1.5", ["seed must be an integer", "1.5"]),
        ("switch = 1", ["switch must be true or false", "the integer 1"]),
        ("text = ['x']", ["text must be a string", "not a list"]),
        ("names = 'ab'", ["names must be a list (each a string)", "the string 'ab'"]),
        ("names = ['a', 2]", ["names[1] must be a string", "the integer 2"]),
        ("inner = 3", ["inner must be a table", "the integer 3"]),
        ("[inner]\nmode = 'fats'", ["inner.mode must be one of 'fast', 'slow'", "the nearest is 'fast'"]),
        ("[inner]\npair = [1]", ["inner.pair must be a list of 2 values", "not 1 values"]),
        ("[inner]\npair = [1, 'x']", ["inner.pair[1] must be a number", "the string 'x'"]),
        ("[inner]\nlimit = 'x'", ["inner.limit must be an integer", "the string 'x'"]),
        ("rows = [1]", ["rows[0] must be a table", "the integer 1"]),
        ("[[rows]]\nsize = 1", ["rows[0] lacks name"]),
        ("[[rows]]\nname = 'a'\nsizes = 1", ["unknown key 'rows[0].sizes'", "'rows[0].size'"]),
        ("[[rows]]\nname = 'a'\n[[rows]]\nname = 'b'\nsize = -1", ["rows[1]: size -1 is negative"]),
        ("seed = [", ["Invalid value"]),
        ("seed = " + "[" * 5000, ["nested too deeply"]),
        ("seed = 1\nseed = 2", ["overwrite"]),
    ],
)
def test_a_bad_file_is_one_line_with_file_key_and_remedy(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        load(Settings, ["@", path])
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    near = write(tmp_path, "", "tiny_cpu.toml")
    with pytest.raises(ValueError, match=r"tiny_cp\.toml: no such file; the nearest is .*tiny_cpu\.toml"):
        load(Settings, ["@", near.replace("tiny_cpu", "tiny_cp")])


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"text = '\xff'")
    with pytest.raises(ValueError, match=r"x\.toml: .*utf-8"):
        load(Settings, ["@", str(path)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--inner.kl-coeff", "0"], r"unknown flag '--inner.kl-coeff'; the nearest is --inner.kl-coef "),
        (["--kl-coef=0"], r"unknown flag '--kl-coef=0'; the nearest is --inner.kl-coef "),
        (["--rows.0.name", "x"], r"unknown flag '--rows.0.name'"),
        (["seed=1"], r"unexpected argument 'seed=1': flags begin with --"),
        (["@"], r"write `@ file.toml`"),
        (["--seed", "1", "@", "x.toml"], r"put files first"),
        (["--seed", "many"], r"^--seed must be an integer, not 'many'$"),
        (["--seed="], r"^--seed must be an integer, not ''$"),
        (["--seed"], r"^--seed has no value: give an integer$"),
        (["--seed", "--switch"], r"^--seed has no value: give an integer$"),
        (["--inner.kl_coef", "x"], r"^--inner.kl-coef must be a number, not 'x'$"),
        (["--inner.mode", "fats"], r"^--inner.mode must be one of 'fast', 'slow', not 'fats'; the nearest is 'fast'$"),
        (["--inner.pair", "1"], r"^--inner.pair must be a list of 2 values \(a number, a number\), not '1'$"),
        (["--inner.pair", "1", "x"], r"^--inner.pair must be a list of 2 values \(a number, a number\), not '1 x'$"),
        (["--inner.limit", "x"], r"^--inner.limit must be an integer, not 'x'$"),
        (["--inner.share", "-0.5"], r"^inner.share is -0.5: set it to a number from 0 to 1$"),
        (["--inner.share", "0.25"], r"^share is 0.25: give a half$"),
        (["--sizes", "1", "x"], r"^--sizes must be a list \(each an integer\), not 'x'$"),
        (["--quotas", "a", "x"], r"^--quotas must be pairs of a name and a number: write --quotas NAME VALUE$"),
        (["--columns", "a=1", "a=2"], r"^--columns: 'a=2': write NAME=VALUE, each name once$"),
        (["--switch=false"], r"^--switch=false: a switch takes no value: write --switch for true or --no-switch for false$"),
    ],
)
def test_bad_arguments_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # of a box
    with pytest.raises(UserError, match=message):
        load(Settings, argv)
    assert capsys.readouterr() == ("", "")


def test_a_box_for_another_reason_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        print("\x1b[31m\u256d\u2500 New error \u2500\u256e\n\u2502 no   good \u2502\n\u2570\u2500\u256f", file=sys.stderr)
        sys.exit(2)

    monkeypatch.setattr("tyro.cli", refuse)
    with pytest.raises(UserError, match=r"^New error no good$"):
        load(Settings, [])


def test_a_value_that_begins_with_at_is_no_file() -> None:
    assert load(Settings, ["--text", "@home"]).text == "@home"


def test_help_lists_every_flag_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(Settings, ["-h"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert [name for name, _, _ in flags(Settings) if name not in printed] == []
    assert "inner options" in printed
    assert "how much" in printed  # the comment is the help
    assert "--rows" not in printed


values = st.floats(allow_nan=False)
texts = st.text(st.characters(codec="utf-8"), max_size=12)
rows = st.builds(Row, texts, st.integers(0, 9), st.lists(texts, max_size=2).map(tuple))
inners = st.builds(Inner, values, values, st.sampled_from(["fast", "slow"]), st.tuples(values, values), st.integers(1, 5))
names = st.lists(texts, max_size=3).map(tuple)
any_settings = st.builds(Settings, st.integers(), texts, st.booleans(), names, rows=st.lists(rows).map(tuple), inner=inners)


@given(any_settings)
def test_dumped_settings_read_back_equal(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> None:
    path = tmp_path_factory.mktemp("dump") / "x.toml"
    path.write_bytes(dump_toml(settings).encode())
    assert apply_toml(Settings(), path) == settings


def test_dumped_settings_are_plain_toml_without_what_is_none() -> None:
    table = tomllib.loads(dump_toml(replace(Settings(), text="a\\d'\"\n\x7f")))
    assert table["text"] == "a\\d'\"\n\x7f"
    assert table["inner"] == {"rate": 0.5, "kl_coef": 0.1, "mode": "fast", "pair": [0.9, 0.95], "share": 0.5}
    assert table["rows"][1] == {"name": "second", "size": 2, "kinds": ["a"]}


@dataclass(frozen=True)
class Named:
    texts: dict[str, str] = field(default_factory=dict)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))))
@example({"\x7f": "\x7f", 'a\x7fb"': "\u0085"})
def test_any_key_and_text_of_a_table_is_read_back(table: dict[str, str]) -> None:
    assert tomllib.loads(dump_toml(Named(table)))["texts"] == table


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_run_program_exits_with_what_main_returns(returned: int | None, code: int) -> None:
    seen: list[Settings] = []

    def main(settings: Settings) -> int | None:
        seen.append(settings)
        return returned

    with pytest.raises(SystemExit) as caught:
        run_program(main, Settings, ["--seed", "5"])
    assert caught.value.code == code
    assert seen == [Settings(seed=5)]


FREE = "free some space, then run the same command again"
PROGRAM = """
import errno
from dataclasses import dataclass
from srpo.core.errors import MissingPackage, UserError
from srpo.core.settings import run_program

@dataclass(frozen=True)
class Settings:
    seed: int = 0

def main(settings):
    if settings.seed == 1:
        raise UserError("seed 1 is taken: choose another")
    if settings.seed == 2:
        open("/nonexistent/file")
    if settings.seed == 3:
        raise MissingPackage("seed 3 needs dice: pip install dice")
    if settings.seed == 4:
        import no_such_package
    if settings.seed == 5:
        int("a bug")
    if settings.seed == 6:
        raise OSError(errno.ENOSPC, "No space left on device", "/full/file")
    if settings.seed == 7:
        raise OSError("a bug of a library")
    raise KeyError("a bug")

if __name__ == "__main__":
    run_program(main, Settings)
"""


@pytest.mark.parametrize(
    ("argv", "debug", "code", "line", "traceback"),
    [
        (["--seed", "1"], "", 2, "error: seed 1 is taken: choose another", False),
        (["--seed", "1"], "1", 1, "srpo.core.errors.UserError: seed 1 is taken: choose another", True),
        (["--seed", "2"], "", 2, "error: /nonexistent/file: no such file or directory: give a path that exists", False),
        (["--seed", "3"], "", 2, "error: seed 3 needs dice: pip install dice", False),
        (["--seed", "4"], "", 1, "ModuleNotFoundError: No module named 'no_such_package'", True),
        (["--seed", "5"], "", 1, "ValueError: invalid literal for int() with base 10: 'a bug'", True),
        (
            ["--seed", "6"],
            "",
            2,
            "error: /full/file: no space left on device: free some space, then run the same command again",
            False,
        ),
        (["--seed", "7"], "", 1, "OSError: a bug of a library", True),
        (["--seed", "many"], "", 2, "error: --seed must be an integer, not 'many'", False),
        (["--sead", "2"], "", 2, "error: unknown flag '--sead'; the nearest is --seed (-h lists all)", False),
        ([], "", 1, "KeyError: 'a bug'", True),
    ],
)
def test_user_errors_are_one_line_and_bugs_are_not(
    tmp_path: Path, argv: list[str], debug: str, code: int, line: str, traceback: bool
) -> None:
    path = write(tmp_path, PROGRAM, "program.py")
    env = {**os.environ, "SRPO_DEBUG": debug}
    done = subprocess.run([sys.executable, path, *argv], capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.returncode == code
    assert done.stderr.rstrip().splitlines()[-1] == line
    assert ("Traceback" in done.stderr) == traceback


def test_a_file_name_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(UserError, match=r"'a\\udcff' is not UTF-8: rename the file"):
        load(Config, ["--run-dir", "a\udcff"])
    assert load(Config, ["--run-dir", "日本"]).run_dir == "日本"
