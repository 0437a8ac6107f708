"""The one strict reader of JSON: files of one object per line, and whole files. A bad line is a UserError with file and line.

Refused are what `json` lets pass: a key given twice, NaN and Infinity, halves of surrogate pairs, a byte order mark.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from srpo.core.errors import UserError, naming


def json_lines(path: str | Path, want: str, *, finite: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line N", object) of each line of a file, which may be gzipped (.gz). Blank lines are skipped.

    `want` says in an error what a line has to be; `finite` refuses NaN and Infinity. UserError for a line that is no object, and
    for a gzip file that is not whole.
    """
    path = Path(path)
    for number, line in numbered_lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, json_object(line, where, want, finite=finite)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of each line of a file, which may be gzipped (.gz). UserError for a gzip file that is not whole."""
    with ExitStack() as stack:
        lines: Any = stack.enter_context(path.open("rb"))
        if path.name.endswith(".gz"):
            lines = stack.enter_context(gzip.GzipFile(fileobj=lines))
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{path}, after line {number}: not a complete gzip file ({error}): write or fetch it again"
            ) from error


def json_file(path: str | Path, want: str = "the file that the program wrote") -> dict[str, Any]:
    """The object that a whole file holds; a number may be NaN. UserError as in `json_lines`."""
    with naming(Path(path)):
        text = Path(path).read_bytes()
    return json_object(text, str(path), want, finite=False)


def json_object(text: bytes, where: str, want: str, *, finite: bool = True) -> dict[str, Any]:
    """The object in `text`. UserError, beginning with `where`, for anything else. `finite` refuses NaN and Infinity."""
    if text.startswith(b"\xef\xbb\xbf"):
        raise UserError(f"{where}: begins with a byte order mark: save the file as UTF-8 without one")
    try:
        numbers: dict[str, Any] = {"parse_constant": _constant, "parse_float": _finite} if finite else {}
        row = json.loads(text.decode("utf-8"), object_pairs_hook=_object, **numbers)
        if b"\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()  # raises for half of a surrogate pair: valid JSON, not valid text
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}: save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half of a surrogate pair (\\ud800 to \\udfff) without the other half: write the character itself"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: not JSON that can be read (nested too deeply): write {want}") from error
    except _Refused as error:
        raise UserError(f"{where}: {error}") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}): write {want}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object: write {want}")
    return row


class _Refused(ValueError):
    """JSON that `json` would read; the text ends in the fix."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise _Refused(f"the key {twice!r} is given twice: keep one of them")
    return row


def _constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is no JSON number: write a finite number, or null")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"{text[:40]} is too large: write a finite number")
    return value
