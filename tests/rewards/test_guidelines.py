"""The guidelines that a judge was trained with, and those that a run asks it with."""

from __future__ import annotations

from pathlib import Path

import pytest

from srpo.core.config.train import RewardConfig
from srpo.core.errors import UserError
from srpo.data import chat
from srpo.rewards.guidelines import GUIDELINES, guidelines_of, judge_files

TRAINED = 'A knife is no "fork".\n漢字'


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_SAID", set())


def asked(folder: Path, trained: str | None, given: str) -> str:
    """The guidelines of a run whose judge was trained with some (None: its folder does not tell), and is given others."""
    for name, text in ({} if trained is None else judge_files(trained)).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "given.txt").write_text(given, encoding="utf-8")
    return guidelines_of(RewardConfig(judge_path=str(folder), judge_guidelines=str(folder / "given.txt") if given else ""))


@pytest.mark.parametrize(
    ("trained", "given", "wanted"),
    [(TRAINED, "", TRAINED), (TRAINED, TRAINED + "\n", TRAINED), ("", "", ""), (None, "", ""), (None, "Other.", "Other.")],
)
def test_a_judge_is_asked_as_in_its_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: str | None, given: str, wanted: str
) -> None:
    assert asked(tmp_path, trained, given) == wanted
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("trained", [TRAINED, ""])
def test_other_guidelines_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: str) -> None:
    assert asked(tmp_path, trained, "Other.") == asked(tmp_path, trained, "Other.") == "Other."
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"the judge in {tmp_path} is asked with the guidelines of {tmp_path / 'given.txt'}")
    assert ("not with none, as it was trained" in line) == (not trained) and line.endswith("to ask it as in its training")


@pytest.mark.parametrize("text", ["{", '{"guidelines": 1}', "{}"])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / GUIDELINES).write_text(text)
    with pytest.raises(UserError, match=GUIDELINES):
        guidelines_of(RewardConfig(judge_path=str(tmp_path)))
