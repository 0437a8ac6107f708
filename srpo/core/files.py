"""Files and folders that are never seen half-written: written under a temporary name and then renamed."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srpo.core.digests import COMPLETE, damage, digest_of_bytes, digests_of, files_of, read_mark, write_mark
from srpo.core.errors import UserError, naming
from srpo.core.jsonl import json_file

_CHECKSUM = "checksum"  # of all other values of a result


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`. It replaces `path` at the end, or is removed after an exception.

    If the process is killed, or the power fails, `path` is complete or as it was before. The folder must exist.
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)  # left by a killed process
    try:
        with naming(path):
            yield part
            if not part.is_symlink():
                fsync(part)
            part.replace(path)
            fsync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def binary_file(path: Path) -> Iterator[Any]:
    """A new file for `torch.save`, which hides an error of writing behind one of its own: this raises the first."""
    raw = _Remembering(path, "wb")
    try:
        with naming(path), io.BufferedWriter(raw) as file:
            yield file
    except RuntimeError:
        if raw.error is None:
            raise
        with naming(path):
            raise raw.error from None


class _Remembering(io.FileIO):
    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file through `whole_file`, in UTF-8."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_texts(folder: Path, files: Mapping[str, str]) -> None:
    """Write text files, {name: text}, into a folder that is not seen yet."""
    for name, text in files.items():
        with naming(folder / name):
            (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`. It replaces `path` at the end, with the digests of its files in its COMPLETE.

    It is removed after an exception. If the process is killed, `path` is as it was before, complete, or does not exist.
    """
    aside, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    for left in (aside, old):  # by a killed process
        remove(left)
    with naming(path):
        aside.mkdir(parents=True)
        try:
            yield aside
            write_mark(aside, {"files": digests_of(aside, files_of(aside))})
            for each in (*aside.rglob("*"), aside):
                fsync(each)
            if os.path.lexists(path):
                path.rename(old)
            aside.rename(path)
            fsync(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # it is there only after an exception
        remove(old)


def write_result(path: Path, values: dict[str, Any]) -> None:
    """Write the result of a stage as JSON, with a checksum: a later start believes it instead of computing it again."""
    write_whole(path, json.dumps(values | {_CHECKSUM: _checksum(values)}, indent=1) + "\n")


def read_result(path: Path) -> dict[str, Any]:
    """The values that `write_result` has written. Raises UserError if they are damaged."""
    try:
        values = json_file(path)
    except UserError:
        values = {}
    if values.pop(_CHECKSUM, None) != _checksum(values):
        raise UserError(f"{path} is damaged, or of an earlier version of srpo: remove it, then it is made again")
    return values


def _checksum(values: dict[str, Any]) -> str:
    return digest_of_bytes(json.dumps(json.loads(json.dumps(values)), sort_keys=True).encode())


def check_whole(folder: Path) -> None:
    """Raise UserError if a folder that `whole_folder` has made is not as it was written."""
    if not (folder / COMPLETE).exists():
        raise UserError(f"{folder} has no {COMPLETE}, so it may not be whole: remove it, then it is made again")
    problem = damage(read_mark(folder)["files"], digests_of(folder, files_of(folder)))
    if problem:
        raise UserError(f"{folder / problem}: remove {folder}, then it is made again")


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Return once a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_not_adapter(path: str | Path) -> None:
    """Raise UserError for the folder of a low-rank adapter in peft's format, which is no model by itself."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{str(path)!r} holds an adapter and no model: give its base as policy.path and this folder as policy.lora.start, "
            "or the folder policy beside it, if srpo wrote it, which has both in one"
        )
