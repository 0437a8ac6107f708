"""Tables, plot and example responses of `make demo-real`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from demo_real.plan import Part, Sizes, name_of
from srpo.core.files import whole_file
from srpo.core.tables import text_table
from srpo.scores.plots import COLORS, FAINT, STYLE

ARMS = {"as_it_is": "the model as it is", "sft": "after SFT", "grpo": "after GRPO", "srpo": "after SRPO"}
TRAINED = {"sft", "grpo", "srpo"}
ALL = ", all weights"
SCORES = ("accuracy", "macro_f1")
COLUMNS = {  # of the table: a key of `rows`, and how its sign is shown
    "accuracy": ("accuracy", ""),
    "macro F1": ("macro_f1", ""),
    "over best regression": ("gain", "+"),
    "over SFT": ("over_sft", "+"),
    "S3 right": ("S3", ""),
}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %, by the number


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """`mean`, the `values`, and the half width of its 95 % interval by Student's t (None for a single value)."""
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) in STUDENT else None
    return {"mean": statistics.mean(values), "half": half, "values": list(values)}


def summarize(results: Mapping[Part, Mapping[str, Any]], data: str) -> dict[str, Any]:
    """The summary of a file of pairs, in percent: `rows` {name: {score: mean_interval}}, and the `best_regression` by macro F1.

    Baselines and arms are of the splits that have an adapter up to SRPO, or, where there are none, all weights. Arms of all
    weights have rows of their own, `ALL` at their end, over their splits. For each arm `gain` is its macro F1 less that of the
    best regression on the same split; for what was trained also `over_sft`, its macro F1 less that after SFT, and `S3`, the share
    of category matches that it reads off the pair as silver responses do.
    """
    whole: dict[str, list[Mapping[str, Any]]] = {"": [], ALL: []}
    for part, found in results.items():
        if part.data == data and part.share == 1 and found.keys() >= (TRAINED - {"grpo"} if part.all_weights else TRAINED):
            whole[ALL if part.all_weights else ""].append(found)
    splits = whole[""] or whole[ALL]
    rows: dict[str, Any] = {}
    for name in splits[0]["baselines"] if splits else ():
        rows[name] = {score: mean_interval([100 * found["baselines"][name][score] for found in splits]) for score in SCORES}
    regressions = {name: row for name, row in rows.items() if name != "majority"}
    best = max(regressions, key=lambda name: regressions[name]["macro_f1"]["mean"], default=None)
    arms = [("as_it_is", "", splits), *((arm, form, of) for form, of in whole.items() for arm in ARMS if arm in TRAINED)]
    for arm, form, of in arms:
        some = [found for found in of if arm in found]
        if not some or best is None:
            continue
        row = {score: mean_interval([100 * found[arm][score] for found in some]) for score in (*SCORES, "parse_rate")}
        row["gain"] = mean_interval([100 * (found[arm]["macro_f1"] - found["baselines"][best]["macro_f1"]) for found in some])
        if arm in TRAINED - {"sft"}:
            row["over_sft"] = mean_interval([100 * (found[arm]["macro_f1"] - found["sft"]["macro_f1"]) for found in some])
        if arm in TRAINED:
            row["S3"] = mean_interval([100 * found[arm]["step_accuracy"][2] for found in some])
        rows[arm + form] = row
    return {"rows": rows, "best_regression": best, "num_splits": len(splits)}


def label_of(name: str, row: Mapping[str, Any], num_splits: int) -> str:
    """A row of the summary in words, with its number of splits where it is not that of the others."""
    arm = name.removesuffix(ALL)
    shown = {"majority": "most common grade"}.get(name, ARMS.get(arm, f"regression on {name}")) + (ALL if name != arm else "")
    num = len(row["macro_f1"]["values"])
    return shown if num == num_splits else f"{shown} ({num} split{'s' * (num > 1)})"


def table(summary: Mapping[str, Any], data: str) -> str:
    """The summary as text."""
    rows, num = [], summary["num_splits"]
    for name, row in summary["rows"].items():
        rows.append((label_of(name, row, num), *(cell(row.get(key), sign) for key, sign in COLUMNS.values())))
    of = f"mean over {num} splits by query, +- 95 % by Student's t" if num > 1 else "one split by query"
    notes = [
        f"percent, {of}; best regression: {summary['best_regression']}",
        "S3 right: category matches that are read off the pair as in the demonstrations",
    ]
    return text_table((name_of(data), *COLUMNS), [rows], notes)


def cell(value: Mapping[str, Any] | None, sign: str = "") -> str:
    """A mean with its interval; a dash for None."""
    if value is None:
        return "-"
    half = "" if value["half"] is None else f" +- {value['half']:.1f}"
    return f"{value['mean']:{sign}.1f}{half}"


def curve(results: Mapping[Part, Mapping[str, Any]], data: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Points of the learning curve, {share, num_queries, majority, regression, sft}: macro F1 in percent, means over the same
    splits."""
    points = []
    for share in (*sizes.shares, 1.0):
        found = [results.get(Part(data, seed, share), {}) for seed in range(sizes.curve_splits)]
        if any("sft" not in one for one in found):
            continue
        mean = lambda pick: statistics.mean(100 * pick(one) for one in found)  # noqa: B023, E731
        points.append(
            {
                "share": share,
                "num_queries": statistics.mean(one["num_queries"] for one in found),
                "majority": mean(lambda one: one["baselines"]["majority"]["macro_f1"]),
                "regression": mean(lambda one: one["baselines"]["words+overlap, class weights"]["macro_f1"]),
                "sft": mean(lambda one: one["sft"]["macro_f1"]),
            }
        )
    return points


def plot(path: Path, files: Mapping[str, Any]) -> None:
    """Draw for each file the macro F1 of all arms, a dot per split, and the learning curve beside it."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2 * len(files)), layout="constrained")
        for axes, (name, found) in zip(figure.subplots(len(files), 2, squeeze=False), files.items(), strict=True):
            summary, points = found["summary"], found["curve"]
            best, num = summary["best_regression"], summary["num_splits"]
            drawn = {name: row for name, row in summary["rows"].items() if name in ("majority", best) or "gain" in row}
            bars = [
                ("best regression" if name == best else label_of(name, row, num), row["macro_f1"]) for name, row in drawn.items()
            ]
            for place, (label, value) in enumerate(reversed(bars)):
                color = COLORS[0] if label.startswith(ARMS["srpo"]) else FAINT
                axes[0].barh(place, value["mean"], color=color)
                axes[0].plot(value["values"], [place] * len(value["values"]), "k.", markersize=4)
            axes[0].set_yticks(range(len(bars)), [label for label, _ in reversed(bars)])
            axes[0].set_xlabel("macro F1, percent; dots: splits")
            axes[0].set_title(name)
            axes[1].set_visible(len(points) > 1)  # one point is no curve
            for key, label, color in zip(
                ("sft", "regression", "majority"), ("after SFT", "regression", "most common grade"), COLORS, strict=False
            ):
                axes[1].plot([p["num_queries"] for p in points], [p[key] for p in points], "o-", color=color, label=label)
            axes[1].set_xlabel("training queries")
            axes[1].set_ylabel("macro F1, percent")
            axes[1].set_ylim(bottom=0)
            axes[1].legend()
        with whole_file(path) as part:
            figure.savefig(part, format="png", dpi=130)
