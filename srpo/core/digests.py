"""Contents of files and folders as digests: what a run was started with, and whether a folder is as it was written.

Every byte is hashed (BLAKE2b, about 1 GB/s per core; the files of a folder in parallel), so no change goes unseen, however small.
A folder that is written whole carries a file COMPLETE with the digests of its other files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from srpo.core.errors import UserError, naming

COMPLETE = "COMPLETE"
_SIZE = 16  # bytes of a digest
_MODEL_FILES = {".safetensors", ".json", ".model", ".txt", ".jinja", ".bin"}  # weights, settings and tokenizer of a checkpoint


def new_digest() -> hashlib.blake2b:
    """An empty digest, to be updated with bytes."""
    return hashlib.blake2b(digest_size=_SIZE)


def digest_of(parts: Iterable[object]) -> str:
    """Digest of the `repr` of values, in their order; of dataclasses, all fields."""
    digest = new_digest()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()


def digest_of_bytes(data: bytes) -> str:
    """Digest of some bytes."""
    return hashlib.blake2b(data, digest_size=_SIZE).hexdigest()


def digest_of_file(path: Path) -> str:
    """Digest of the bytes of a file."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def digests_of(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Digests of files of a folder, by name."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: digest_of_file(folder / name), names), strict=True))


def files_of(folder: Path) -> list[str]:
    """Relative paths of all files below a folder in order, without COMPLETE files and those whose names begin with a dot."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths if path.name != COMPLETE]
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def digest_of_data(path: str | Path) -> str:
    """Digest of the bytes of a data file, or of all files below a folder."""
    path = Path(path)
    return digest_of(sorted(digests_of(path, files_of(path)).items())) if path.is_dir() else digest_of_file(path)


def digest_of_model(path: str | Path) -> str:
    """Digest of a checkpoint folder: weights, settings and tokenizer; links are followed, other files do not count.

    Raises UserError if the folder has a COMPLETE file and is not as it was written, and if it does not exist.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no model in {str(path)!r}: give a folder with config.json and safetensors files")
    names = [path.name for path in folder.iterdir() if path.suffix in _MODEL_FILES and path.is_file()]
    written = read_mark(folder)["files"] if (folder / COMPLETE).exists() else {}
    names += [name for name in written if name not in names and (folder / name).is_file()]
    digests = digests_of(folder, sorted(names))
    if problem := damage(written, digests):
        raise UserError(
            f"{folder / problem}: restore the folder or make it again; if the change is meant, remove {folder / COMPLETE}"
        )
    return digest_of(digests.items())


def damage(written: dict[str, str], found: dict[str, str]) -> str:
    """The first file that is not as it was written, as "NAME is damaged (...)"; "" if all are as written."""
    for name, digest in written.items():
        if found.get(name) != digest:
            return (
                f"{name} is damaged (its checksum is not that of the file that was written)"
                if name in found
                else f"{name} is missing"
            )
    return ""


def write_mark(folder: Path, values: dict[str, Any]) -> None:
    """Write COMPLETE: `values` as a line of JSON and its digest."""
    line = json.dumps(values)
    with naming(folder / COMPLETE):
        (folder / COMPLETE).write_text(f"{line}\n{digest_of_bytes(line.encode())}\n", encoding="utf-8")


def read_mark(folder: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The values of a folder's COMPLETE: files, and `keys`. Raises UserError if it is not as it was written."""
    path = folder / COMPLETE
    with naming(path):
        line, _, rest = path.read_bytes().partition(b"\n")
    whole = rest == digest_of_bytes(line).encode() + b"\n"
    values = json.loads(line) if whole else {}
    if not whole or not values.keys() >= {"files", *keys}:
        raise UserError(f"{path} is damaged, of another folder or an earlier version: restore the folder, or make it again")
    return values
