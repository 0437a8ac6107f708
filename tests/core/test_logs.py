from __future__ import annotations

from pathlib import Path

import pytest

from srpo.core.errors import UserError
from srpo.core.logs import LogDigests, check_logs, check_start

NAMES = ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl")


def lines(*steps: int) -> str:
    return "".join(f'{{"step": {step}, "a": {step * 7}}}\n' for step in steps)


def test_digests_grow_with_the_logs(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2))
    digests = LogDigests(tmp_path, NAMES)
    first = digests.sync()
    assert first.keys() == {"metrics.jsonl"} and first["metrics.jsonl"]["num_bytes"] == len(lines(1, 2))
    with path.open("a") as file:
        file.write(lines(3))
    second = digests.sync()
    assert second == LogDigests(tmp_path, NAMES).sync() != first
    check_logs(tmp_path, 2, first)  # later lines do not count
    check_logs(tmp_path, 3, second)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(1, 3, 4), "lacks the lines of optimizer steps 2"),
        (lines(4), "lacks the lines of optimizer steps 1 to 3"),
        ("", "lacks the lines of optimizer steps 1 to 4"),
        (lines(1, 2, 3, 4).replace('"step": 2,', '"step"; 2,'), "lacks the lines of optimizer steps 2"),
        (lines(1) + "[" * 9000 + "\n" + lines(3, 4), "lacks the lines of optimizer steps 2"),
        (lines(1, 2, 3, 4).replace("21", "22"), "bytes up to optimizer step 4 are not those that were written"),
        (lines(1, 2, 3, 4)[:-3], "lacks the lines of optimizer steps 4"),
    ],
)
def test_a_damaged_log_is_refused_until_it_is_given_up(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2, 3, 4))
    written = LogDigests(tmp_path, NAMES).sync()
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        check_logs(tmp_path, 4, written)
    path.rename(tmp_path / "metrics.jsonl.damaged")  # as the message says
    check_logs(tmp_path, 4, written)


def test_a_missing_log_is_refused_until_it_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1))
    written = LogDigests(tmp_path, NAMES).sync()
    path.unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl is missing: restore it; to go on without it, make an empty file"):
        check_logs(tmp_path, 1, written)
    (tmp_path / "metrics.jsonl.damaged").touch()
    check_logs(tmp_path, 1, written)


def test_logs_are_never_emptied_without_a_word(tmp_path: Path) -> None:
    assert check_start(tmp_path, NAMES, 0, 5) == ""
    (tmp_path / "metrics.jsonl").write_text(lines(1, 2, 3) + '{"step": 4')
    assert "the lines of steps 1 to 3 are dropped" in check_start(tmp_path, NAMES, 0, 5)
    assert "goes on from optimizer step 2; the lines of step 3 are dropped" in check_start(tmp_path, NAMES, 2, 2)
    assert check_start(tmp_path, NAMES, 3, 3) == ""
    with pytest.raises(UserError, match=r"logs up to optimizer step 3, but no complete checkpoint: restore .*checkpoints"):
        check_start(tmp_path, NAMES, 0, 2)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "rollouts.jsonl").write_text(lines(1, 1, 2, 2, 3))
    with pytest.raises(UserError, match="optimizer step 3, but no complete checkpoint"):
        check_start(tmp_path, NAMES, 0, 2)
    (tmp_path / "policy").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):  # a finished run
        check_start(tmp_path, NAMES, 0, 50)
