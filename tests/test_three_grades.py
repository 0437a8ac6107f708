"""A scale of three grades in words, from data to report: SFT, one step of training, evaluation, comparison and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import small_world as small

import srpo.compare
import srpo.evaluate
import srpo.report
from srpo.core.batch import read_rollouts
from srpo.core.config.evaluation import CompareConfig, EvaluateConfig, ReportConfig
from srpo.core.grades import Grades
from srpo.core.settings import load
from srpo.data.pairs import read_pairs, write_pairs
from srpo.data.readers import load_examples
from srpo.sft import sft
from srpo.train import train

NAMES = ("irrelevant", "partly relevant", "relevant")
OF_PAPER = {"L1": NAMES[0], "L2": NAMES[0], "L3": NAMES[1], "L4": NAMES[2]}
GRADES = Grades(NAMES, labels={"-": NAMES[0]})


def in_words(path: Path, out: Path) -> Path:
    """The pairs with a grade in words alone; the worst one is spelled as its label."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        grade = OF_PAPER[row["gold"].pop()]
        row |= {"gold": [*row["gold"], None], "truth": [*row["truth"][:-1], grade]}
        row |= {"tags": {"query_type": row["tags"]["query_type"]}, "grade": "-" if grade == NAMES[0] else grade.upper()}
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_three_grades_in_words_from_data_to_report(world: Any, tmp_path: Path, capsys: Any) -> None:
    data, held_out = (in_words(path, tmp_path / path.name) for path in (world.train, world.eval))
    write_pairs(tmp_path / "sft.jsonl", ((p, r.replace("Verdict: ", "Verdict: ~")) for p, r in read_pairs(world.pairs)))
    text = (tmp_path / "sft.jsonl").read_text()
    for paper, name in OF_PAPER.items():
        text = text.replace(f"Verdict: ~{paper}", f"Verdict: {name}")
    (tmp_path / "sft.jsonl").write_text(text)
    start = sft(
        world.sft_config(
            tmp_path / "sft", data=str(tmp_path / "sft.jsonl"), num_steps=30, policy={"path": str(world.policy)},
            optimizer={"lr": 5e-3},
        ),
        small.ONE,
    )  # fmt: skip
    run_dir = tmp_path / "run"
    policy = train(
        world.config(
            run_dir, num_steps=1, grades=GRADES, policy={"path": str(start)}, data={"train": str(data), "eval": str(held_out)},
            train={"eval_every": 1},
        ),
        small.ONE,
    )  # fmt: skip

    (line,) = small.metrics_of(run_dir)
    assert {key for key in line if key.startswith("eval/class_f1/")} == {f"eval/class_f1/{i}" for i in (1, 2, 3)}
    rollouts = [rollout for _, rollout in read_rollouts(run_dir / "rollouts.jsonl")]
    verdicts = [r.answers[-1] for r in rollouts]
    assert set(verdicts) - {None} <= set(NAMES) and len(set(verdicts) - {None}) > 1
    schema = world.config(run_dir, grades=GRADES).schema
    labels = {e.example_id: e.grade for e in load_examples(data, schema)}
    for rollout in rollouts:
        rewards = rollout.step_rewards
        assert rewards is not None and rewards[-1] == float(rollout.answers[-1] == labels[rollout.example_id])

    # the settings of the run, its grades and its held-out pairs are found next to the checkpoint
    out = tmp_path / "evaluation"
    draws = ["--bootstrap.num-draws", "20"]
    srpo.evaluate.main(load(EvaluateConfig, ["--checkpoint", str(policy), "--out", str(out), *draws]))
    results = json.loads((out / "results.json").read_text())
    assert (len(results["class_f1"]), len(results["confusion"]), len(results["confusion"][0])) == (3, 3, 4)
    assert results["accuracy"] == line["eval/accuracy"] and results["macro_f1"] == sum(results["class_f1"]) / 3
    rows = [json.loads(text) for text in (out / "predictions.jsonl").read_text().splitlines()]
    truth = {e.example_id: e.grade for e in load_examples(held_out, schema)}
    assert {row["example_id"]: row["grade"] for row in rows} == truth
    assert results["accuracy"] == sum(row["prediction"] == row["grade"] for row in rows) / len(rows)

    right = tmp_path / "right.jsonl"
    right.write_text(
        "".join(json.dumps({"example_id": i, "prediction": 1 + NAMES.index(str(g))}) + "\n" for i, g in truth.items())
    )
    argv = ["--a", str(out), "--b", str(right), "--data", str(held_out), "--config", str(run_dir / "config.toml"), *draws]
    srpo.compare.main(load(CompareConfig, [*argv, "--out", str(tmp_path / "c.json")]))
    compared = json.loads((tmp_path / "c.json").read_text())["offline"]
    assert compared["a"]["confusion"] == results["confusion"] and compared["b"]["accuracy"] == 1.0
    assert compared["difference"]["accuracy"]["difference"] == 1.0 - results["accuracy"]

    (run_dir / "results.json").write_text(json.dumps({"before": results, "after": results}))
    capsys.readouterr()
    srpo.report.main(ReportConfig(str(run_dir)))
    shown = capsys.readouterr().out
    assert all(f"Class {name} F1" in shown for name in NAMES)
    assert (run_dir / "plots" / "confusion.png").is_file() and (run_dir / "plots" / "overview.png").is_file()
