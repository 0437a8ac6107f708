"""Summary of a table: mean and standard deviation over seeds next to the paper's numbers, and the order of the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from srpo.core.tables import text_table
from srpo.experiments.tables import CLASSES, STEPS, Table


def scores_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The columns of Tables 1 to 9 from the results of an evaluation, in percent."""
    fractions = {name: results[name] for name in ("good_f1", "accuracy", "macro_f1")}
    fractions |= dict(zip(CLASSES, results["class_f1"], strict=True))
    return {name: 100 * float(value) for name, value in fractions.items()}


def judge_scores_of(stage: Mapping[str, Any]) -> dict[str, float]:
    """The columns of Table 2 from one stage of `judge.json`, in percent."""
    steps = list(stage["steps"].values())[: len(STEPS)]
    return {name: 100 * float(step["agreement"]) for name, step in zip(STEPS, steps, strict=True)}


def summarize(table: Table, scores: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Rows with the paper's numbers and ours, and the `order` of the rows.

    scores: for each row and each seed, {column: percent}. Ours are the values per seed, their mean, and their sample standard
    deviation `std` (0 for one seed).
    """
    rows = []
    for row, by_seed in zip(table.rows, scores, strict=True):
        ours = {}
        for column in table.columns:
            values = [seed[column] for seed in by_seed]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            ours[column] = {"mean": float(np.mean(values)), "std": spread, "values": values}
        paper = dict(zip(table.columns, row.paper, strict=True)) if row.paper else None
        rows.append({"name": row.name, "recipe": row.recipe, "paper": paper, "ours": ours})
    return {"rows": rows, "order": order(rows, table.columns[-1])}


def order(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, Any]:
    """Whether each two rows that differ in `column` in the paper differ the same way here.

    The rows of a seed share data and starting checkpoint, so rows are compared seed by seed. `margin` is twice the standard error
    of the mean difference over seeds; a difference beyond it has the verdict `agree` if its sign is the paper's, else `oppose`;
    a difference within it is `undecided`.
    """
    pairs = []
    for first, second in combinations([row for row in rows if row["paper"]], 2):
        printed = second["paper"][column] - first["paper"][column]
        if printed == 0:
            continue
        gaps = np.subtract(second["ours"][column]["values"], first["ours"][column]["values"])
        mean = float(gaps.mean())
        margin = 2 * float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
        verdict = "undecided" if abs(mean) <= margin else "agree" if mean * printed > 0 else "oppose"
        names = {"first": first["name"], "second": second["name"]}
        pairs.append({**names, "paper": printed, "ours": mean, "margin": margin, "verdict": verdict})
    counts = {verdict: sum(pair["verdict"] == verdict for pair in pairs) for verdict in ("agree", "undecided", "oppose")}
    return {"column": column, **counts, "same_order": all(p["ours"] * p["paper"] > 0 for p in pairs), "pairs": pairs}


def table_text(table: Table, summary: Mapping[str, Any], num_seeds: int) -> str:
    """The table as text: the paper's numbers next to our mean and standard deviation, and the order of the rows."""
    header = [""]
    for column in table.columns:
        header += [f"{column} paper", "ours"]
    lines = []
    for row in summary["rows"]:
        cells = [row["name"]]
        for column in table.columns:
            ours = row["ours"][column]
            cells.append("-" if row["paper"] is None else f"{row['paper'][column]:.2f}")
            cells.append(f"{ours['mean']:.1f} +-{ours['std']:.1f}")
        lines.append(cells)
    rows_order = summary["order"]
    notes = [
        f"percent; ours: mean and standard deviation of {num_seeds} seeds, test set: {table.test_set}",
        f"order by {rows_order['column']}, pairs of rows: {rows_order['agree']} as in the paper, "
        f"{rows_order['oppose']} the other way round, {rows_order['undecided']} within twice the standard error",
    ]
    return table.title + "\n" + text_table(header, [lines], [*notes, table.note] if table.note else notes)


def headline(
    curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], tests: Mapping[str, Sequence[float]], reference: str = "grpo"
) -> dict[str, Any]:
    """Compare each other recipe with `reference`: gaps in macro F1, and the responses it needs to reach the reference's end.

    curves: recipe -> per seed [(responses sampled, macro F1 on some pairs)]; the end of a curve is the mean of its last three
    points. tests: recipe -> per seed, macro F1 of the last policy on the whole test set.

    `responses` is the number of responses at which a curve first reaches the end of the reference, and `share` divides it by all
    responses of the reference; both are None if the curve never does. `margin` is twice the standard error of `test_gap_mean`
    over seeds; recipes are compared seed by seed, because those of a seed share data and starting checkpoint.
    """
    ends = {name: [float(np.mean([f1 for _, f1 in curve[-3:]])) for curve in by_seed] for name, by_seed in curves.items()}
    rivals = {}
    for name in (name for name in curves if name != reference):
        seeds = []
        for i, (ours, theirs) in enumerate(zip(curves[name], curves[reference], strict=True)):
            reached = next((num for num, f1 in ours if f1 >= ends[reference][i]), None)
            share = None if reached is None else reached / theirs[-1][0]
            seeds.append({"end": ends[name][i], "test": tests[name][i], "responses": reached, "share": share})
        gaps = np.subtract(ends[name], ends[reference])
        test_gaps = np.subtract(tests[name], tests[reference])
        several = len(gaps) > 1
        rivals[name] = {
            "per_seed": seeds,
            "gap_mean": float(gaps.mean()),
            "gap_std": float(gaps.std(ddof=1)) if several else 0.0,
            "test_gap_mean": float(test_gaps.mean()),
            "margin": 2 * float(test_gaps.std(ddof=1)) / math.sqrt(len(gaps)) if several else math.inf,
        }
    return {
        "reference": reference,
        "per_seed": [{"end": end, "test": test} for end, test in zip(ends[reference], tests[reference], strict=True)],
        "rivals": rivals,
        "curves": {name: [list(map(list, curve)) for curve in by_seed] for name, by_seed in curves.items()},
    }
