"""Table and plots of a training run: `python -m srpo.report RUN_DIR`.

Prints the scores before and after training and draws RUN_DIR/plots/*.png. Reads `metrics.jsonl`, `config.toml` and, if present,
`results.json`; in a folder of srpo.start the first two of its stage `rl`. Works while training goes on.
"""

from __future__ import annotations

from srpo.core.config.evaluation import ReportConfig
from srpo.core.errors import UserError
from srpo.core.settings import apply_toml, check_command_line, check_one_process, run_program

if __name__ == "__main__":
    check_command_line(ReportConfig)  # -h and mistakes answer before torch is imported

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srpo.core.config.train import Config
from srpo.core.jsonl import json_file
from srpo.core.metrics import read_metrics
from srpo.core.steps import StepSchema
from srpo.scores.evaluation import Results
from srpo.scores.plots import write_plots
from srpo.scores.tables import before_after_table


def write_report(run_dir: Path) -> tuple[str, list[Path]]:
    """(table of the scores before and after training, "" without results; files of the plots that were drawn) of a run folder.

    A folder of srpo.start has the run of its stage `rl`, and scores and plots of its own. Raises UserError for a folder without a
    run of srpo.train.
    """
    files_of_a_run = ("config.toml", "metrics.jsonl")
    stage = run_dir / "rl"
    run = run_dir if any((run_dir / name).is_file() for name in files_of_a_run) or not stage.is_dir() else stage
    for name in files_of_a_run:
        if not (run / name).is_file():
            raise UserError(f"no {name} in {run}: give the run_dir of a run of srpo.train or srpo.start that has begun to train")
    schema = apply_toml(Config(), run / "config.toml").schema
    results: Mapping[str, Results] = {}
    if (run_dir / "results.json").is_file():
        results = json_file(run_dir / "results.json")
        _check_results(run_dir / "results.json", results, schema)
    files = write_plots(run_dir / "plots", read_metrics(run / "metrics.jsonl"), schema, results, run_dir.resolve().name)
    before, after = results.get("before"), results.get("after")
    return before_after_table(before, after, schema) if before and after else "", files


def _check_results(path: Path, results: Mapping[str, Any], schema: StepSchema) -> None:
    """Raise UserError unless `before` and `after`, where they are, have the scores of `results_dict`."""
    num_grades = len(schema.grades.names)
    sizes = {"class_f1": num_grades, "step_accuracy": schema.num_steps, "confusion": num_grades}
    for name in (name for name in ("before", "after") if name in results):
        scores = results[name] if isinstance(results[name], dict) else {}
        numbers = [scores.get(key) for key in ("macro_f1", "accuracy", "good_f1", "parse_rate", "num_examples")]
        lists = [scores[key] if isinstance(scores.get(key), list) else [] for key in sizes]
        if not all(isinstance(number, (int, float)) for number in numbers) or list(map(len, lists)) != list(sizes.values()):
            raise UserError(f"{path}: {name} has not the scores of an evaluation of this run: restore the file, or remove it")


def main(config: ReportConfig) -> None:
    """Write the report of a run folder and print its table and the names of its plots."""
    check_one_process("srpo.report", "it only draws, which ranks cannot share")
    if not config.run_dir:
        raise UserError("name a run folder: python -m srpo.report runs/demo")
    table, files = write_report(Path(config.run_dir))
    print(table or "no results.json with before and after: only training curves are drawn")
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    run_program(main, ReportConfig)
