"""Files that are never seen half-written: they are written under a temporary name and then renamed. And JSON files of others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srpo.core.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`. It replaces `path` at the end, or is removed after an exception.

    If the process is killed, `path` is complete or as it was before. The folder must exist.
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)  # left by a killed process
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file through `whole_file`, in UTF-8."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for a file that holds anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no UTF-8
        raise UserError(f"{path} is not JSON ({error}): restore it") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a JSON object: restore it")
    return fields
