"""Draws the results of bench/loss_kernel.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arms import BOUNDS
from outcome import sizes
from problem import Form

COLORS = {"ours": "#0b6e4f", "others": "#9aa5b1", "bounds, which do not compute the loss": "#d8b365"}
OURS, OTHERS, BOUND = COLORS.values()


def draw(outcome: dict[str, Any], path: Path) -> None:
    """Write a PNG with one horizontal bar per arm that has a time, fastest on top, and a panel for each form.

    Raises ValueError if no arm has one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    done = [row for row in outcome["results"] if row["median_ms"] is not None]
    if not done:
        raise ValueError("no arm has a time")
    forms: list[Form] = [form for form in BOUNDS if any(row["form"] == form for row in done)]
    panels = [sorted((row for row in done if row["form"] == form), key=lambda row: row["median_ms"]) for form in forms]
    heights = [len(rows) + 2 for rows in panels]
    figure, axes = plt.subplots(
        len(panels), squeeze=False, figsize=(10, 0.36 * sum(heights) + 0.6), height_ratios=heights, layout="constrained"
    )
    about, torch_version = outcome["machine"], outcome["versions"]["torch"]
    name = about.get("gpu") or f"{about['cpu']}, {about['threads']} of {about['cores']} cores"
    figure.suptitle(f"SRPO loss, forward and backward: {name}, torch {torch_version}", fontsize=11)
    for axis, form, rows in zip(axes[:, 0], forms, panels, strict=True):
        bound = BOUNDS[form]
        bars = axis.barh(range(len(rows)), [row["median_ms"] for row in rows], color=[_color(row) for row in rows])
        axis.bar_label(bars, [_label(row, bound) for row in rows], padding=4, fontsize=8)
        axis.set_yticks(range(len(rows)), [row["arm"] + (", in place" if _in_place(row) else "") for row in rows], fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(0, max(row["median_ms"] for row in rows) * 1.45)  # room for the labels
        axis.set_title(sizes(rows[0]), fontsize=9, loc="left")
        axis.set_xlabel(f"ms, median of {outcome['rounds']} rounds", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=color, label=label) for label, color in COLORS.items()]
    axes[0, 0].legend(handles=handles, loc="upper right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def _in_place(row: dict[str, Any]) -> bool:
    return row["in_place"] and row["arm"] != "copy"


def _color(row: dict[str, Any]) -> str:
    return BOUND if row["gradient_error"] is None else OURS if row["arm"].startswith("srpo/") else OTHERS


def _label(row: dict[str, Any], bound: str) -> str:
    """Label of a bar: time, share of the bound, and memory."""
    is_share = row["arm"] != bound and row["percent_of_bound"] is not None
    share = f", {row['percent_of_bound']:.0f} % of {bound}" if is_share else ""
    peak = "" if row["peak_extra_bytes"] is None else f", +{row['peak_extra_bytes'] / 1e6:.0f} MB"
    return f"{row['median_ms']:.3g} ms{share}{peak}"
