"""The result file of a device: versions, commit, and each figure with its floor and the share of it that is reached."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from revision import commit

from gpu_proof.card import query_card
from gpu_proof.figures import all_figures
from gpu_proof.parts import ROOT

RESULTS = ROOT / "bench" / "results"
UNMEASURED = ("env", "checker", "libraries", "pytest")  # stages whose figures are no speed or error of the GPU
# Keys of values by their unit: bench/compare.py knows from the key which change is for the worse.
KEYS = {
    "ms": "ms",
    "s": "s",
    "TB/s": "tb_per_s",
    "TFLOP/s": "tflop_per_s",
    "tokens/s": "tokens_per_s",
    "nats": "error",
    "": "error",
}


def report(entries: Mapping[str, dict[str, Any]], key: str, *, dry_run: bool) -> dict[str, Any]:
    """The content of the result file. A part that failed has figures only if they were measured apart from what failed.

    key: digest of the present sources, those of the commit; a stage that has not run with them since has another one.
    """
    parts = {part["part"]: part for part in entries.get("env", {}).get("parts", ())}
    machine = {name: value for name, value in parts.get("machine", {}).items() if name not in ("part", "status", "seconds")}
    return {
        "device": "dry run on a CPU" if dry_run else machine.get("gpu") or query_card("name"),
        "machine": machine,
        "versions": parts.get("versions", {}).get("versions", {}),
        "commit": commit(),
        "sources": key,
        "command": " ".join(["python", "bench/gpu_proof", *sys.argv[1:]]),
        "stages": {
            name: {**{field: entry[field] for field in ("status", "seconds", "reason", "time")}, "sources": entry["key"]}
            for name, entry in entries.items()
        },
        "figures": [as_row(figure) for figure in all_figures(entries)],
    }


def as_row(figure: Mapping[str, Any]) -> dict[str, Any]:
    """A figure as an element of the file, with a name that no other has."""
    part = f"{figure['part']}: " if figure["part"] != figure["name"] else ""
    moved = ("stage", "part", "name", "value", "unit")
    row: dict[str, Any] = {"name": f"{figure['stage']}: {part}{figure['name']}", "unit": figure["unit"]}
    row[KEYS.get(figure["unit"]) or figure["unit"].lower()] = figure["value"]
    return row | {name: value for name, value in figure.items() if name not in moved}


def slug(device: str) -> str:
    """A file name: "NVIDIA H200" becomes "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_report(entries: Mapping[str, dict[str, Any]], key: str, out: Path, *, dry_run: bool) -> list[Path]:
    """Write the result file to OUT and, if a stage that passed has measured a GPU, to bench/results. Returns the files; none
    without a device. Without the stage ceilings the figures have no floors at the rates of the card."""
    content = report(entries, key, dry_run=dry_run)
    if not content["device"]:
        return []
    passed = {name: entry for name, entry in entries.items() if entry["status"] == "ok"}
    measured = not dry_run and any(figure["stage"] not in UNMEASURED for figure in all_figures(passed))
    folders = [out, RESULTS] if measured else [out]
    paths = [folder / f"{'dry-run' if dry_run else slug(content['device'])}.json" for folder in folders]
    for path in paths:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return paths
