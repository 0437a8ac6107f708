"""Files that are never seen half-written: they are written under a temporary name and then renamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
