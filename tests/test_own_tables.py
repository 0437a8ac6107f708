"""A CSV with columns of its own in every program, and queries held out of it: the same as our schema in two files."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import select_cases as cases
import small_world as small

import srpo.compare
import srpo.dpo
import srpo.evaluate
from srpo.core.config.dpo import DpoConfig
from srpo.core.config.evaluation import CompareConfig, EvaluateConfig
from srpo.core.config.judge import JudgeConfig
from srpo.core.config.train import Config, DataConfig, StageConfig
from srpo.core.errors import UserError
from srpo.core.metrics import read_metrics
from srpo.core.settings import dump_toml, load
from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.data.readers import load_examples, load_parts, write_examples
from srpo.judge_training.inputs import prepare
from srpo.select import out_dir, records_dir, run
from srpo.train import train
from srpo.training.checks import check_settings

GOLD_AND_TRUTH = {f"{kind}.{name}": f"{kind} of {name}" for kind in ("gold", "truth") for name in PAPER.names}
COLUMNS = {"example_id": "id", "query_id": "qid", "query": "q", "title": "name", "tags.query_type": "kind", **GOLD_AND_TRUTH}
FLAGS = ["--columns", "query=q", "title=name", "label=judgement", "item_id=sku"]


def as_csv(path: Path, examples: list[Example]) -> dict[str, str]:
    """Write examples with columns of other names, and return the mapping back."""
    names = list(dict.fromkeys(name for example in examples for name in example.fields))
    columns = COLUMNS | {f"fields.{name}": f"the {name}" for name in names}
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(columns.values())
        for e in examples:
            head = [e.example_id, e.query_id, e.query, e.title, e.tags.get("query_type", "")]
            out.writerow([*head, *e.gold, *e.truth, *(e.fields.get(name, "") for name in names)])
    return columns


def test_a_run_on_a_csv_is_the_run_on_our_files(world: Any, tmp_path: Path) -> None:
    """Same columns, same held-out queries: same numbers as two JSON Lines files, and evaluation finds the held-out part."""
    examples = load_examples(world.train, PAPER)
    columns = as_csv(tmp_path / "pairs.csv", examples)
    assert [replace(e, tags={}) for e in load_examples(tmp_path / "pairs.csv", PAPER, columns=columns)] == [
        replace(e, tags={}) for e in examples
    ]
    ours, held_out = load_parts(world.train, PAPER, 0.25)
    files = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    for file, part in zip(files, (ours, held_out), strict=True):
        write_examples(file, part)
    changes = {"num_steps": 1, "train": {"eval_every": 1}}
    data: dict[str, Any] = {"train": str(tmp_path / "pairs.csv"), "columns": columns, "eval_frac": 0.25}
    train(world.config(tmp_path / "csv", data=data, **changes), small.ONE)
    train(world.config(tmp_path / "ours", data=dict(zip(("train", "eval"), map(str, files), strict=True)), **changes), small.ONE)
    (line,), other = (list(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("csv", "ours"))
    assert line["eval/num_examples"] == len(held_out) and [line] == other
    digests = [json.loads((tmp_path / name / "inputs.json").read_text()) for name in ("csv", "ours")]
    assert digests[0].keys() == digests[1].keys() >= {"the training data", "the evaluation data"}

    resumed = world.config(tmp_path / "csv", data=data, **changes)
    as_csv(tmp_path / "pairs.csv", examples[:-1])
    with pytest.raises(UserError, match=r"data at .*pairs\.csv is not the one that .* was started with"):
        train(resumed, small.ONE)

    as_csv(tmp_path / "pairs.csv", examples)
    predictions = tmp_path / "csv" / "predictions.jsonl"
    predictions.write_text("".join(json.dumps({"example_id": e.example_id, "prediction": "L4"}) + "\n" for e in held_out))
    srpo.evaluate.main(load(EvaluateConfig, ["--predictions", str(predictions), "--bootstrap.num-draws", "0"]))
    assert json.loads((tmp_path / "csv" / "evaluation" / "results.json").read_text())["num_examples"] == len(held_out)


def test_selection_leaves_the_held_out_queries_alone(tmp_path: Path) -> None:
    columns = as_csv(tmp_path / "pairs.csv", cases.EXAMPLES)
    ours, held_out = load_parts(tmp_path / "pairs.csv", PAPER, 0.3, columns)
    assert held_out
    data = DataConfig(str(tmp_path / "pairs.csv"), prompt=cases.TEMPLATE, columns=columns, eval_frac=0.3)
    cfg, engine = replace(cases.config(tmp_path), data=data), cases.Scripted()
    assert run(cfg, cases.ONE, cases.parts_with(engine)) is not None
    assert set(engine.sampled) == {e.example_id for e in ours}
    assert {e.example_id for e in load_examples(out_dir(cfg) / "selected.parquet", PAPER)} <= {e.example_id for e in ours}
    assert load_examples(records_dir(cfg) / "held_out.parquet", PAPER) == held_out


def judged_csv(path: Path) -> list[str]:
    """A CSV without example_ids; their ids as srpo makes them from query_id and sku."""
    rows = [[f"query {i // 2}", f"item {i}", f"s{i}", str(1 + i % 4)] for i in range(12)]
    random.Random().shuffle(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=";").writerows([["q", "name", "sku", "judgement"], *rows])
    return [e.example_id for e in load_examples(path, PAPER, columns=dict(flag.split("=") for flag in FLAGS[1:]))]


def test_evaluate_and_compare_take_columns_of_their_own(tmp_path: Path) -> None:
    ids = judged_csv(tmp_path / "pairs.csv")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"example_id": i, "prediction": 4}) + "\n" for i in ids))
    # The run has another mapping, which the flag replaces and the first call needs
    (tmp_path / "run.toml").write_text(dump_toml(Config(data=DataConfig(columns={"query": "other"}))))
    common = ["--data", str(tmp_path / "pairs.csv"), "--config", str(tmp_path / "run.toml"), "--bootstrap.num-draws", "0"]
    arguments = ["--predictions", str(tmp_path / "p.jsonl"), *common]
    with pytest.raises(UserError, match=r"no column 'other' \(columns query=other\)"):
        srpo.evaluate.main(load(EvaluateConfig, arguments))
    srpo.evaluate.main(load(EvaluateConfig, [*arguments, *FLAGS]))
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["num_examples"] == 12 and results["accuracy"] == 0.25
    both = ["--a", str(tmp_path / "p.jsonl"), "--b", str(tmp_path / "p.jsonl"), *common]
    with pytest.raises(UserError, match=r"no column 'other'"):
        srpo.compare.main(load(CompareConfig, both))
    srpo.compare.main(load(CompareConfig, [*both, *FLAGS]))
    assert (tmp_path / "comparison.json").exists()


def test_dpo_and_the_judge_take_columns(tmp_path: Path) -> None:
    ids = judged_csv(tmp_path / "pairs.csv")
    judgments = [{"example_id": i, "response": "1. Query intent: x", "verdicts": [True, False, None, True, False]} for i in ids]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judgments))
    common = ["--data", str(tmp_path / "pairs.csv"), *FLAGS]
    options = ["--judgments", str(tmp_path / "judged.jsonl"), "--mine.balance", "--held-out", "3"]
    work = prepare(load(JudgeConfig, [*common, *options]), small.ONE)
    assert set(work.examples) == set(ids) and work.shown and work.held_out
    (tmp_path / "rollouts.jsonl").write_text("")
    for columns, message in (([], "no column 'query'"), (FLAGS, r"rollouts\.jsonl has no rollouts")):
        cfg = load(DpoConfig, ["--rollouts", str(tmp_path / "rollouts.jsonl"), *common[:2], *columns])
        with pytest.raises(UserError, match=message):
            srpo.dpo.load_preferences(cfg, None)
    with pytest.raises(UserError, match="columns is set, but data is not"):
        srpo.dpo._check_settings(load(DpoConfig, ["--rollouts", "x", *FLAGS]))


def test_the_mapping_of_a_toml_file_is_that_of_the_flags(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[data]\neval_frac = 0.1\n[data.columns]\nquery = "q"\n"fields.brand" = "Brand name"\n')
    from_file = load(Config, ["@", str(tmp_path / "a.toml")])
    assert from_file == load(Config, ["--data.eval-frac", "0.1", "--data.columns", "query=q", "fields.brand=Brand name"])
    (tmp_path / "b.toml").write_text(dump_toml(from_file))
    assert load(Config, ["@", str(tmp_path / "b.toml")]) == from_file
    reset = load(Config, ["@", str(tmp_path / "b.toml"), "--data.columns", "--data.eval-frac", "0"])
    assert reset == Config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig("a", "b", eval_frac=0.1)}, r"data\.eval_frac is 0\.1 and data\.eval 'b': set one of them"),
        (
            {"curriculum": (StageConfig("easy", data="c", num_steps=2), StageConfig("hard"))},
            r"data\.eval_frac is 0\.1, but curriculum stage 'easy' has data of its own",
        ),
        ({"data": DataConfig("a", eval_frac=1.0)}, r"data\.eval_frac is 1\.0"),
    ],
)
def test_settings_of_held_out_queries_that_contradict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(replace(Config(data=DataConfig("a", eval_frac=0.1), num_steps=9), **changes))
