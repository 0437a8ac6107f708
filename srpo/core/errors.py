"""The errors that a program prints as one line: a user's mistake, or a state of the machine that only the user can change.

Any other exception is our own bug and keeps its traceback (`settings.run_program`).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Its text says what is wrong, where (file and line, or setting), and what to change, in one line of printable characters."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class MissingPackage(UserError):
    """A package that the settings need is not installed; the text has the command that installs it."""


def printable(text: str) -> str:
    r"""The text with an escape such as \n for each character that is not printable: a name in a file may hold any."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_REMEDIES = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some of your quota, then run the same command again",
    errno.EROFS: "give a folder on a file system that can be written",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.EIO: "check the disk",
    errno.ENOENT: "give a path that exists",
    errno.EEXIST: "remove it, or give another path",
    errno.ENOTDIR: "give a folder",
    errno.EISDIR: "give a file",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "mend the loop of links",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
    errno.ENOTEMPTY: "empty it, or give another path",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or give a file system that takes larger ones",
    errno.ESTALE: "mount the file system again, then run the same command again",
    errno.ENFILE: "close files of other programs: the machine has none left",
}


def explain_os_error(error: OSError) -> str | None:
    """One line with path, reason and remedy for an error of the file system; None for any other, as of a socket."""
    remedy = _REMEDIES.get(error.errno or 0) or ("check that path" if error.filename and error.errno else None)
    if remedy is None:
        return None
    path = f"{error.filename}: " if error.filename else ""
    return printable(f"{path}{(error.strerror or str(error)).lower()}: {remedy}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the file system name the file: Python's of an open file do not, and libraries in Rust raise types of their own.

    The text of the latter ends in "(os error 28)", or in the words of the error and "(28)": they become its OSError.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        number = _native(str(error))
        if isinstance(error, UserError) or number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _native(text: str) -> int | None:
    """The number of the system's error that a library's text names; None if it names none."""
    if match := re.search(r"\(os error (\d+)\)", text):
        return int(match[1])
    match = re.search(r"\((\d{1,3})\)$", text)
    return int(match[1]) if match and os.strerror(int(match[1])) in text else None
