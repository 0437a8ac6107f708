"""Every reader of a user's file, on mutated files: the outcome is a value or a UserError of one line, nothing else."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo.core.batch import Rollout, read_rollouts, write_rollouts
from srpo.core.config.train import Config
from srpo.core.errors import UserError
from srpo.core.jsonl import json_file
from srpo.core.settings import apply_toml, dump_toml
from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.data.pairs import read_pairs
from srpo.data.preferences import read_preferences
from srpo.data.prompts import build_prompt, wrapped
from srpo.data.readers import load_examples, write_examples
from srpo.judge_training.hard_cases import Case
from srpo.judge_training.human_queue import queue_lines, read_queue
from srpo.judge_training.judgments import read_judgments
from srpo.scores.pages import read_judgments as read_page_judgments
from srpo.scores.pages import read_pages, read_verdicts
from srpo.scores.responses import read_predictions

GOLD = (None, None, "related", "conflict", "L1")
EXAMPLES = [
    Example(
        "1", "q1", "red shoes", "Acme <b>Boot", {"brand": "Acme", "text": "a\nb"}, GOLD, ("a", "b", *GOLD[2:]), {"grade": "L1"}
    ),
    Example("2", "q1", "red shoes", "\u767b\u5c71 shoe", {}, (None,) * 5, (None,) * 5, {}),
]
ROLLOUT = Rollout("1", 0, (5, 6), (7, 8, 0), (-0.5, -1.0, 0.0), (1, 1, 2, 2, 3), ("a", None, None, None, "L1"), "x", "stop", 3)
CASE = Case("1", "to 1", (True, False, None, None, True), (0.5, None, 1.0, 0.0, 0.75), (4, 0, 4, 4, 4), 0.5)


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def consume(values: Iterable[Any]) -> list[Any]:
    return list(values)


def rollout_lines(folder: Path) -> bytes:
    path = folder / "valid.jsonl"
    path.unlink(missing_ok=True)  # rollouts are appended
    scored = replace(ROLLOUT, step_rewards=(0.0,) * 5, reward_sources=("skip",) * 5, verdicts=(True, None, 0.5, False, None))
    write_rollouts(path, [ROLLOUT, scored], 1)
    return path.read_bytes()


def example_bytes(folder: Path, name: str) -> bytes:
    write_examples(folder / name, EXAMPLES)
    return (folder / name).read_bytes()


DUMP = {"query_id": 1, "query": "boots", "product_id": "B0", "title": "Boots", "brand": "Acme", "label": "E", "grade": 3}
PAGE = {"query_id": "q", "item_ids": ["a", "b"], "rating": "good", "tags": {"query_type": "plain"}}
# Name of the file -> (bytes of a valid one, its reader)
READERS: dict[str, tuple[Callable[[Path], bytes], Callable[[Path], Any]]] = {
    "pairs.jsonl": (lambda f: example_bytes(f, "x.jsonl"), lambda p: load_examples(p, PAPER)),
    "pairs.jsonl.gz": (lambda f: example_bytes(f, "x.jsonl.gz"), lambda p: load_examples(p, PAPER)),
    "pairs.parquet": (lambda f: example_bytes(f, "x.parquet"), lambda p: load_examples(p, PAPER)),
    "dump.jsonl": (lambda _: lines(DUMP, {**DUMP, "product_id": 7}), lambda p: load_examples(p, PAPER)),
    "sft.jsonl": (lambda _: lines({"prompt": "a\n", "response": "b"}), lambda p: consume(read_pairs(p))),
    "dpo.jsonl": (lambda _: lines({"prompt": "a", "chosen": "b", "rejected": "c"}), lambda p: consume(read_preferences(p))),
    "judged.jsonl": (
        lambda _: lines({"example_id": "1", "response": "x", "verdicts": [True, None], "reasons": ["a", None]}),
        lambda p: consume(read_judgments(p, 2)),
    ),
    "judge_queue.jsonl": (lambda _: queue_lines([CASE], {"1": EXAMPLES[0]}, PAPER).encode(), lambda p: read_queue(p, PAPER)),
    "predictions.jsonl": (
        lambda _: lines({"example_id": "1", "prediction": 1, "answers": ["a", None, "match", "unclear", "L1"]}),
        lambda p: read_predictions(p, PAPER),
    ),
    "pages.jsonl": (lambda _: lines({**PAGE, "system": "A"}, {**PAGE, "system": "B"}), lambda p: read_pages(p, "A", "B")),
    "grades.jsonl": (
        lambda _: lines({"query_id": 1, "item_id": "a", "grade": 4}),
        lambda p: read_page_judgments(p, PAPER.grades),
    ),
    "verdicts.jsonl": (
        lambda _: lines({"query_id": "q", "verdict": "good", "assessor": "x"}),
        lambda p: read_verdicts(p, ["q"]),
    ),
    "rollouts.jsonl": (rollout_lines, lambda p: consume(read_rollouts(p))),
    "config.toml": (lambda _: dump_toml(Config()).encode(), lambda p: apply_toml(Config(), p)),
    "results.json": (lambda _: lines({"before": {"a": [1, None, 0.5]}}), json_file),
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 6)
    | st.sampled_from([4.0, 2.5, 10**30, "L4", "", " ", "a\nb", "\u2028", "x" * 99]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "grade", "id"]), inner, max_size=2),
    max_leaves=4,
)
SNIPPETS = [
    b"", b"\n", b"\r", b"\x00", b"\xef\xbb\xbf", b"\xff", b'"', b"{", b"}", b"[" * 3000, b",", b"NaN", b"-Infinity", b"1e999",
    b"9" * 5000,    b'"\\ud800"', b'"grade": 1, ', b'"example_id": "1", ', b"null", b"\x1f\x8b",
]  # fmt: skip

HALF = settings(max_examples=settings().max_examples // 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def outcome(read: Callable[[Path], Any], path: Path) -> str:
    """The text of the UserError, or "" for a value."""
    try:
        read(path)
    except UserError as error:
        text = str(error)
        assert text.isprintable() and path.name in text, text
        return text
    return ""


def replaced(node: Any, data: st.DataObject) -> Any:
    """The JSON value with one node replaced, removed, or put under another key."""
    if isinstance(node, dict) and node and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(node)))
        how = data.draw(st.sampled_from(["into", "drop", "rename"]))
        rest = {k: v for k, v in node.items() if k != key}
        return {
            "into": lambda: {**node, key: replaced(node[key], data)},
            "drop": lambda: rest,
            "rename": lambda: {**rest, data.draw(st.sampled_from(["grade", "label", "text", "titel", ""])): node[key]},
        }[how]()
    if isinstance(node, list) and node and data.draw(st.booleans()):
        i = data.draw(st.integers(0, len(node) - 1))
        return [*node[:i], replaced(node[i], data), *node[i + 1 :]]
    return data.draw(VALUES)


@pytest.mark.parametrize("name", READERS)
@HALF
@given(data=st.data())
def test_cut_and_overwritten_bytes(name: str, folder: Path, data: st.DataObject) -> None:
    valid, read = READERS[name]
    text = valid(folder)
    for _ in range(data.draw(st.integers(1, 3))):
        at, width = data.draw(st.integers(0, len(text))), data.draw(st.sampled_from([0, 0, 1, 9, len(text)]))
        text = text[:at] + data.draw(st.sampled_from(SNIPPETS) | st.binary(max_size=3)) + text[at + width :]
    path = folder / name
    path.write_bytes(text)
    outcome(read, path)


@pytest.mark.parametrize("name", [name for name in READERS if ".json" in name])
@HALF
@given(data=st.data())
def test_other_values_and_keys(name: str, folder: Path, data: st.DataObject) -> None:
    valid, read = READERS[name]
    text = valid(folder)
    text = gzip.decompress(text) if name.endswith(".gz") else text
    rows = [json.loads(line) for line in text.split(b"\n") if line]
    i = data.draw(st.integers(0, len(rows) - 1))
    rows[i] = replaced(rows[i], data)
    path = folder / name
    path.write_bytes(gzip.compress(lines(*rows)) if name.endswith(".gz") else lines(*rows))
    outcome(read, path)


@pytest.mark.parametrize("name", READERS)
def test_the_valid_file_is_read(name: str, folder: Path) -> None:
    valid, read = READERS[name]
    path = folder / name
    path.write_bytes(valid(folder))
    assert outcome(read, path) == ""


ODD_COLUMNS = [
    pa.array([1, 2]), pa.array([4.0, None]), pa.array([True, False]), pa.array([b"\xff", b"a"]), pa.nulls(2),
    pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"a"]).buffers()), pa.array([["a"], []]),
    pa.array([{"a": 1}, None]),     pa.array([2**62, 0]).view(pa.timestamp("us")), pa.array([2**62, 0]).view(pa.timestamp("ns")),
    pa.array([[("a", "x"), ("a", "y")], []], pa.map_(pa.string(), pa.string())), pa.array(["a", "b"]).dictionary_encode(),
    pa.array(["a", ""], pa.large_string()), pa.array([10**20, 1], pa.decimal128(30)), pa.array([None, 7], pa.duration("us")),
]  # fmt: skip
COLUMNS = {
    "pairs.parquet": ("example_id", "query_id", "query", "title", "fields", "gold", "truth", "tags", "grade", "label"),
    "shopping_queries_dataset_examples.parquet": (
        "example_id", "query", "query_id", "product_id", "product_locale", "esci_label",
        "small_version", "large_version", "split",
    ),
    "shopping_queries_dataset_products.parquet": (
        "product_id", "product_title", "product_description", "product_bullet_point",
        "product_brand", "product_color", "product_locale",
    ),
}  # fmt: skip
VALID_VALUES = {
    "small_version": [1, 1],
    "large_version": [1, 1],
    "product_locale": ["us", "us"],
    "esci_label": ["E", "I"],
    "label": ["E", "I"],
}


def table(name: str, odd: dict[str, Any]) -> pa.Table:
    columns = {column: pa.array(VALID_VALUES.get(column, ["1", "2"])) for column in COLUMNS[name]}
    for column in ("fields", "gold", "truth", "tags", "grade"):
        columns.pop(column, None)
    return pa.table(columns | odd)


@pytest.mark.parametrize("name", COLUMNS)
@HALF
@given(data=st.data())
def test_parquet_columns_of_any_type(name: str, folder: Path, data: st.DataObject) -> None:
    release = folder / "columns"
    release.mkdir(exist_ok=True)
    for other in COLUMNS:
        (release / other).unlink(missing_ok=True)
        if other != "pairs.parquet":
            pq.write_table(table(other, {}), release / other)
    odd = data.draw(st.dictionaries(st.sampled_from(COLUMNS[name]), st.sampled_from(ODD_COLUMNS), min_size=1, max_size=3))
    pq.write_table(table(name, odd), release / name)
    path = release / name if name == "pairs.parquet" else release
    try:
        load_examples(path, PAPER)
    except UserError as error:
        assert "\n" not in str(error) and path.name in str(error)


@given(st.text(st.sampled_from("{}!:0[].query title item lines"), max_size=20))
def test_templates(template: str) -> None:
    for make in (lambda: build_prompt(EXAMPLES[0], template), lambda: wrapped("a", template)):
        try:
            make()
        except UserError as error:
            assert "prompt" in str(error)
