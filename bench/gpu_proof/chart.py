"""Draws a result file: `python -m gpu_proof.chart FILE.json` writes FILE.png, the share of its bound that each figure reaches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gpu_proof.figures import number
from gpu_proof.report import KEYS

BOUND_ARMS = ("copy", "matmul")

COLORS = {"srpo": "#0b6e4f", "the card itself, and bounds": "#d8b365", "rivals": "#9aa5b1"}
OURS, BOUND, RIVAL = COLORS.values()


def draw(content: dict[str, Any], path: Path) -> bool:
    """Write a PNG with one bar per figure that has a bound, by stage; False if there is none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = [figure for figure in content["figures"] if "ratio" in figure]
    if not rows:
        return False
    of_rows = [figure["name"].partition(":")[0] for figure in rows]
    stages = list(dict.fromkeys(of_rows))
    labels = [figure["name"][:90] for figure in rows]
    shares = [100 * figure["ratio"] for figure in rows]
    height = 0.24 * (len(rows) + len(stages)) + 1.4
    figure, axis = plt.subplots(figsize=(11, height), layout="constrained")
    positions = [row + stages.index(stage) for row, stage in enumerate(of_rows)]  # a gap between stages
    bars = axis.barh(positions, [min(share, 130) for share in shares], color=[_color(each) for each in rows])
    texts = [_value(each, share) for each, share in zip(rows, shares, strict=True)]
    axis.bar_label(bars, texts, padding=4, fontsize=7)
    axis.set_yticks(positions, labels, fontsize=7)
    axis.axvline(100, color="#444444", linewidth=0.8)
    axis.set_xlim(0, 170)
    axis.set_ylim(max(positions) + 1, -1)
    axis.set_xlabel("percent of the bound that the same card reached in the same run", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    torch_version = content["versions"].get("torch", "?")
    axis.set_title(f"{content['device']}, torch {torch_version}, commit {content['commit']}", fontsize=10, loc="left")
    handles = [Patch(color=color, label=label) for label, color in COLORS.items()]
    axis.legend(handles=handles, loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
    return True


def _color(figure: dict[str, Any]) -> str:
    arm = figure.get("arm", "")
    if arm in BOUND_ARMS or figure["name"].startswith("ceilings:"):
        return BOUND
    return OURS if not arm or arm.startswith("srpo/") else RIVAL


def _value(figure: dict[str, Any], share: float) -> str:
    value = figure[KEYS[figure["unit"]]]
    return f"{share:.0f} % of {figure['floor_of']}, {number(value)} {figure['unit']}"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    if not draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png")):
        sys.exit("no figure has a bound: the stage ceilings has to pass first")
