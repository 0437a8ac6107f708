"""Plots of `srpo.reproduce`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from srpo.core.files import whole_file
from srpo.experiments.tables import Table
from srpo.scores.plots import COLORS, FAINT, STYLE

LABELS = {
    "srpo": "SRPO, hybrid step rewards",
    "srpo_discounted": "SRPO, each step against its group, gamma 0.5",
    "grpo": "GRPO, reward of the verdict",
}


def plot_table(path: Path, table: Table, summary: Mapping[str, Any]) -> None:
    """Draw the last column of a table: our mean and standard deviation, a dot per seed, and the paper's numbers."""
    column, rows = table.columns[-1], summary["rows"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.5 * len(rows) + 1.6))
        axes = figure.subplots(1, 2, sharey=True)
        places = np.arange(len(rows))[::-1]
        for row, place in zip(rows, places, strict=True):
            ours = row["ours"][column]
            axes[0].errorbar(ours["mean"], place, xerr=ours["std"], fmt="o", color=COLORS[0], capsize=3, zorder=3)
            axes[0].plot(ours["values"], [place + 0.18] * len(ours["values"]), ".", color=FAINT, markersize=4)
            if row["paper"]:
                axes[1].plot(row["paper"][column], place, "s", color=COLORS[1])
        for ax, title in zip(axes, ("here (dots: seeds)", "paper"), strict=True):
            ax.set_title(title)
            ax.set_xlabel(f"{column}, percent")
            ax.grid(axis="x")
        axes[0].set_yticks(places, [row["name"] for row in rows])
        axes[0].set_ylim(-0.6, len(rows) - 0.4)
        figure.suptitle(table.title, x=0.01, ha="left", fontweight="bold")
        with whole_file(path) as part:
            figure.savefig(part, format="png")


def plot_headline(path: Path, curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> None:
    """Draw macro F1 over sampled responses: a thin line per seed, a thick line for the mean over seeds."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4))
        ax = figure.subplots()
        for (name, by_seed), color in zip(curves.items(), COLORS, strict=False):
            for curve in by_seed:
                ax.plot(*zip(*curve, strict=True), color=color, linewidth=0.8, alpha=0.5)
            length = min(map(len, by_seed))
            mean = np.mean([curve[:length] for curve in by_seed], axis=0)
            ax.plot(mean[:, 0], mean[:, 1], color=color, label=LABELS.get(name, name))
        ax.set_title("Macro F1 on held-out pairs")
        ax.set_xlabel("responses sampled")
        ax.legend(frameon=False)
        with whole_file(path) as part:
            figure.savefig(part, format="png")
