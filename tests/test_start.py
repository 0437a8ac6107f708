"""`srpo.start`: from a table of pairs and a model to a judge and a report; resumed after any kill with the same files."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import srpo.start
from srpo.core.config.start import StartConfig
from srpo.core.config.train import PolicyConfig
from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.data.pairs import read_pairs
from srpo.data.readers import load_examples
from srpo.data.world import World
from srpo.experiments.start import PROMPT
from srpo.start import main

WORDS = {"L1": "Irrelevant", "L2": "Partial", "L3": "Partial", "L4": "Exact"}


@pytest.fixture
def settings(world: Any, tmp_path: Path) -> StartConfig:
    """A table with columns and grades of its own, and the small world's policy, which knows the steps."""
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["q", "name", "judgement", "brand"])
        pairs = {(pair.query, pair.title): pair for pair in World(random.randrange(1000)).examples("balanced", 160)}
        for pair in pairs.values():
            table.writerow([pair.query, pair.title, WORDS[pair.grade or ""], pair.fields.get("brand", "")])
    return StartConfig(
        data=str(tmp_path / "pairs.csv"),
        model=str(world.policy),
        run_dir=str(tmp_path / "run"),
        columns={"query": "q", "title": "name", "grade": "judgement", "fields.brand": "brand"},
        grades=Grades(labels={"Irrelevant": "L1", "Partial": "L3", "Exact": "L4"}),  # the model's own names
        prompt=PROMPT,
        num_eval=20,
        num_demonstrations=24,
        num_own=2,
        max_new_tokens=200,
        sft_steps=3,
        sft_batch=4,
        sft_lr=1e-4,
        rl_steps=2,
        num_prompts=2,
        group_size=3,
        eval_every=1,
        eval_examples=4,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """All files that do not tell the time."""
    names = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in names if p.suffix not in (".lock",) and "timing" not in p.name}


def test_from_a_table_to_a_report(settings: StartConfig, capsys: pytest.CaptureFixture[str]) -> None:
    main(settings)
    said = capsys.readouterr().out
    assert "pairs of " in said and "grades from the worst: L1 " in said and "product fields" in said
    run_dir = Path(settings.run_dir)
    report = (run_dir / "report.md").read_text()
    for row in ("always ", "regression on words", "the model as it is", "after SFT", "after SRPO", "Class 3 F1"):
        assert row in report
    results = json.loads((run_dir / "results.json").read_text())
    num_held_out = len((run_dir / "data" / "eval.jsonl").read_text().splitlines())  # a random share of random queries
    assert results["after"]["num_examples"] == min(20, num_held_out) and len(results["after"]["class_f1"]) == 4
    assert {"ndcg_expected", "auc_best"} <= results["words"]["ranking"].keys()
    queries = [line["query"] for line in map(json.loads, (run_dir / "data" / "eval.jsonl").read_text().splitlines())]
    held = set(queries)
    assert len(set(queries[: len(held)])) == len(held)  # a limit takes a pair of each query first
    trained = {line["query"] for line in map(json.loads, (run_dir / "data" / "train.jsonl").read_text().splitlines())}
    assert held and trained and not held & trained
    labels = [pair.gold for pair in load_examples(run_dir / "data" / "train.jsonl", settings.schema)]
    assert all(gold[2] and gold[3] and gold[4] for gold in labels)  # category and attribute match are read off the pair
    texts = list(read_pairs(run_dir / "demonstrations" / "sft.jsonl"))
    assert 0 < len(texts) <= 24 and all(settings.schema.parse_text(text).answers[-1] for _, text in texts)
    assert (run_dir / "rl" / "policy-best" / "model.safetensors").is_file()
    before = files_of(run_dir)
    main(settings)  # everything is done: nothing changes
    assert {name: data for name, data in files_of(run_dir).items() if "plots" not in name} == {
        name: data for name, data in before.items() if "plots" not in name
    }


def test_killed_anywhere_it_ends_with_the_same_files(settings: StartConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    main(settings)
    want = files_of(Path(settings.run_dir))
    names = ("look", "scored", "demonstrate", "sft", "train", "report", "write_pairs", "evaluate_policy", "silver_response")
    again = replace(settings, run_dir=settings.run_dir + "-again")
    for _ in range(4):
        name, after = random.choice(names), random.randint(0, 2)
        with monkeypatch.context() as patch:
            patch.setattr(srpo.start, name, killed(getattr(srpo.start, name), after))
            try:
                main(again)
            except KeyboardInterrupt:
                continue
    main(again)
    found = files_of(Path(again.run_dir))
    assert found.keys() == want.keys()
    same = {n for n in want if want[n].replace(b"run/", b"run-again/") == found[n].replace(b"run/", b"run-again/")}
    others = (".toml", ".png", ".metadata", "COMPLETE", "inputs.json")  # with paths of the folder, or random names of files
    assert want.keys() - same <= {name for name in want if name.endswith(others)}


def killed(work: Any, after: int) -> Any:
    """The function, which dies when it is called for the time after `after`, before or after its work."""
    calls = [0]
    late = random.random() < 0.5

    def dies(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > after and not late:
            raise KeyboardInterrupt
        result = work(*args, **options)
        if calls[0] > after:
            raise KeyboardInterrupt
        return result

    return dies


def test_check_only_looks(settings: StartConfig, capsys: pytest.CaptureFixture[str]) -> None:
    main(replace(settings, check=True))
    said = capsys.readouterr().out
    assert "model: Qwen3MoeForCausalLM of " in said and "SRPO: 2 steps of 2 prompts x 3 responses, learning rate 1e-05" in said
    assert not Path(settings.run_dir).exists()


def test_without_read_labels_only_the_verdict_has_a_label(settings: StartConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(srpo.start, "scored", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(replace(settings, read_labels=False))
    pairs = load_examples(Path(settings.run_dir) / "data" / "train.jsonl", settings.schema)
    assert {tuple(label is None for label in pair.gold) for pair in pairs} == {(True,) * 4 + (False,)}


def stopped(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "give judged pairs and a model: python -m srpo.start pairs.csv --model DIR"),
        ({"model": "no/such"}, "no tokenizer in 'no/such'"),
        ({"grades": Grades(("no", "yes"))}, "the grades are no, yes"),
        ({"columns": {"query": "q", "title": "nme"}}, "nme"),
        ({"policy": PolicyConfig(path="x")}, "the setting path of .policy. is set: name the model by --model alone"),
    ],
)
def test_what_cannot_work_is_one_line(settings: StartConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(replace(settings, **changes))
    assert not Path(settings.run_dir).exists()
