"""Plots of a run, drawn from `metrics.jsonl` and `results.json` alone and written as PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from srpo.core.files import whole_file
from srpo.core.steps import StepSchema
from srpo.scores.evaluation import Results, score_rows

Metrics = Sequence[Mapping[str, float | None]]  # lines of metrics.jsonl

_PAPER_NAMES = {"L1": "L1 Irrelevant", "L2": "L2 Mismatch", "L3": "L3 Related", "L4": "L4 Excellent"}
# Distinguishable with every kind of colour vision.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#666666")
_LONG = 36  # letters of equally wide labels that fit below a confusion matrix
INK, FAINT, BEFORE, AFTER = "#222222", "#8a8a8a", "#9aa5b1", "#0072B2"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # names of runs and systems are text, also those with $
    "axes.edgecolor": "#bbbbbb",
    "axes.labelcolor": "#555555",
    "axes.labelsize": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "xtick.color": "#777777",
    "ytick.color": "#777777",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
}


def series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(optimizer steps, values) of the lines that have a number for `key`."""
    points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a twelfth of the series; the window is cut off at the ends."""
    half = len(values) // 24
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions, moved as little as possible so that neighbours are at least `gap` apart within low..high; order is kept."""
    order = np.argsort(positions, kind="stable")
    blocks: list[list[float]] = []  # [sum of wanted starts, number of labels]: a block starts at the mean
    for rank, index in enumerate(order):
        blocks.append([positions[index] - rank * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    highest = max(low, high - gap * (len(order) - 1))
    starts = [min(max(total / count, low), highest) for total, count in blocks for _ in range(int(count))]
    placed = [0.0] * len(order)
    for rank, index in enumerate(order):
        placed[index] = starts[rank] + rank * gap
    return placed


def draw_rewards(axes: Axes, metrics: Metrics, schema: StepSchema) -> None:
    """Mean reward of each reasoning step as a share of its maximum: smoothed lines over raw ones, labelled at their ends."""
    curves = []
    for spec, color in zip(schema.specs, cycle(COLORS), strict=False):
        steps, values = series(metrics, f"reward/step/{spec.name}")
        if len(steps) and spec.reward and spec.sources != ("skip",):
            curves.append((spec.name, color, steps, 100 * values / spec.reward))
    axes.set_title("Reward of each reasoning step in training")
    _percent_axis(axes, "share of its maximum")
    for _, color, steps, values in curves:
        axes.plot(steps, values, color=color, alpha=0.18, linewidth=1)
        axes.plot(steps, smooth(values), color=color)
    ends = [float(smooth(values)[-1]) for *_, values in curves]
    for (name, color, steps, _), end, y in zip(curves, ends, spread(ends, 6.5, 0, 100), strict=True):
        _label(axes, steps[-1], y, f"{name.replace('_', ' ')}  {end:.0f} %", color)


def draw_macro_f1(axes: Axes, metrics: Metrics, before: Results | None = None, after: Results | None = None) -> None:
    """Macro F1 of the evaluations during training; if there are none, a line from before to after."""
    steps, values = series(metrics, "eval/macro_f1")
    if not len(steps) and before is not None and after is not None:
        last = max((line["step"] or 0 for line in metrics), default=1)
        steps, values = np.array([0.0, last]), np.array([before["macro_f1"], after["macro_f1"]])
    axes.set_title("Macro F1 on held-out queries")
    _percent_axis(axes, "")
    if len(steps):
        axes.plot(steps, 100 * values, color=AFTER, marker="o", markersize=4)
        axes.set_ylim(0, min(100.0, 125 * float(values.max()) + 5))
        _label(axes, steps[-1], 100 * values[-1], f"{100 * values[-1]:.1f}", AFTER)


def draw_curve(axes: Axes, metrics: Metrics, key: str, title: str, unit: str, color: str = AFTER) -> None:
    """One metric over training: the smoothed line over the raw one."""
    steps, values = series(metrics, key)
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(steps):
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(values), color=color)
        _label(axes, steps[-1], smooth(values)[-1], f"{values[-1]:.3g}", color)
        axes.set_ylim(bottom=min(0.0, float(values.min())))


def draw_confusion(axes: Axes, results: Results, grades: Sequence[str], title: str, *, show_unparsed: bool) -> None:
    """The confusion matrix: counts, shaded by their share of the row (the true class)."""
    counts = np.asarray(results["confusion"])[:, : len(grades) + show_unparsed]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    for (i, j), count in np.ndenumerate(counts):
        color = "white" if shares[i, j] > 0.6 else INK
        middle: dict[str, Any] = {"ha": "center", "va": "center", "color": color}
        axes.text(j, i - 0.08, f"{100 * shares[i, j]:.0f} %", weight="bold" if i == j else "normal", **middle)
        axes.text(j, i + 0.24, f"{count:,}", size=7.5, alpha=0.75, **middle)
    axes.set_xticks(range(counts.shape[1]), verdicts := [*grades, "none"][: counts.shape[1]])
    if max(map(len, verdicts)) * len(verdicts) > _LONG:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    axes.set_yticks(range(len(grades)), [_PAPER_NAMES.get(name, name) for name in grades])
    axes.set_xlabel("verdict")
    axes.set_ylabel("human grade")


def draw_before_after(axes: Axes, before: Results, after: Results, schema: StepSchema) -> None:
    """One row per score, from its value before to its value after."""
    scores = [(name, *both) for name, both in score_rows(schema, before, after) if not name.startswith("Class")]
    rows = [(name, 100 * first, 100 * last) for name, first, last in scores if first is not None and last is not None]
    axes.set_title("Before and after SRPO")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.9)
    axes.set_xlim(-2, 112)
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
    for y, (_, first, last) in enumerate(rows):
        axes.plot([first, last], [y, y], color=AFTER if last >= first else COLORS[4], alpha=0.35, linewidth=3)
        axes.plot(first, y, "o", color=BEFORE, markersize=7)
        axes.plot(last, y, "o", color=AFTER, markersize=7)
        change = f"{last - first:+.1f}"
        axes.annotate(change, (max(first, last), y), (7, 0), textcoords="offset points", va="center", size=8.5, color="#555555")
    _, first, last = rows[0]
    for x, text, color, left in ((first, "before", FAINT, first <= last), (last, "after", AFTER, first > last)):
        side = ("right", 5) if left else ("left", -5)
        axes.annotate(text, (x, 0), (side[1], 8), textcoords="offset points", ha=side[0], color=color, size=8.5)


