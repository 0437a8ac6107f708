"""Settings that map names to values, on the command line and in TOML."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from srpo.core.config.train import Config
from srpo.core.errors import UserError
from srpo.core.mappings import Texts, Values
from srpo.core.settings import dump_toml, load


@dataclass(frozen=True)
class Settings:
    names: Texts = field(default_factory=dict)
    values: Values = field(default_factory=dict)


def test_names_and_values_on_the_command_line() -> None:
    got = load(
        Settings, ["--names", "0=no", "1=yes", "a=b=c", "empty=", "--values", "n=3", "x=0.5", "on=true", "t=text", "u=null"]
    )
    assert got.names == {"0": "no", "1": "yes", "a": "b=c", "empty": ""}
    assert got.values == {"n": 3, "x": 0.5, "on": True, "t": "text", "u": "null"}
    assert [type(v) for v in got.values.values()] == [int, float, bool, str, str]
    assert load(Settings, ["--names"]).names == {} == load(Settings, []).names


def test_grades_on_the_command_line() -> None:
    cfg = load(Config, ["--grades.names", "no", "yes", "--grades.labels", "0=no", "1=yes"])
    assert cfg.grades.labels == {"0": "no", "1": "yes"}
    assert (cfg.grades.read(0), cfg.grades.read(1), cfg.schema.options[-1]) == ("no", "yes", ("no", "yes"))


@pytest.mark.parametrize("arguments", [["0no"], ["=no"], ["0=L1", "0=L2"], ["0=L1", "x"]])
def test_a_missing_equals_sign_and_a_name_twice_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--grades\.labels: '.*': write NAME=VALUE, each name once$"):
        load(Config, ["--grades.labels", *arguments])


def test_a_dotted_key_without_quotes_is_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[data.columns]\nquery = "q"\nfields.brand = "Brand"\nfields.size.eu = "Size"\n[grades.labels]\n1.0 = "L4"\n')
    cfg = load(Config, ["@", str(path)])
    assert cfg.data.columns == {"query": "q", "fields.brand": "Brand", "fields.size.eu": "Size"}
    assert cfg.grades.labels == {"1.0": "L4"}
    for text, message in (
        ('fields.brand = "a"\n"fields.brand" = "b"', "data.columns.fields.brand is given twice: keep one of them"),
        ("fields.brand = 3", "data.columns.fields.brand must be a string, not the integer 3"),
        ("fields = []", "data.columns.fields must be a string, not a list"),
    ):
        path.write_text(f"[data.columns]\n{text}\n")
        with pytest.raises(UserError, match=f"x.toml: {message}$"):
            load(Config, ["@", str(path)])


def test_a_table_in_toml_goes_both_ways_and_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[values]\nn = 3\nx = 0.5\non = true\n"a key = odd" = "text"\n[names]\n"0" = "no"\n')
    got = load(Settings, ["@", str(path)])
    assert got == Settings({"0": "no"}, {"n": 3, "x": 0.5, "on": True, "a key = odd": "text"})
    path.write_text(dump_toml(got))
    assert load(Settings, ["@", str(path)]) == got
    for text, message in (
        ('names = ["a=b"]', "names must be a table, not a list"),
        ("[names]\na = 1", "names.a must be a string, not the integer 1"),
        ("[values]\na = []", "values.a must be true or false or an integer or a number or a string, not a list"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load(Settings, ["@", str(path)])
