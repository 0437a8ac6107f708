"""Readers and writers in all formats: content, order, memory, and the errors of broken files."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import string
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srpo.core.step_presets import PAPER
from srpo.core.steps import StepSchema, StepSpec
from srpo.data.examples import Example
from srpo.data.readers import load_examples, read_examples, split_by_query, write_examples

SUFFIXES = ("jsonl", "jsonl.gz", "parquet")


def row(i: int, **changes) -> dict:
    return {
        "example_id": f"e{i}",
        "query_id": f"q{i // 2}",
        "query": f"query {i // 2}",
        "title": f"title {i}",
        "grade": i % 4 + 1,
    } | changes


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


FREE = StepSchema([StepSpec(f"s{j}", f"s{j}:") for j in range(4)])  # any text is a label


def random_example(rng: random.Random, i: int) -> Example:
    alphabet = string.printable + "äß漢字😀\u2028\x00"

    def text() -> str:
        return "x" + "".join(rng.choices(alphabet, k=rng.randint(0, 12)))

    def labels() -> tuple[str | None, ...]:
        return tuple(rng.choice([None, text()]) for _ in range(4))

    def strings() -> dict[str, str]:
        return {text(): rng.choice(["", text()]) for _ in range(rng.randint(0, 3))}

    return Example(f"{i}", text(), text(), text(), strings(), labels(), labels(), strings())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_is_read(tmp_path, suffix, seed):
    rng = random.Random(seed)
    examples = [random_example(rng, i) for i in range(rng.randint(1, 60))]
    path = tmp_path / f"data.{suffix}"
    assert write_examples(path, iter(examples)) == len(examples)
    back = load_examples(path, FREE)
    assert back == examples
    assert [list(e.fields) for e in back] == [list(e.fields) for e in examples]
    assert load_examples(path, FREE, limit=1) == examples[:1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_examples_give_the_same_bytes_and_no_half_file(tmp_path, suffix):
    examples = [random_example(random.Random(1), i) for i in range(5)]
    one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
    write_examples(one, examples)
    write_examples(two, examples)
    assert one.read_bytes() == two.read_bytes()

    def broken():
        yield examples[0]
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        write_examples(one, broken())
    with pytest.raises(ValueError, match="no examples to write"):
        write_examples(tmp_path / f"none.{suffix}", [])
    assert one.read_bytes() == two.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [one.name, two.name]


def test_only_known_suffixes_are_written(tmp_path):
    with pytest.raises(ValueError, match=r"end in \.jsonl, \.jsonl\.gz, \.parquet"):
        write_examples(tmp_path / "data.csv", [random_example(random.Random(0), 0)])


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    expected = []
    for k, suffix in enumerate(("parquet", "jsonl", "jsonl.gz")):
        shard = [random_example(random.Random(k), 10 * k + i) for i in range(3)]
        write_examples(tmp_path / f"part-{k}.{suffix}", shard)
        expected += shard
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    assert list(read_examples(tmp_path, FREE)) == expected


def test_parquet_columns_of_other_writers(tmp_path):
    """Parquet from other programs: structs for objects, integers for ids, null for a missing key."""
    rows = [
        {
            "example_id": 1,
            "query_id": 5,
            "query": "a",
            "title": "t",
            "fields": {"brand": "Acme", "color": None},
            "label": "E",
            "grade": None,
        },
        {"example_id": 2, "query_id": 5, "query": "a", "title": "u", "fields": None, "label": None, "grade": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    first, second = load_examples(tmp_path / "data.parquet", PAPER)
    assert (first.example_id, first.query_id, first.fields, first.grade) == ("1", "5", {"brand": "Acme"}, "L4")
    assert (second.fields, second.grade) == ({}, "L2")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bad_row_stops_the_stream_at_its_line(tmp_path, suffix):
    rows = [row(i) for i in range(5)]
    del rows[3]["title"]
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)  # the missing title becomes null
    elif suffix == "jsonl":
        write_lines(path, rows)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    with pytest.raises(ValueError, match=rf"data\.{suffix}, (line|row) 4: 'title' is missing"):
        load_examples(path, PAPER)
    assert [e.example_id for e in itertools.islice(read_examples(path, PAPER), 3)] == ["e0", "e1", "e2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"example_id": "x", ', "line 3: not JSON"),
        ("[1, 2]", "line 3: a JSON list, not an object"),
        ('"text"', "line 3: a JSON str, not an object"),
        ("[" * 100_000, "line 3: not JSON"),
        ("1" * 5_000, "line 3: not JSON"),
        (json.dumps(row(2) | {"query": "\ud800"}), "line 3: half of a surrogate pair"),
        (json.dumps(row(0)), "line 3: example_id 'e0' occurs a second time"),
        (json.dumps(row(2) | {"grade": 5}), "line 3: 'grade' is 5"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    path = write_lines(tmp_path / "data.jsonl", [row(0), "", line, row(3)])
    with pytest.raises(ValueError, match=message):
        load_examples(path, PAPER)


def test_duplicates_are_found_across_shards_or_let_pass(tmp_path):
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}.jsonl", [row(0)])
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: example_id 'e0' occurs a second time"):
        load_examples(tmp_path, PAPER)
    assert len(list(read_examples(tmp_path, PAPER, check_duplicates=False))) == 2


def test_files_that_are_not_what_they_seem(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"example_id": "\xe4"}\n')
    complete = gzip.compress(b"".join(json.dumps(row(i)).encode() + b"\n" for i in range(500)))
    (tmp_path / "cut.jsonl.gz").write_bytes(complete[: len(complete) // 2])
    (tmp_path / "plain.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "text.parquet").write_bytes(b"not parquet")
    (tmp_path / "empty.parquet").write_bytes(b"")
    for name, message in {
        "latin.jsonl": "line 1: not UTF-8",
        "cut.jsonl.gz": "not a complete gzip file",
        "plain.jsonl.gz": "not a complete gzip file",
        "text.parquet": "not a readable Parquet file",
        "empty.parquet": "not a readable Parquet file",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_examples(tmp_path / name, PAPER)


def test_a_parquet_file_damaged_inside(tmp_path):
    path = tmp_path / "data.parquet"
    write_examples(path, [random_example(random.Random(i), i) for i in range(200)])
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"data\.parquet: not a readable Parquet file"):
        load_examples(path, FREE)


def test_paths_with_nothing_to_read(tmp_path):
    for suffix in ("txt", "jsonl.bz2"):
        (tmp_path / f"data.{suffix}").write_text("x")
        with pytest.raises(ValueError, match="nothing to read"):
            read_examples(tmp_path / f"data.{suffix}", PAPER)
    with pytest.raises(ValueError, match="nothing to read"):
        read_examples(tmp_path, PAPER)
    with pytest.raises(ValueError, match="no such file or folder"):
        read_examples(tmp_path / "missing.jsonl", PAPER)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="has no examples"):
        load_examples(tmp_path / "empty.jsonl", PAPER)
    with pytest.raises(ValueError, match=r"not an official ESCI release: remove \?locale="):
        read_examples(f"{tmp_path}/empty.jsonl?split=train", PAPER)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_streaming_holds_no_data(tmp_path, suffix):
    """4,000 pairs of 4 kB each, 16 MB in all, are streamed in a few MB."""
    path = tmp_path / f"data.{suffix}"
    write_examples(path, (Example(f"{i}", "q", "query", "t" * 4000, {}, (None,), (None,)) for i in range(4000)))
    tracemalloc.start()
    assert sum(1 for _ in read_examples(path, StepSchema([StepSpec("s", "s:")]))) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


@pytest.mark.parametrize("seed", range(5))
def test_no_query_is_on_both_sides(seed):
    rng = random.Random(seed)
    examples = [Example(f"{i}", f"q{i}", f"query {rng.randint(0, 40)}", "t") for i in range(100)]
    examples += [Example(f"x{i}", f"p{i % 7}", f"other {i}", "t") for i in range(30)]
    train, evaluation = split_by_query(examples, 0.4, seed)
    assert sorted(train + evaluation, key=examples.index) == examples
    assert train == [e for e in examples if e in train]
    for key in ("query_id", "query"):
        assert not {getattr(e, key) for e in train} & {getattr(e, key) for e in evaluation}
    shuffled = rng.sample(examples, len(examples))
    assert {e.example_id for e in split_by_query(shuffled, 0.4, seed)[1]} == {e.example_id for e in evaluation}


def test_case_and_spaces_do_not_make_another_query():
    examples = [Example(f"{i}", f"q{i}", f"{'  ' * (i % 3)}Red {'SHOES' if i % 2 else 'shoes'} {i // 6}", "t") for i in range(60)]
    train, evaluation = split_by_query(examples, 0.5, 1)
    assert {e.query.casefold().split()[-1] for e in train}.isdisjoint(e.query.casefold().split()[-1] for e in evaluation)


def test_the_split_is_about_the_fraction_and_stays_when_data_is_added():
    examples = [Example(f"{i}", f"q{i}", f"query {i}", "t") for i in range(3000)]
    evaluation = split_by_query(examples[:2000], 0.2, 3)[1]
    assert 0.16 < len(evaluation) / 2000 < 0.24
    assert [e for e in split_by_query(examples, 0.2, 3)[1] if int(e.example_id) < 2000] == evaluation
    assert split_by_query(examples[:2000], 0.2, 4)[1] != evaluation


def test_a_split_with_an_empty_side_is_refused():
    one_query = [Example(f"{i}", "q", "query", "t") for i in range(10)]
    with pytest.raises(ValueError, match=r"\(1 queries\): give more queries"):
        split_by_query(one_query, 0.5, 0)
    for frac in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="give a fraction between 0 and 1"):
            split_by_query(one_query, frac, 0)


def test_what_parquet_can_hold_and_a_row_cannot_is_said_with_file_and_row(tmp_path):
    path = tmp_path / "data.parquet"
    rows = {name: ["1", "2", "3"] for name in ("example_id", "query_id", "query", "title")}
    whole = pa.table(rows)
    bad_text = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"b", b"\xff"]).buffers())
    twice = pa.array([[("a", "x")], [("a", "x"), ("a", "y")], []], pa.map_(pa.string(), pa.string()))
    late = pa.array([0, 2**62, 0], pa.int64()).view(pa.timestamp("us"))
    inner = pa.StructArray.from_arrays([pa.array(["x"] * 3)] * 2, names=["brand", "brand"])
    for table, message in (
        (whole.set_column(3, "title", bad_text), r"data\.parquet, row 3: column 'title' cannot be read"),
        (whole.append_column("tags", twice), r"data\.parquet, row 2: column 'tags' cannot be read"),
        (whole.append_column("truth", late), r"data\.parquet, row 2: column 'truth' cannot be read"),
        (whole.append_column("title", whole["title"]), r"data\.parquet has the column 'title' twice"),
        (whole.append_column("grade", pa.array([4.0, None, math.nan])), r"row 3: grade is nan: write null for a missing value"),
        (whole.append_column("fields", pa.array([{}, {"a": math.inf}, {}])), r"row 2: fields\.a is inf: write null"),
        (whole.append_column("truth", pa.array([None, [math.nan], None])), r"row 2: truth\.1 is nan: write null"),
        (whole.append_column("fields", inner), r"data\.parquet has the column 'fields\.brand' twice"),
    ):
        pq.write_table(table, path)
        with pytest.raises(ValueError, match=message):
            load_examples(path, PAPER)
