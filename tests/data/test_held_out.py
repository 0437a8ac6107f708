"""data.eval_frac: the same queries are held out of a list, a stream and any order of the rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from srpo.core.errors import UserError
from srpo.core.step_presets import PAPER
from srpo.core.text import fold
from srpo.data.readers import load_examples, load_parts, read_examples
from srpo.data.splits import QuerySplit, spread_over_queries


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


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_limit_takes_as_many_queries_as_it_can(tmp_path: Path, with_ids: bool) -> None:
    rng = random.Random()
    examples = load_examples(write_pairs(tmp_path / "pairs.jsonl", random_rows(rng, with_ids)), PAPER)
    sizes = Counter(fold(example.query) for example in examples)
    order = spread_over_queries(examples, 3)
    assert sorted(order, key=lambda e: e.example_id) == sorted(examples, key=lambda e: e.example_id)
    for limit in range(len(order) + 1):
        counts = Counter(fold(example.query) for example in order[:limit])
        rounds = max(counts.values(), default=0)
        assert all(counts[query] >= min(size, rounds - 1) for query, size in sizes.items())
    assert spread_over_queries(rng.sample(examples, len(examples)), 3) == order
    others = spread_over_queries(examples, 4)
    queries = [[fold(e.query) for e in some[: len(sizes)]] for some in (order, others)]
    assert sorted(queries[0]) == sorted(queries[1]) == sorted(sizes) and queries[0] != queries[1]
    firsts = [{fold(e.query): e.title for e in some[: len(sizes)]} for some in (order, others)]
    assert firsts[0] != firsts[1]  # the pairs of a query have a random order, too


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
