from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judged_pairs import random_examples, random_rollouts

from srpo.compare import main
from srpo.core.batch import write_rollouts
from srpo.core.config.evaluation import BootstrapConfig, CompareConfig
from srpo.core.errors import UserError
from srpo.core.settings import load
from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.data.readers import write_examples
from srpo.scores.evaluation import results_dict
from srpo.scores.paired import compare_systems

SCHEMA = PAPER
DRAWS = ["--bootstrap.num-draws", "50"]


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Any]:
    """Graded pairs in a file, and the responses of two systems: folder `a` of an evaluation, and file `b`."""
    rng = random.Random(3)
    examples = [replace(e, query="q", title="t") for e in random_examples(rng, 40, 8)]
    a, b = (random_rollouts(rng, examples) for _ in range(2))
    write_examples(tmp_path / "d.jsonl", examples)
    (tmp_path / "a").mkdir()
    write_rollouts(tmp_path / "a" / "rollouts.jsonl", a[::-1], step=0)
    write_rollouts(tmp_path / "b.jsonl", [*b, replace(b[0], example_id="elsewhere")], step=0)
    names = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b.jsonl"), "data": str(tmp_path / "d.jsonl")}
    return {"examples": examples, "rollouts": (a, b), **names}


def run(tmp_path: Path, *argv: str) -> dict[str, Any]:
    out = tmp_path / "made" / "c.json"
    main(load(CompareConfig, [*argv, "--out", str(out), *DRAWS]))
    return json.loads(out.read_text())


