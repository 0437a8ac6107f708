"""What a run did: `python -m srpo.report RUN_DIR` prints its table and draws RUN_DIR/plots/*.png.

Reads `metrics.jsonl`, `config.toml` and, where present, `results.json`; may be run while training goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from srpo.config import Config
from srpo.evaluation import Results, score_rows
from srpo.metrics import read_metrics
from srpo.plots import write_plots
from srpo.settings import apply_toml, run_program
from srpo.steps import StepSchema


@dataclass(frozen=True)
class ReportConfig:
    """`python -m srpo.report runs/demo`"""

    run_dir: Positional[str] = ""  # a run folder: metrics.jsonl, and results.json where there is one


def before_after_table(before: Results, after: Results, schema: StepSchema) -> str:
    """The table of all scores before and after training: percent, and the change in points. "-" where a score is not known."""
    rows = [
        (name, _percent(first), _percent(last), "-" if first is None or last is None else f"{100 * (last - first):+.1f}")
        for name, (first, last) in score_rows(schema, before, after)
    ]
    return _table(("", "before", "after", "change"), rows, f"percent, {after['num_examples']:,} held-out pairs")


def results_table(results: Results, schema: StepSchema, by: str = "query_type") -> str:
    """The table of all scores in percent: a column for all pairs, and one for each value of the tag `by`."""
    columns = {"all": results, **results.get(f"by_{by}", {})}
    rows = [(name, *map(_percent, values)) for name, values in score_rows(schema, *columns.values())]
    counts = ("pairs", *(f"{part['num_examples']:,}" for part in columns.values()))
    return _table(("", *columns), [*rows, counts], "percent")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """Aligned columns: first left, others right; rules under the header, under the 7 scores of Table 1 and above the note."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "   ".join([row[0].ljust(widths[0]), *cells])

    rule = "-" * len(line(header))
    return "\n".join([line(header), rule, *map(line, rows[:7]), rule, *map(line, rows[7:]), rule, note])


def write_report(run_dir: Path) -> tuple[str, list[Path]]:
    """(the table, "" where there are no results yet; the plots that were drawn) of a run folder.

    Raises ValueError where the folder is none of a run.
    """
    for name in ("config.toml", "metrics.jsonl"):
        if not (run_dir / name).is_file():
            raise ValueError(f"no {name} in {run_dir}: give the run_dir of a run of srpo.train")
    schema = StepSchema(apply_toml(Config(), run_dir / "config.toml").steps)
    results: Mapping[str, Results] = {}
    if (run_dir / "results.json").is_file():
        results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    files = write_plots(run_dir / "plots", read_metrics(run_dir / "metrics.jsonl"), schema, results, run_dir.resolve().name)
    both = results.get("before"), results.get("after")
    return before_after_table(both[0], both[1], schema) if both[0] and both[1] else "", files


def main(config: ReportConfig) -> None:
    if not config.run_dir:
        raise ValueError("name a run folder: python -m srpo.report runs/demo")
    table, files = write_report(Path(config.run_dir))
    print(table or "no results.json with before and after: only training curves are drawn")
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    run_program(main, ReportConfig)
