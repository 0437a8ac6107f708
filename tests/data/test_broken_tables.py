"""Broken CSV, TSV and Parquet files: each is refused in one line with file and row, or read right."""

from __future__ import annotations

import gzip
import json
import random
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srpo.core.errors import UserError
from srpo.core.step_presets import PAPER
from srpo.data.readers import load_examples, read_examples

HEADER = "query,title,label\n"
GOOD = HEADER + "red shoes,Runner,4\nred shoes,Boot,2\n"
MANY = HEADER + "".join(f"a,b{i},1\n" for i in range(999))
SPREADSHEET = b"PK\x03\x04rest of a zip file"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("utf16.csv", GOOD.encode("utf-16"), r"utf16\.csv is UTF-16: save it as UTF-8"),
        ("cp1252.csv", GOOD.replace("Boot", "Caf\xe9").encode("cp1252"), r"cp1252\.csv, line 3: not UTF-8 at byte 14: save it"),
        ("one.csv", b"query title label\nred shoes Runner 4\n", r"one\.csv, line 1: one column, 'query title label', but a pair"),
        ("commas.tsv", GOOD.encode(), r"commas\.tsv, line 1: one column.*it looks separated by commas, so name the file \.csv"),
        ("long.csv", (GOOD + "a,b,c,d\n").encode(), r"long\.csv, line 4: 4 values, but the header has 3 columns"),
        ("short.csv", (GOOD + "a,b\n").encode(), r"short\.csv, line 4: 2 values, but the header has 3 columns"),
        ("open.csv", (GOOD + 'blue,"Boot,1\n' + "a,b,1\n" * 9).encode(), r"open\.csv, line 4: a value begins with a double"),
        ("wide.csv", (GOOD + 'blue,"' + "x" * 200_000).encode(), r"wide\.csv, line 4: a value begins with a double quote"),
        ("inner.csv", (GOOD + 'blue,"15" screen",1\n').encode(), r"inner\.csv, line 4: a double quote .* in the middle"),
        ("nul.csv", (GOOD + "blue,Bo\0ot,1\n").encode(), r"nul\.csv, line 4: a NUL byte"),
        ("return.csv", (GOOD + "a,b\rc,d\n").encode(), r"return\.csv, line 4: a carriage return without a line feed"),
        ("mac.csv", GOOD.replace("\n", "\r").encode(), r"mac\.csv, line 1: a carriage return without a line feed"),
        ("object.csv", ("[" + json.dumps({"query": "x" * 200_000}) + "]").encode(), r"object\.csv, line 1: "),
        ("empty.csv", b"", r"empty\.csv is empty: its first line has to name the columns"),
        ("blank.csv", b"\n \n", r"blank\.csv is empty"),
        ("header.csv", HEADER.encode(), r"header\.csv has no examples"),
        ("again.csv", b"query,title\na,b\nquery,title\n", r"again\.csv, line 3: the header a second time"),
        ("twice.csv", b"query,title, query\na,b,c\n", r"twice\.csv, line 1: the column 'query' is there twice"),
        ("unnamed.csv", b",query,title\n0,a,b\n", r"unnamed\.csv, line 1: a column has no name: name it, remove it"),
        ("label.csv", (HEADER + "a,b,Exakt\n").encode(), r"label\.csv, line 2: 'label' is \"Exakt\": the grades are L1, L2"),
        ("nearest.csv", (HEADER + "a,b,L44\n").encode(), r"nearest\.csv, line 2: .*the nearest is 'l4'"),
        ("nolabel.csv", (GOOD + "a,b,\n").encode(), r"nolabel\.csv, line 4: 'label' is empty: give the pair a grade"),
        ("noquery.csv", (GOOD + '" ",b,1\n').encode(), r"noquery\.csv, line 4: 'query' is \" \": write a non-empty string"),
        ("notitle.csv", (GOOD + "a,,1\n").encode(), r"notitle\.csv, line 4: 'title' is \"\""),
        ("disagree.csv", b"query,title,grade,label\na,b,1,E\n", r"disagree\.csv, line 2: grade 1 and label E disagree"),
        ("ids.csv", b"example_id,query,title\n1,a,b\n2,c,d\n1,e,f\n", r"ids\.csv, line 4: example_id '1' .*after .*, line 2"),
        ("pair.csv", (GOOD + "red shoes,Runner,4\n").encode(), r"pair\.csv, line 4: the same query and item as .*, line 2: "),
        ("conflict.csv", (GOOD + "Red  Shoes,Boot,3\n").encode(), r"conflict\.csv, line 4: .*line 3, with the grade L3 inst"),
        ("pairs.xlsx", SPREADSHEET, r"pairs\.xlsx is a spreadsheet: save it as CSV UTF-8"),
        ("excel.csv", SPREADSHEET, r"excel\.csv is an Excel or zip file, not text: save it as CSV UTF-8"),
        ("cut.csv.gz", gzip.compress(MANY.encode())[:-20], r"cut\.csv\.gz, after line \d+: not a complete gzip file"),
        ("plain.csv.gz", GOOD.encode(), r"plain\.csv\.gz, after line 0: not a complete gzip file"),
        ("lines.csv", (HEADER + 'a,"two\nlines",1\n\nb,"c\nd",9\n').encode(), r"lines\.csv, line 5: 'label' is \"9\""),
    ],
    ids=lambda value: value if isinstance(value, str) and "\\" not in value else "",
)  # fmt: skip
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_examples(tmp_path / name, PAPER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode(),
        GOOD.replace(",", ";").encode(),
        GOOD.replace(",", "\t").encode(),
        GOOD.replace(",", "|").encode(),
        GOOD.replace("query,title", " query , title\t").encode(),
        ("\n" + GOOD.replace("\n", "\n\n")).encode(),
        GOOD.rstrip("\n").encode(),
        GOOD.replace("Runner", '"Runner"').encode(),
    ],
)
def test_tables_of_other_programs_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pairs.csv").write_bytes(content)
    read = [(e.query, e.title, e.grade) for e in load_examples(tmp_path / "pairs.csv", PAPER)]
    assert read == [("red shoes", "Runner", "L4"), ("red shoes", "Boot", "L2")]


