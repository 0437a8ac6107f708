"""Tables, plot and example responses of `make demo-real`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    """The summary of a file of pairs, in percent: `rows` {name: {score: mean_interval}} over the splits that have all of TRAINED,
    the `best_regression` by macro F1, and for each arm `gain`, its macro F1 less that of this regression on the same split.

    Also for what was trained: `over_sft`, its macro F1 less that after SFT, and `S3`, the share of category matches that it reads
    off the pair as silver responses do."""
    whole = [found for part, found in results.items() if part == Part(data, part.seed) and found.keys() >= TRAINED]
    rows: dict[str, Any] = {}
    for name in whole[0]["baselines"] if whole else ():
        rows[name] = {score: mean_interval([100 * found["baselines"][name][score] for found in whole]) for score in SCORES}
    regressions = {name: row for name, row in rows.items() if name != "majority"}
    best = max(regressions, key=lambda name: regressions[name]["macro_f1"]["mean"], default=None)
    for arm in ARMS:
        some = [found for found in whole if arm in found]
        if not some:
            continue
        rows[arm] = {score: mean_interval([100 * found[arm][score] for found in some]) for score in (*SCORES, "parse_rate")}
        if best:
            gains = [100 * (found[arm]["macro_f1"] - found["baselines"][best]["macro_f1"]) for found in some]
            rows[arm]["gain"] = mean_interval(gains)
        if arm in TRAINED - {"sft"}:
            rows[arm]["over_sft"] = mean_interval([100 * (found[arm]["macro_f1"] - found["sft"]["macro_f1"]) for found in some])
        if arm in TRAINED:
            rows[arm]["S3"] = mean_interval([100 * found[arm]["step_accuracy"][2] for found in some])
    return {"rows": rows, "best_regression": best, "num_splits": len(whole), "all_weights": of_all_weights(results, data)}


def of_all_weights(results: Mapping[Part, Mapping[str, Any]], data: str) -> list[dict[str, Any]]:
    """For each split and arm that trained all weights: {seed, arm, all_weights, adapter}, macro F1 in percent; adapter is None
    where there is none."""
    rows = []
    for part, found in sorted(results.items(), key=lambda item: item[0].seed):
        if not part.all_weights or part.data != data:
            continue
        other = results.get(replace(part, all_weights=False), {})
        for arm in (name for name in ARMS if name in found and name in TRAINED):
            adapter = 100 * other[arm]["macro_f1"] if arm in other else None
            rows.append({"seed": part.seed, "arm": arm, "all_weights": 100 * found[arm]["macro_f1"], "adapter": adapter})
    return rows


def table(summary: Mapping[str, Any], data: str) -> str:
    """The summary as text."""
    best, rows = summary["best_regression"], []
    for name, row in summary["rows"].items():
        shown = {"majority": "always the most common grade"}.get(name, ARMS.get(name, f"regression on {name}"))
        rows.append((shown, *(cell(row.get(key), sign) for key, sign in COLUMNS.values())))
    num = summary["num_splits"]
    of = f"mean over {num} splits by query, +- 95 % by Student's t" if num > 1 else "one split by query"
    notes = [
        f"percent, {of}; best regression: {best}; S3 right: category matches that are read off the pair as in the demonstrations"
    ]
    for row in summary["all_weights"]:
        beside = "" if row["adapter"] is None else f", {row['adapter']:.1f} with an adapter"
        notes.append(f"split {row['seed']}, {ARMS[row['arm']]}: macro F1 {row['all_weights']:.1f} with all weights{beside}")
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
            shown = {"majority": "most common grade", summary["best_regression"]: "best regression"} | ARMS
            bars = [(label, summary["rows"][key]["macro_f1"]) for key, label in shown.items() if key in summary["rows"]]
            for place, (label, value) in enumerate(reversed(bars)):
                color = COLORS[0] if label == ARMS["srpo"] else FAINT
                axes[0].barh(place, value["mean"], color=color)
                axes[0].plot(value["values"], [place] * len(value["values"]), "k.", markersize=4)
            axes[0].set_yticks(range(len(bars)), [label for label, _ in reversed(bars)])
            axes[0].set_xlabel("macro F1, percent; dots: splits")
            axes[0].set_title(name)
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
