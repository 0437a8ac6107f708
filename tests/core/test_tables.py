from __future__ import annotations

import pytest

from srpo.core.tables import MAX_WIDTH, percent, text_table


@pytest.mark.parametrize(
    ("arguments", "signed", "cell"),
    [
        ((0.6012,), False, "60.1"),
        ((1.0,), False, "100.0"),
        ((0.6012, [0.582, 0.62]), False, "60.1 [58.2 62.0]"),
        ((1.0, [0.99, 1.0]), False, "100 [99.0 100]"),
        ((-0.012, [-0.03, 0.004]), True, "-1.2 [-3.0 +0.4]"),
        ((0.012,), True, "+1.2"),
        ((None, None), True, "-"),
    ],
)
def test_cells(arguments: tuple, signed: bool, cell: str):
    assert percent(*arguments, signed=signed) == cell


def test_a_table_is_aligned_and_has_rules():
    table = text_table(("", "a", "long"), [[("x", "1", "2")], [], [("name", "10", "-")]], ["a note"])
    assert table.splitlines() == [
        "        a   long",
        "----------------",
        "x       1      2",
        "----------------",
        "name   10      -",
        "----------------",
        "a note",
    ]


def test_a_name_from_a_file_stays_in_its_cell():
    assert text_table(("", "a\nb"), [[("\x1b[2Jx", "1")]]).splitlines()[::2] == [r"           a\nb", r"\x1b[2Jx      1"]


@pytest.mark.parametrize("num_columns", [6, 7, 20])
def test_wide_tables_are_cut_into_blocks_that_fit(num_columns: int):
    header = ("", *(f"column{i}" for i in range(num_columns)))
    rows = [("a name of twenty let", *("60.1 [58.2 62.0]" for _ in range(num_columns)))]
    table = text_table(header, [rows], ["note"])
    lines = table.splitlines()
    assert max(map(len, lines)) <= MAX_WIDTH
    assert lines[-1] == "note" and lines.count("note") == 1
    blocks = table.removesuffix("\nnote").split("\n\n")
    assert len(blocks) == -(-num_columns // 6)
    assert [block.splitlines()[0].split() for block in blocks] == [list(header[1:][k : k + 6]) for k in range(0, num_columns, 6)]
    assert all(block.splitlines()[2].startswith("a name of twenty let  ") for block in blocks)
