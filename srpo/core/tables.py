"""Text tables with aligned columns, split into blocks if they are wider than a line."""

from __future__ import annotations

from collections.abc import Sequence

from srpo.core.errors import printable

MAX_WIDTH = 130


def percent(value: float | None, interval: Sequence[float] | None = None, *, signed: bool = False) -> str:
    """Format a fraction as percent: "60.1", with interval "60.1 [58.2 62.0]", signed "+1.9"; "-" for None."""
    if value is None:
        return "-"
    form = "+.1f" if signed else ".1f"
    cells = [format(100 * number, form) for number in (value, *(interval or ()))]
    if interval is None:
        return cells[0]
    first, low, high = (cell.replace("100.0", "100") for cell in cells)  # an interval with 100 % keeps the column narrow
    return f"{first} [{low} {high}]"


def text_table(header: Sequence[str], parts: Sequence[Sequence[Sequence[str]]], notes: Sequence[str] = ()) -> str:
    """Return a table with the first column left-aligned and the others right-aligned.

    A rule follows the header and each part (a list of rows; empty parts are dropped); the notes come last. Columns that do not
    fit into MAX_WIDTH characters go to further blocks below, each with the first column repeated.
    """
    header = [*map(printable, header)]
    parts = [[[*map(printable, row)] for row in part] for part in parts if part]  # a cell may be a name from a file
    rows = [header, *(row for part in parts for row in part)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = "   " if sum(widths) + 3 * (len(widths) - 1) <= MAX_WIDTH else "  "
    blocks: list[list[int]] = [[]]
    for column in range(1, len(header)):
        if blocks[-1] and widths[0] + sum(len(gap) + widths[c] for c in (*blocks[-1], column)) > MAX_WIDTH:
            blocks.append([])
        blocks[-1].append(column)

    shown = []
    for columns in blocks:
        rule = "-" * (widths[0] + sum(len(gap) + widths[c] for c in columns))
        lines = []
        for part in ([header], *parts):
            lines += [gap.join([row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in columns)]) for row in part]
            lines.append(rule)
        shown.append("\n".join(lines))
    return "\n".join(["\n\n".join(shown), *notes])
