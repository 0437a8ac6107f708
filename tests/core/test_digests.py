from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from srpo.core.digests import COMPLETE, digest_of, digest_of_data, digest_of_model, read_mark, write_mark
from srpo.core.errors import UserError, explain_os_error, naming
from srpo.core.files import check_whole, read_result, whole_folder, write_result


def model(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text(f"the contents of {name}")
    return folder


def test_a_model_is_its_contents_wherever_it_lies(tmp_path: Path) -> None:
    first = model(tmp_path / "a")
    digest = digest_of_model(first)
    shutil.copytree(first, tmp_path / "b")
    assert digest_of_model(tmp_path / "b") == digest
    (tmp_path / "c").mkdir()
    for path in first.iterdir():  # as in the cache of Hugging Face
        (tmp_path / "c" / path.name).symlink_to(path)
    (tmp_path / "d").symlink_to(tmp_path / "c", target_is_directory=True)
    (tmp_path / "c" / "README.md").write_text("notes")
    assert digest_of_model(tmp_path / "c") == digest_of_model(tmp_path / "d") == digest
    for path in first.iterdir():
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert digest_of_model(first) != digest, path
        path.write_bytes(kept)
    (first / "model.safetensors").rename(first / "model-00001.safetensors")
    assert digest_of_model(first) != digest
    with pytest.raises(UserError, match="no model in"):
        digest_of_model(tmp_path / "absent")


def test_data_are_their_contents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x")
    assert digest_of_data(tmp_path / "a.jsonl") != digest_of_data(tmp_path)
    before = digest_of_data(tmp_path)
    (tmp_path / "b.jsonl").write_text("y")
    assert digest_of_data(tmp_path) != before
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])


def test_a_folder_appears_whole_and_says_when_it_no_longer_is(tmp_path: Path) -> None:
    path = tmp_path / "policy"
    for text in ("old", "new"):
        with whole_folder(path) as folder:
            (folder / "sub").mkdir()
            (folder / "config.json").write_text(text)
            (folder / "sub" / "weights").write_text(text)
            assert not path.exists() or (path / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"] and (path / "sub" / "weights").read_text() == "new"
    check_whole(path)
    digest_of_model(path)
    with pytest.raises(KeyboardInterrupt), whole_folder(path) as folder:
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    (path / "sub" / "weights").write_text("few")
    for check in (check_whole, digest_of_model):
        with pytest.raises(UserError, match=r"sub/weights is damaged"):
            check(path)
    (path / "sub" / "weights").unlink()
    with pytest.raises(UserError, match=r"sub/weights is missing"):
        check_whole(path)
    (path / COMPLETE).write_text("{}")
    with pytest.raises(UserError, match="COMPLETE is damaged"):
        digest_of_model(path)
    (path / COMPLETE).unlink()  # the change is meant
    digest_of_model(path)


def test_a_result_is_as_it_was_written_or_refused(tmp_path: Path) -> None:
    path, values = tmp_path / "before.json", {"macro_f1": 0.1 + 0.2, "by": {"head": [1, None]}, "text": "\u00fc"}
    write_result(path, values)
    assert read_result(path) == values
    data = path.read_bytes()
    for place in range(0, len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        try:
            assert read_result(path) == values  # spaces between values
        except UserError as error:
            assert "before.json is damaged" in str(error)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="remove it, then it is made again"):
        read_result(path)


@pytest.mark.parametrize("number", [errno.EFBIG, errno.ESTALE, errno.ENFILE, errno.EBUSY, errno.ETXTBSY, errno.EXDEV])
def test_every_error_of_a_named_file_is_one_line(number: int) -> None:
    text = explain_os_error(OSError(number, os.strerror(number), "x"))
    assert text is not None and text.startswith(f"x: {os.strerror(number).lower()}: ") and "\n" not in text
    assert explain_os_error(ConnectionRefusedError(errno.ECONNREFUSED, "refused")) is None


def test_errors_of_the_file_system_name_their_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for error in (OSError(errno.ENOSPC, "No space left on device"), Exception("I/O error: No space left (os error 28)")):
        with pytest.raises(OSError) as caught, naming(path):
            raise error
        assert (
            explain_os_error(caught.value) == f"{path}: no space left on device: free some space, then run the same command again"
        )
    with pytest.raises(ZeroDivisionError), naming(path):
        raise ZeroDivisionError
    with pytest.raises(OSError) as caught, naming(path):
        raise RuntimeError("unable to mmap 308 bytes from file <a>: Input/output error (5)")
    assert explain_os_error(caught.value) == f"{path}: input/output error: check the disk"
    with pytest.raises(RuntimeError), naming(path):
        raise RuntimeError("no shape (5)")


def test_a_mark_of_another_folder_is_refused(tmp_path: Path) -> None:
    write_mark(tmp_path, {"files": {}, "step": 3})
    assert read_mark(tmp_path, ("step",))["step"] == 3 and read_mark(tmp_path)["files"] == {}
    with pytest.raises(UserError, match="COMPLETE is damaged, of another folder"):
        read_mark(tmp_path, ("step", "logs"))
