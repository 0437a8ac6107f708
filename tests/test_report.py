from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judged_pairs import verdict_results

from srpo.core.config.evaluation import ReportConfig
from srpo.core.config.train import Config
from srpo.core.errors import UserError
from srpo.core.grades import PAPER_GRADES
from srpo.core.settings import dump_toml
from srpo.core.step_presets import PAPER, StepsConfig
from srpo.core.steps import StepSpec
from srpo.report import main, write_report
from srpo.scores.tables import before_after_table, results_table

SCHEMA = PAPER


def results(pred: list[int | None], steps: list[float | None], **more: Any) -> dict[str, Any]:
    scores = verdict_results([1, 2, 3, 4], pred)
    return {**scores, "step_accuracy": steps, "parse_rate": 0.75, "num_examples": 1234, **more}


BEFORE = results([1, 1, 1, 4], [None, 0.5, 0.25, 1.0, 0.5])
AFTER = results([1, 2, 1, 4], [0.125, 0.5, 0.75, 0.9, 0.75])


def cells(table: str) -> dict[str, list[str]]:
    names = sorted(
        ("Class 1 F1", "Good F1", "Macro F1", "Accuracy", "S1 query intent", "S3 category match", "S4 attribute match")
    )
    return {name: line.removeprefix(name).split() for line in table.splitlines() for name in names if line.startswith(name)}


def test_before_after_table_shows_percent_and_points():
    table = cells(before_after_table(BEFORE, AFTER, SCHEMA))
    assert table["Class 1 F1"] == ["50.0", "66.7", "+16.7"]
    assert table["Accuracy"] == ["50.0", "75.0", "+25.0"]
    assert table["Good F1"] == ["66.7", "66.7", "+0.0"]
    assert table["S1 query intent"] == ["-", "12.5", "-"]
    assert table["S4 attribute match"] == ["100.0", "90.0", "-10.0"]


def sure(of: dict[str, Any], width: float = 0.05) -> dict[str, Any]:
    """The results with intervals of +-width around every score."""

    def around(value: Any) -> Any:
        if isinstance(value, list):
            return [around(item) for item in value]
        return None if value is None else [value - width, value + width]

    shares = {key: around(value) for key, value in CONSISTENCY.items()}
    keys = ("macro_f1", "accuracy", "good_f1", "class_f1", "step_accuracy", "parse_rate")
    confidence = {"level": 0.9, "num_draws": 500, "seed": 0, "num_queries": 321, **{key: around(of[key]) for key in keys}}
    consistency = {**CONSISTENCY, "num_examples": 1000, "num_fully_checked": 900}
    return {**of, "consistency": consistency, "confidence": {**confidence, "consistency": shares}}


CONSISTENCY = {
    "verdict_right_steps_right": 0.5,
    "verdict_right_steps_wrong": 0.2,
    "verdict_wrong_steps_right": 0.1,
    "verdict_wrong_steps_wrong": 0.2,
}


def test_tables_are_aligned_and_count_pairs():
    parts = {"by": {"query_type": {"negation": BEFORE, "plain": AFTER}}}
    for table in (before_after_table(BEFORE, AFTER, SCHEMA), results_table({**AFTER, **parts}, SCHEMA)):
        lines = table.splitlines()
        rule = max(i for i, line in enumerate(lines) if set(line) == {"-"})
        assert len({len(line) for line in lines[: rule + 1]}) == 1, table
        assert "1,234" in table


def test_results_table_has_a_column_for_each_value_of_each_tag():
    by = {"query_type": {"negation": BEFORE, "plain": AFTER}, "domain": {"plain": BEFORE}}
    lines = results_table({**AFTER, "by": by, "untagged": {"query_type": 7, "domain": 0}}, SCHEMA).splitlines()
    assert lines[0].split() == ["all", "negation", "plain", "domain", "plain"]
    assert cells("\n".join(lines))["Accuracy"] == ["75.0", "50.0", "75.0", "50.0"]
    assert lines[-1] == "7 pairs have no tag query_type"
    assert results_table(AFTER, SCHEMA).splitlines()[0].split() == ["all"]