def test_program_compares_responses_to_the_same_pairs(tmp_path: Path, two: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    results = run(tmp_path, "--a", two["a"], "--b", two["b"], "--data", two["data"], "--name-a", "SFT", "--name-b", "SRPO")
    options: dict[str, Any] = {"bootstrap": BootstrapConfig(num_draws=50)}
    a, b = two["rollouts"]
    expected = compare_systems(a, b, two["examples"], SCHEMA, **options)
    expected |= {key: results_dict(r, two["examples"], SCHEMA, **options) for key, r in (("a", a), ("b", b))}
    assert results["offline"] == json.loads(json.dumps(expected))
    assert results["names"] == {"a": "SFT", "b": "SRPO"}
    assert "online" not in results
    shown = capsys.readouterr().out
    assert "SRPO: left out 1 rollouts of pairs that are not compared" in shown
    change = expected["difference"]["macro_f1"]
    low, high = (f"{100 * end:+.1f}" for end in change["interval"])
    lines = {line[:20].strip(): line.split() for line in shown.splitlines()}
    assert lines["Macro F1"][2:] == [
        f"{100 * expected['a']['macro_f1']:.1f}",
        f"{100 * expected['b']['macro_f1']:.1f}",
        f"{100 * change['difference']:+.1f}",
        f"[{low}",
        f"{high}]",
        f"{100 * change['b_higher_frac']:.1f}",
    ]
    assert lines["Neither right"] and "\nnegation " in shown
    assert f"McNemar's exact test: p = {expected['mcnemar']['p_value']:.2g}" in shown
    assert max(map(len, shown.splitlines()[2:-1])) <= 130


@pytest.mark.parametrize("kind", ["rollouts", "predictions"])
def test_a_limit_holds_for_both_systems(tmp_path: Path, two: dict[str, Any], kind: str):
    examples, (a, b) = two["examples"], two["rollouts"]
    if kind == "predictions":
        rows = [{"example_id": r.example_id, "prediction": r.answers[-1]} for r in b]
        two["b"] = written(tmp_path / "predictions.jsonl", *rows)
    results = run(tmp_path, "--a", two["a"], "--b", two["b"], "--data", two["data"], "--limit", "17")
    options: dict[str, Any] = {"bootstrap": BootstrapConfig(num_draws=50)}
    expected = compare_systems(a[:17], b[:17], examples[:17], SCHEMA, **options)
    offline = results["offline"]
    assert (offline["num_examples"], offline["a"]["num_examples"], offline["b"]["num_examples"]) == (17, 17, 17)
    assert offline["mcnemar"] == json.loads(json.dumps(expected["mcnemar"]))
    with pytest.raises(UserError, match="limit is 17, but only pairs are limited"):
        run(tmp_path, "--pages.file", written(tmp_path / "pages.jsonl", {}), "--limit", "17")


def test_one_of_several_processes_is_refused(tmp_path: Path, two: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"start srpo\.compare without torchrun: it only counts"):
        run(tmp_path, "--a", two["a"], "--b", two["b"], "--data", two["data"])
    assert not (tmp_path / "made").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun with one process
    assert run(tmp_path, "--a", two["a"], "--b", two["b"], "--data", two["data"])["offline"]


def test_verdicts_alone_are_compared_with_the_verdicts_of_responses(tmp_path: Path, two: dict[str, Any]):
    rows = [{"example_id": r.example_id, "prediction": r.answers[-1]} for r in two["rollouts"][1]]
    alone = run(tmp_path, "--a", two["a"], "--b", written(tmp_path / "p.jsonl", *rows), "--data", two["data"])["offline"]
    full = run(tmp_path, "--a", two["a"], "--b", two["b"], "--data", two["data"])["offline"]
    for key in ("macro_f1", "accuracy", "good_f1", "class_f1"):
        assert alone["difference"][key] == full["difference"][key]
    assert len(alone["difference"]["step_accuracy"]) == 1
    assert alone["mcnemar"] == full["mcnemar"]


def test_program_compares_ranked_lists_by_people_and_by_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    grades = {"q1": [4, 3, 1], "q2": [4, 2, 1], "q3": [1, 1, 1]}
    judgments = [
        {"query_id": q, "item_id": f"i{k}", "grade": grade} for q, classes in grades.items() for k, grade in enumerate(classes)
    ]
    best = {"A": ["i2", "i0"], "B": ["i0", "i1"]}  # shares of class 3 or 4: A 1/2, 1/2, 0; B 1, 1/2, 0
    pages = [
        {"system": name, "query_id": q, "item_ids": ids, "tags": {"query_type": "negation" if q == "q1" else "plain"}}
        for q in grades
        for name, ids in best.items()
    ]
    argv = ["--pages.judgments", written(tmp_path / "j.jsonl", *judgments), "--pages.top-n", "2"]
    online = run(tmp_path, "--pages.file", written(tmp_path / "p.jsonl", *pages), *argv)["online"]
    assert online["item_goodrate"]["a"] == pytest.approx(1 / 3)
    assert online["item_goodrate"]["b"] == pytest.approx(0.5)
    assert (online["query_goodrate"]["a"], online["query_goodrate"]["b"]) == (0, pytest.approx(1 / 3))
    assert online["gsb"]["gsb"] == pytest.approx(2 / 3)  # mean classes: 2.5 to 3.5, 2.5 to 3, 1 to 1
    assert online["by"]["query_type"]["negation"]["item_goodrate"]["difference"] == 0.5
    assert online["num_unjudged"] == 0
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert lines["negation"] == ["negation", "1", "+100.0", "0.0", "100.0", "+100.0", "50.0", "100.0", "+50.0"]

    verdicts = written(tmp_path / "v.jsonl", *({"query_id": q, "verdict": v} for q, v in (("q1", "bad"), ("q2", "same"))))
    rated = [{**page, "rating": "good" if page["system"] == "A" else "poor"} for page in pages]
    people = run(tmp_path, "--pages.file", written(tmp_path / "r.jsonl", *rated), *argv, "--pages.verdicts", verdicts)["online"]
    assert people["gsb"]["gsb"] == -0.5 and people["gsb"]["num_comparisons"] == 2
    assert people["query_goodrate"]["difference"] == -1.0
    assert people["item_goodrate"] == online["item_goodrate"]
    assert "2 comparisons: 0.0 good, 50.0 same, 50.0 bad (people)" in capsys.readouterr().out

    few = ["--pages.judgments", written(tmp_path / "few.jsonl", *(j for j in judgments if j["item_id"] != "i2"))]
    left = run(tmp_path, "--pages.file", str(tmp_path / "p.jsonl"), *few, "--pages.unjudged", "leave_out")["online"]
    assert left["num_unjudged"] == 3
    assert left["item_goodrate"]["a"] == pytest.approx(2 / 3)
    assert "3 shown items have no class and are left out" in capsys.readouterr().out


def test_lists_of_examples_are_judged_by_their_grades(tmp_path: Path):
    examples = [
        Example(
            f"e{i}", f"q{i % 2}", "q", "t", gold=(None,) * 4 + (f"L{grade}",), truth=(None,) * 5, tags={"query_type": f"t{i % 2}"}
        )
        for i, grade in enumerate((4, 1, 1, 3))
    ]
    write_examples(tmp_path / "d.jsonl", examples)
    lists = {("A", "q0"): ["e2"], ("B", "q0"): ["e0"], ("A", "q1"): ["e1", "e3"], ("B", "q1"): ["e3"]}
    pages = written(tmp_path / "p.jsonl", *({"system": s, "query_id": q, "example_ids": ids} for (s, q), ids in lists.items()))
    online = run(tmp_path, "--pages.file", pages, "--data", str(tmp_path / "d.jsonl"))["online"]
    assert (online["item_goodrate"]["a"], online["item_goodrate"]["b"]) == (0.25, 1.0)
    assert online["by"]["query_type"]["t1"]["item_goodrate"]["difference"] == 0.5
    with pytest.raises(ValueError, match="lists example_ids: their classes are the grades of --data"):
        run(tmp_path, "--pages.file", pages)


def test_what_is_compared_is_not_replaced(two: dict[str, Any]):
    files = {Path(two["data"]), Path(two["b"]), Path(two["a"]) / "rollouts.jsonl"}
    before = {file: file.read_bytes() for file in files}
    for file in files:
        with pytest.raises(ValueError, match=f"out is {file}, which is read and would be replaced"):
            main(load(CompareConfig, ["--a", two["a"], "--b", two["b"], "--data", two["data"], "--out", str(file), *DRAWS]))
    assert {file: file.read_bytes() for file in files} == before


def test_only_an_earlier_comparison_is_replaced(two: dict[str, Any], tmp_path: Path):
    argv = ["--a", two["a"], "--b", two["b"], "--data", two["data"], *DRAWS]
    for text in ("{}", '{"names": ["a", "b"]}', "x", ""):
        (other := tmp_path / "results.json").write_text(text)
        with pytest.raises(UserError, match=f"out is {other}, which exists and is no result of srpo.compare"):
            main(load(CompareConfig, [*argv, "--out", str(other)]))
        assert other.read_text() == text
    for _ in range(2):
        main(load(CompareConfig, [*argv, "--out", str(tmp_path / "own.json")]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give two systems"),
        (["--a", "A"], "give two systems"),
        (["--a", "A", "--b", "B"], "no data"),
        (["--a", "A", "--b", "no/such", "--data", "D"], "no such file or folder: no/such"),
        (["--a", "A", "--b", "B", "--data", "D", "--name-a", "B"], "both systems are called 'B'"),
        (["--a", "A", "--b", "B", "--data", "D", "--pages.verdicts", "B"], "pages.verdicts is set without pages.file"),
        (["--a", "A", "--b", "B", "--data", "D", "--by", "colour"], "nothing carries the tag 'colour'"),
        (["--a", "A", "--b", "SHORT", "--data", "D"], "39 of 40 examples have no prediction"),
        (["--a", "A", "--b", "TWICE", "--data", "D"], "several rollouts of e0"),
        (["--a", "A", "--b", "B", "--data", "UNGRADED"], "e0 has no grade"),
        (["--pages.file", "LISTS"], "lists item_ids: give their classes with --pages.judgments"),
        (["--pages.file", "LISTS", "--pages.judgments", "JUDGED", "--by", "shop"], "nothing carries the tag 'shop'"),
    ],
)
def test_program_says_what_is_wrong_and_writes_nothing(tmp_path: Path, two: dict[str, Any], argv: list[str], message: str):
    a, _ = two["rollouts"]
    names = {
        "A": two["a"],
        "B": two["b"],
        "D": two["data"],
        "SHORT": written(tmp_path / "s", {"example_id": "e0", "prediction": 1}),
    }
    write_rollouts(tmp_path / "twice.jsonl", [*a, a[0]], step=0)
    write_examples(tmp_path / "ungraded.jsonl", [replace(e, gold=(*e.gold[:4], None)) for e in two["examples"]])
    names |= {"TWICE": str(tmp_path / "twice.jsonl"), "UNGRADED": str(tmp_path / "ungraded.jsonl")}
    lists = ({"system": s, "query_id": "q", "item_ids": ["i"]} for s in "AB")
    judged = written(tmp_path / "judged", {"query_id": "q", "item_id": "i", "grade": 1})
    names |= {"LISTS": written(tmp_path / "lists", *lists), "JUDGED": judged}
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *(names.get(word, word) if i and argv[i - 1] != "--name-a" else word for i, word in enumerate(argv)))
    assert not (tmp_path / "made").exists()
