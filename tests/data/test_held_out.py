"""data.eval_frac: the same queries are held out of a list, a stream and any order of the rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from srpo.core.errors import UserError
from srpo.core.step_presets import PAPER
from srpo.data.readers import load_examples, load_parts, read_examples
from srpo.data.splits import QuerySplit


def write_pairs(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def random_rows(rng: random.Random, with_ids: bool) -> list[dict]:
    """Pairs whose queries hang together by text, by query_id or by both in turn."""
    rows = []
    for i in range(200):
        number = rng.randint(0, 60)
        other, text = number if rng.random() < 0.97 else rng.randint(0, 60), f"query {number}"
        row = {"query": rng.choice([text, f"  {text.upper()} "]), "title": f"title {i}", "grade": rng.randint(1, 4)}
        rows.append(row | ({"example_id": f"e{i}", "query_id": f"q{other}"} if with_ids else {}))
    return rows


@pytest.mark.parametrize("with_ids", [True, False])
def test_the_stream_and_the_lists_are_one_split(tmp_path: Path, with_ids: bool) -> None:
    rng = random.Random()
    rows = random_rows(rng, with_ids)
    path = write_pairs(tmp_path / "pairs.jsonl", rows)
    train, held_out = load_parts(path, PAPER, 0.3)
    assert (
        list(read_examples(path, PAPER, eval_frac=0.3)) == train
        and list(read_examples(path, PAPER, eval_frac=0.3, held_out=True)) == held_out
    )
    assert len(train) + len(held_out) == len(rows)
    for value in (lambda e: e.query_id, lambda e: " ".join(e.query.split()).casefold()):
        assert {value(e) for e in train}.isdisjoint(value(e) for e in held_out)
    again = load_parts(write_pairs(tmp_path / "again.jsonl", rng.sample(rows, len(rows))), PAPER, 0.3)
    assert [{e.title for e in part} for part in again] == [{e.title for e in part} for part in (train, held_out)]


def test_more_data_moves_no_query(tmp_path: Path) -> None:
    rows = [{"query": f"query {i // 3}", "title": f"t{i}"} for i in range(900)]
    some = load_parts(write_pairs(tmp_path / "some.jsonl", rows[:600]), PAPER, 0.25)[1]
    every = load_parts(write_pairs(tmp_path / "all.jsonl", rows), PAPER, 0.25)[1]
    assert [e for e in every if int(e.title[1:]) < 600] == some and 80 < len(some) < 220


def test_a_split_keeps_queries_and_no_examples(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", [{"query": f"query {i}", "title": "t"} for i in range(50)])
    examples = load_examples(path, PAPER)
    split = QuerySplit(iter(examples), 0.5, 7)
    assert 0 < sum(map(split.holds_out, examples)) < 50
    with pytest.raises(UserError, match=r"eval_frac 0\.5 with seed 7 puts [01] examples in train and [01] in eval \(1 queries\)"):
        QuerySplit(examples[:1], 0.5, 7)


def test_a_bad_row_of_either_part_is_found(tmp_path: Path) -> None:
    rows = [{"query": f"query {i}", "title": "t"} for i in range(50)]
    path = write_pairs(tmp_path / "pairs.jsonl", [*rows, {"query": "query 7", "title": "t"}])
    for read in (lambda: load_parts(path, PAPER, 0.3), lambda: list(read_examples(path, PAPER, eval_frac=0.3))):
        with pytest.raises(UserError, match=r"line 51: the same query and item as in .*line 8"):
            read()
