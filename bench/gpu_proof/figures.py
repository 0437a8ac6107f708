"""The figures of all stages with their bounds: each value beside the floor of the same run, and the share that it reaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

RISING = ("TB/s", "TFLOP/s", "tokens/s")  # units of which more is better; of all others less
_MS = {"ms": 1e3, "s": 1.0}


def all_figures(entries: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of the stages' results in order: stage, part, name, value, unit and, if known, floor, floor_of and ratio.

    ratio: the share of its bound that a value reaches, 1 at best; for a time floor / value, for a rate value / floor.
    """
    found = [(name, part, dict(each)) for name, entry in entries.items() for part, each in _figures_of(entry)]
    rates = {figure["name"]: figure["value"] for stage, _, figure in found if stage == "ceilings"}
    return [{"stage": stage, "part": part, **_bounded(figure, rates)} for stage, part, figure in found]


def _figures_of(entry: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for part in entry.get("parts", ()):
        for figure in part.get("figures", ()):
            yield part["part"], figure


def _bounded(figure: dict[str, Any], rates: Mapping[str, float]) -> dict[str, Any]:
    """The figure with its floor: its own, or the time that its bytes or its operations take at the rates of the card."""
    num_bytes, flops = figure.pop("bytes", None), figure.pop("flops", None)
    second = _MS.get(figure["unit"])
    if "floor" not in figure and second is not None:
        if num_bytes is not None and rates.get("copy"):
            figure |= {"floor": num_bytes / (rates["copy"] * 1e12) * second, "floor_of": "copy"}
        elif flops is not None and rates.get("matmul"):
            figure |= {"floor": flops / (rates["matmul"] * 1e12) * second, "floor_of": "matmul"}
    if "floor" not in figure and figure["unit"] == "TFLOP/s" and figure["name"] != "matmul" and rates.get("matmul"):
        figure |= {"floor": rates["matmul"], "floor_of": "matmul"}
    if figure.get("floor") and figure["value"]:
        ratio = figure["value"] / figure["floor"]
        figure["ratio"] = ratio if figure["unit"] in RISING else 1 / ratio
    return figure


def as_text(figure: Mapping[str, Any]) -> str:
    """A figure in one line, without its stage."""
    name = figure["name"] if figure["name"] == figure["part"] else f"{figure['part']}: {figure['name']}"
    text = f"{name:58} {number(figure['value']):>9} {figure['unit']:8}"
    if "floor" in figure:
        text += f" {figure['floor_of']} {number(figure['floor'])}"
        text += f", {100 * figure['ratio']:.0f} %" if "ratio" in figure else ""
    if "bar" in figure:
        text += f" bar {number(figure['bar'])}"
    if "rival" in figure:
        text += f" {figure['rival_of']} {number(figure['rival'])}"
    return text.rstrip()


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is short."""
    if 1e3 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.2e}"