def _percent_axis(axes: Axes, label: str) -> None:
    axes.set_ylim(0, 103)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)


def _label(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """Text to the right of a line's end."""
    style = {"color": color, "weight": "bold", "size": 9, "annotation_clip": False}
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", **style)


def _save(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> Path:
    figure = Figure(figsize=size)
    draw(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        figure.savefig(part, facecolor="white", format="png")
    return path


def draw_overview(
    figure: Figure, metrics: Metrics, schema: StepSchema, before: Results | None, after: Results | None, name: str
) -> None:
    """The overview of a run: rewards and macro F1 over training; below them, scores and confusion before and after."""
    title = name
    top = figure
    if before is not None and after is not None:
        title += f"{': ' if name else ''}macro F1 {100 * before['macro_f1']:.1f} to {100 * after['macro_f1']:.1f}"
        title += f" on {after['num_examples']:,} held-out pairs"
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.02), hspace=0.04)[:, 0]
        scores, *matrices = bottom.subplots(1, 3, width_ratios=(1.3, 1, 1))
        draw_before_after(scores, before, after, schema)
        for axes, results, when in zip(matrices, (before, after), ("before", "after"), strict=True):
            draw_confusion(axes, results, schema.grades.names, f"Verdicts {when}", show_unparsed=_any_unparsed(before, after))
        matrices[1].set_yticks([])
        matrices[1].set_ylabel("")
    rewards, macro_f1 = top.subplots(1, 2, width_ratios=(2, 1))
    draw_rewards(rewards, metrics, schema)
    draw_macro_f1(macro_f1, metrics, before, after)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
    figure.suptitle(title, x=0.012, ha="left", size=14, weight="bold")


def _any_unparsed(before: Results, after: Results) -> bool:
    return any(row[-1] for results in (before, after) for row in results["confusion"])


def write_plots(
    out_dir: Path, metrics: Metrics, schema: StepSchema, results: Mapping[str, Results] | None = None, name: str = ""
) -> list[Path]:
    """Write the plots into `out_dir` and return the files; the plot `confusion` needs results before and after.

    `results` holds `before` and `after` as in `results.json`; the title of the overview starts with `name`.
    """
    before, after = (results.get("before"), results.get("after")) if results else (None, None)
    both = before is not None and after is not None

    def curve(key: str, title: str, unit: str) -> Callable[[Figure], None]:
        return lambda figure: draw_curve(figure.add_subplot(), metrics, key, title, unit)

    plots: dict[str, tuple[tuple[float, float], Callable[[Figure], None]]] = {
        "overview": ((13, 8.2 if both else 4.6), lambda figure: draw_overview(figure, metrics, schema, before, after, name)),
        "rewards": ((8, 4.5), lambda figure: draw_rewards(figure.add_subplot(), metrics, schema)),
        "macro_f1": ((6, 4), lambda figure: draw_macro_f1(figure.add_subplot(), metrics, before, after)),
        "entropy": ((6, 4), curve("policy/entropy", "Entropy of the policy", "nats per token")),
        "mismatch_kl": ((6, 4), curve("rollout/mismatch_kl", "Disagreement of engine and trainer", "KL, nats per token")),
    }
    if before is not None and after is not None:
        plots["confusion"] = (10, 4.2), lambda figure: _draw_two_confusions(figure, schema, before, after)
    with mpl.rc_context(STYLE):
        return [_save(out_dir / f"{stem}.png", size, draw) for stem, (size, draw) in plots.items()]


def _draw_two_confusions(figure: Figure, schema: StepSchema, before: Results, after: Results) -> None:
    for column, (results, title) in enumerate(((before, "Before"), (after, "After")), start=1):
        axes = figure.add_subplot(1, 2, column)
        draw_confusion(axes, results, schema.grades.names, title, show_unparsed=_any_unparsed(before, after))
