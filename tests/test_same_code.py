"""tools/same_code.py: comments and docstrings do not count, everything else does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import same_code

PYTHON = '"""Module."""\n\nA = 1  # one\n\n\ndef f(x):\n    """Function."""\n    return "# text"\n'
CUDA = '// header\n#define TWO 2  // two\n\nint f(int x) {\n  /* doubles\n     x */\n  return TWO * x;  // "x"\n}\n'
TOML = "# of a run\nlr = 0.1 # large\n"


def checkout(folder: Path, python: str = PYTHON, cuda: str = CUDA, toml: str = TOML) -> Path:
    for name, text in (("srpo/a.py", python), ("csrc/a.cu", cuda), ("configs/a.toml", toml)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, base: Path, new: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["same_code.py", str(base), str(new)])
    return same_code.main()


def test_comments_docstrings_and_blank_lines_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = '# another module\nA = 1\ndef f(x):\n    """Other words."""\n    # and a reason\n    return "# text"\n'
    cuda = "#define TWO 2\nint f(int x) {\n  // twice\n\n  return TWO  * x;\n}\n"
    assert run(monkeypatch, checkout(tmp_path / "base"), checkout(tmp_path / "new", python, cuda, "lr = 0.1")) == 0
    assert capsys.readouterr().out == "same code in 3 files\n"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"python": PYTHON.replace("A = 1", "A = 2")}, "differs: srpo/a.py"),
        ({"python": PYTHON.replace('"# text"', '"# words"')}, "differs: srpo/a.py"),
        ({"cuda": CUDA.replace("* x", "+ x")}, "differs: csrc/a.cu"),
        ({"cuda": CUDA.replace("return", "// return")}, "differs: csrc/a.cu"),
        ({"cuda": CUDA.replace("TWO 2", "TWO 1'000")}, "differs: csrc/a.cu"),
        ({"toml": "lr = 0.2"}, "differs: configs/a.toml"),
    ],
)
def test_a_change_of_code_is_listed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    line: str,
) -> None:
    assert run(monkeypatch, checkout(tmp_path / "base"), checkout(tmp_path / "new", **changes)) == 1
    assert capsys.readouterr().out.splitlines() == [line, "1 of 3 files differ"]


def test_text_that_looks_like_a_comment_stays() -> None:
    assert same_code.c_code('s = "http://a";  // b\nc = \'"\'; // d\n') == ['s = "http://a";', "c = '\"';"]
    assert same_code.c_code("n = 1'000 + 2'000; // e") == ["n = 1'000 + 2'000;"]


def test_a_file_on_one_side_only_is_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, new = checkout(tmp_path / "base"), checkout(tmp_path / "new")
    (new / "srpo" / "a.py").rename(new / "srpo" / "b.py")
    assert run(monkeypatch, base, new) == 1
    assert capsys.readouterr().out.splitlines() == ["only in BASE: srpo/a.py", "only in NEW: srpo/b.py", "2 of 4 files differ"]


@pytest.mark.parametrize(
    ("python", "message"), [("def f(:\n", "a.py cannot be parsed"), (None, "is not a checkout of this project")]
)
def test_a_side_that_cannot_be_read_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    python: str | None,
    message: str,
) -> None:
    new = tmp_path / "new"
    checkout(new, python) if python else new.mkdir()
    assert run(monkeypatch, checkout(tmp_path / "base"), new) == 2
    assert message in capsys.readouterr().err
