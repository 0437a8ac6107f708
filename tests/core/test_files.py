from __future__ import annotations

from pathlib import Path

import pytest

from srpo.core.files import whole_file, write_whole


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_whole(path, "old")

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_whole(path, "new")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_exception_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="no data"), whole_file(path) as part:
        part.write_bytes(b"ne")
        raise ValueError("no data")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "policy"
    with whole_file(path) as part:
        temporary = part
        part.symlink_to("first")
    temporary.symlink_to("half")
    with whole_file(path) as part:
        part.symlink_to("second")
    assert path.readlink() == Path("second") and list(tmp_path.iterdir()) == [path]