def test_a_real_spreadsheet_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pairs.csv", "w") as archive:
        archive.writestr("xl/workbook.xml", "<x/>")
    with pytest.raises(UserError, match=r"pairs\.csv is an Excel or zip file"):
        load_examples(tmp_path / "pairs.csv", PAPER)


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"q": ["a"], "title": ["b"], "grade": [1]}), tmp_path / "pairs.parquet")
    for columns, message in (
        ({"query": "qry"}, r"pairs\.parquet: no column 'qry' \(columns query=qry\): the columns are q, title"),
        ({"ignore": "*"}, r"pairs\.parquet: no column 'query': name the one that holds it"),
    ):
        with pytest.raises(UserError, match=message):
            load_examples(tmp_path / "pairs.parquet", PAPER, columns=columns)
    assert load_examples(tmp_path / "pairs.parquet", PAPER, columns={"query": "q"})[0].grade == "L1"


def test_shards_of_one_kind(tmp_path: Path) -> None:
    for i, name in enumerate(("a.csv", "b.tsv", "c.csv.gz")):
        text = f"query,title\nq{i},t{i}\n".replace(",", "\t" if ".tsv" in name else ",").encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert [e.query for e in load_examples(tmp_path, PAPER)] == ["q0", "q1", "q2"]
    (tmp_path / "d.jsonl").write_text('{"query": "q", "title": "t"}\n')
    with pytest.raises(UserError, match=r"has a\.csv and d\.jsonl: keep files of one kind"):
        read_examples(tmp_path, PAPER)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv", "pairs.csv.gz", "pairs.parquet"])
def test_any_damage_is_one_line_or_harmless(tmp_path: Path, name: str) -> None:
    rng, path = random.Random(), tmp_path / name
    text = HEADER + "".join(f'"query {i}, ""x""",a title {i},{i % 4 + 1}\n' for i in range(30))
    if name.endswith("parquet"):
        columns = {"query": [f"q{i}" for i in range(30)], "title": [f"t{i}" for i in range(30)], "label": ["1"] * 30}
        pq.write_table(pa.table(columns), path)
        content = path.read_bytes()
    else:
        content = (text.replace('",a', '"\ta').replace("e,", "e\t").replace("y,t", "y\tt") if "tsv" in name else text).encode()
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            piece = rng.choice([b"", b'"', b"\0", b"\r", b"\n", b",", b";", b"\t", b"\xff", b"\xef\xbb\xbf", rng.randbytes(3)])
            damaged[at : at + rng.choice([0, 1, 1, 40])] = piece
        path.write_bytes(gzip.compress(damaged) if name.endswith("gz") and rng.random() < 0.7 else damaged)
        try:
            assert all(e.query.strip() and e.title.strip() for e in load_examples(path, PAPER))
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)


def test_rows_before_a_broken_one_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(GOOD + "a,b\n")
    stream = read_examples(tmp_path / "pairs.csv", PAPER)
    assert [next(stream).title, next(stream).title] == ["Runner", "Boot"]
    with pytest.raises(UserError, match="line 4: 2 values"):
        next(stream)


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ([1, 2, 1, 3], ""),
        ([1, 2, 1, 3, 2], "; 1 more row repeats earlier ones: line 6"),
        ([1, 1, 1, 2, 2], "; 2 more rows repeat earlier ones: line 4, line 6"),
        ([1] * 12, "; 10 more rows repeat earlier ones: line 4, line 5, line 6, line 7, line 8, ..."),
        ([1, 1, 1, ""], "; at least 1 more row repeats earlier ones: line 4"),
    ],
)
def test_repeated_rows_are_counted_in_one_line(tmp_path: Path, rows: list[int | str], shown: str) -> None:
    (tmp_path / "pairs.csv").write_text("query,title\n" + "".join(f"shoes,{title}\n" for title in rows))
    with pytest.raises(UserError) as caught:
        load_examples(tmp_path / "pairs.csv", PAPER)
    assert str(caught.value).endswith(f"further field (docs/data.md){shown}")
    (tmp_path / "ids.csv").write_text("query,title,example_id\n" + "".join(f"shoes,{title},e{title}\n" for title in rows))
    with pytest.raises(UserError) as caught:
        load_examples(tmp_path / "ids.csv", PAPER)
    assert str(caught.value).endswith(f"give every pair its own{shown}")


def test_repeated_rows_in_shards_have_their_file(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.csv").write_text("query,title\nshoes,1\n")
    with pytest.raises(UserError) as caught:
        load_examples(tmp_path, PAPER)
    assert str(caught.value).endswith(f"; 1 more row repeats earlier ones: {tmp_path / 'c.csv'}, line 2")