def test_tables_show_intervals_and_consistency_where_there_are_any():
    table = before_after_table(BEFORE, sure(AFTER), SCHEMA)
    rows = cells(table)
    assert rows["Class 1 F1"] == ["50.0", "66.7", "[61.7", "71.7]", "+16.7"]
    assert rows["S1 query intent"] == ["-", "12.5", "[7.5", "17.5]", "-"]
    shares = [line.split() for line in table.splitlines() if line.startswith(("Verdict, steps", "Only verdict"))]
    assert [row[3:] for row in shares] == [["-", "50.0", "[45.0", "55.0]", "-"], ["-", "20.0", "[15.0", "25.0]", "-"]]
    assert table.endswith("1,234 held-out pairs; in brackets 90 % intervals from 500 draws of 321 queries")
    assert cells(before_after_table(sure(BEFORE), sure(AFTER), SCHEMA))["Accuracy"][-1] == "+25.0"


@pytest.mark.parametrize("num_values", [5, 6, 12])
def test_tables_with_intervals_stay_within_130_columns(num_values: int):
    by = {"query_type": {f"alternative{i}": sure(BEFORE) for i in range(num_values)}}
    table = results_table({**sure(AFTER), "by": by, "untagged": {}}, SCHEMA)
    assert max(map(len, table.splitlines())) <= 130
    assert table.count("Macro F1") == -(-(num_values + 1) // 6)
    assert table.count("[") == (num_values + 1) * 17 - num_values  # S1 is not known before
    assert "consistency: over the 1,000 pairs" in table


def test_report_of_a_run_folder_follows_its_own_steps(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    steps = (StepSpec("colour", "colour:"), StepSpec("verdict", "verdict:", options=PAPER_GRADES, sources=("gold",), reward=1.0))
    (run_dir / "config.toml").write_text(dump_toml(replace(Config(), steps=StepsConfig.of(steps))))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "reward/step/colour": 0.1, "policy/entropy": 0.5}\n{"step": 2, "rew')
    table, files = write_report(run_dir)
    assert table == ""
    assert {file.stem for file in files} == {"overview", "rewards", "macro_f1", "entropy", "mismatch_kl"}
    both = {"before": results([1, 1, 1, 4], [0.5, None]), "after": results([1, 2, 1, 4], [0.75, 0.75])}
    (run_dir / "results.json").write_text(json.dumps(both))
    table, files = write_report(run_dir)
    assert "S1 colour" in table
    assert run_dir / "plots" / "confusion.png" in files
    assert all(file.is_file() for file in files)
    begun = tmp_path / "start"  # a folder of srpo.start: the run is its stage rl, scores and plots are its own
    (begun / "rl").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"no config\.toml in .*rl: give the run_dir of a run of srpo\.train or srpo\.start that has"
    ):
        write_report(begun)
    for name, folder in (("config.toml", begun / "rl"), ("metrics.jsonl", begun / "rl"), ("results.json", begun)):
        (run_dir / name).rename(folder / name)
    again, drawn = write_report(begun)
    assert again == table
    assert [file.relative_to(begun) for file in drawn] == [file.relative_to(run_dir) for file in files]


@pytest.mark.parametrize("before", [{}, [], "x", 3, {"macro_f1": "x", "num_examples": 4}, {"macro_f1": 0.5}])
def test_results_without_scores_are_one_line(before: object, tmp_path: Path):
    (tmp_path / "config.toml").write_text(dump_toml(Config()))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "policy/entropy": 0.5}\n')
    (tmp_path / "results.json").write_text(json.dumps({"before": before, "after": before}))
    with pytest.raises(UserError, match=r"results\.json: before has not the scores .*: restore the file, or remove it"):
        write_report(tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no config\.toml"):
        main(ReportConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="name a run folder"):
        main(ReportConfig())


def test_one_of_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"start srpo\.report without torchrun: it only draws"):
        main(ReportConfig(str(tmp_path)))
