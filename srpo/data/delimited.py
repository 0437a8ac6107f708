"""CSV and TSV files as rows of texts. No type is inferred: "007" and "NA" stay as they are. UserErrors name file and line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from srpo.core.errors import UserError
from srpo.core.jsonl import numbered_lines

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "|"}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ZIP = b"PK\x03\x04"  # an .xlsx file is one
_SAVE = "save it as UTF-8 (in Excel: CSV UTF-8)"


class Table:
    """A CSV or TSV file: `names`, the columns of its header without spaces around them, and its rows.

    A .tsv file is separated by tabs, a .csv file by the one of comma, semicolon, tab and | that cuts its header into the most
    columns. A value in double quotes may hold separators, line breaks and doubled quotes. UserError for a file that is no such
    text and for a header that has one column, or a column twice.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = _text_lines(file)
        self._skipped, header = next(((n - 1, text) for n, text in enumerate(lines, 1) if text.strip()), (0, ""))
        if not header:
            raise UserError(f"{file} is empty: its first line has to name the columns")
        likely = max(_SEPARATORS, key=lambda mark: _num_columns(header, mark))
        separator = "\t" if file.name.endswith((".tsv", ".tsv.gz")) else likely
        self._reader = csv.reader(chain([header], lines), delimiter=separator, strict=True)
        self._rows = self._values()
        self.where, names = next(self._rows)
        self._header, self.names = names, [name.strip() for name in names]
        if len(names) == 1:
            fix = "separate columns by commas, semicolons, tabs or |"
            if likely != separator and _num_columns(header, likely) > 1:
                fix = f"it looks separated by {_SEPARATORS[likely]}, so name the file .csv"
            raise UserError(f"{self.where}: one column, {self.names[0][:80]!r}, but a pair has a query and a title: {fix}")
        if twice := [name for i, name in enumerate(self.names) if name in self.names[:i]]:
            raise UserError(f"{self.where}: the column {twice[0]!r} is there twice: rename or remove one of them")

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """("file, line N", values by column) of each row; N is the line that the row begins in. Blank lines are skipped."""
        names, header = self.names, self._header
        for where, values in self._rows:
            if values == header:
                raise UserError(f"{where}: the header a second time: remove the line")
            if len(values) != len(names):
                raise UserError(
                    f"{where}: {len(values)} values, but the header has {len(names)} columns: put a value that holds a separator "
                    'into double quotes ("), and leave no value out'
                )
            yield where, dict(zip(names, values, strict=True))

    def _values(self) -> Iterator[tuple[str, list[str]]]:
        begins = f"{self.file}, line "
        line = 1 + self._skipped
        try:
            for values in self._reader:
                if values:
                    yield f"{begins}{line}", values
                line = 1 + self._skipped + self._reader.line_num
        except csv.Error as error:
            raise UserError(f"{begins}{line}: {_explained(str(error))}") from error


def _explained(error: str) -> str:
    """An error of `csv` in words, with the fix."""
    if "end of data" in error or "field limit" in error:
        return (
            'a value begins with a double quote (") that no other closes: add it, or write the value in quotes and this one twice'
        )
    if "expected after" in error:
        return 'a double quote (") in the middle of a quoted value: write it twice, as in "15"" wide"'
    if "new-line" in error:
        return "a carriage return without a line feed: save the file with line feeds, and put a value that holds one into quotes"
    return f"not CSV ({error}): save the file again"


def _num_columns(header: str, separator: str) -> int:
    """Number of columns of the header's first line; 0 if it cannot be cut."""
    try:
        return len(next(csv.reader([header], delimiter=separator), []))
    except csv.Error:
        return 0


def _text_lines(file: Path) -> Iterator[str]:
    for number, line in numbered_lines(file):
        if number == 1:
            if line.startswith(_ZIP):
                raise UserError(f"{file} is an Excel or zip file, not text: save it as CSV UTF-8")
            if line.startswith(_UTF16):
                raise UserError(f"{file} is UTF-16: {_SAVE}")
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, line {number}: not UTF-8 at byte {error.start + 1}: {_SAVE}") from error
        if "\0" in text:
            raise UserError(f"{file}, line {number}: a NUL byte, which no text has: {_SAVE}")
        yield text
