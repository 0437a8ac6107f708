"""The outcome of bench/loss_kernel.py: rows, rates and the machine, as a JSON file and as a table.

The file is a JSON object, written anew after each arm's set-up and after each round:

    complete   false until the program has ended; then `doing` is null, before it names the arm or round in progress
    machine, versions, commit, command, loss, rounds, seconds
    results    one object per arm and form, from the first write on; `arm`, `form`, `in_place` and the sizes tell it apart

Values of a result are null until they are measured. `median_ms` and `min_ms` are over the rounds so far, whose number is its
`rounds`. `set_up_ms` is the shortest call of an arm's set-up, alone and not in turns: an indication where no round was reached.
`skipped` is the reason why the arm cannot run here; `failed` is the error that ended it, and earlier values stay.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from arms import BOUNDS, Arm
from problem import Form

Row = dict[str, Any]
TITLES: dict[Form, str] = {"logits": "logits", "top_k": "logits", "hidden": "hidden states"}
KEYS = ("set_up_ms", "median_ms", "min_ms", "peak_extra_bytes", "percent_of_bound", "gradient_error")
SMI_FIELDS = {
    "driver": "driver_version",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.memory",
    "power_limit_w": "power.limit",
}


def counted_bytes(row: Row) -> int:
    """Memory traffic that every form from logits needs: each logit is read once, and its gradient written once."""
    return 2 * row["tokens"] * row["vocab"] * {"fp32": 4, "bf16": 2}[row["dtype"]]


def counted_flops(row: Row) -> int:
    """Operations that the form "hidden" needs: three products of 2 T V H each, for the logits and for the two gradients."""
    return 3 * 2 * row["tokens"] * row["vocab"] * row["hidden"]


def new_row(arm: Arm, form: Form, size: dict[str, Any]) -> Row:
    """The row of an arm before it is measured. `size` has dtype, tokens, vocab, hidden and top_k."""
    about = {"arm": arm.name, "form": form, "in_place": arm.in_place} | size
    about |= {"hidden": size["hidden"] if form == "hidden" else 0, "top_k": size["top_k"] if form == "top_k" else 0}
    return about | dict.fromkeys(KEYS) | {"rounds": 0, "note": arm.note, "skipped": None, "failed": None}


def add_times(rows: Sequence[Row], times: Sequence[list[float]]) -> None:
    """Enter the times of the rounds so far, in ms, into the rows of one form, and the share of the bound's speed."""
    for row, values in zip(rows, times, strict=True):
        if values:
            row |= {"median_ms": statistics.median(values), "min_ms": min(values), "rounds": len(values)}
    bound = bound_of(rows)
    if bound is not None:
        for row in rows:
            if row["median_ms"] is not None:
                row["percent_of_bound"] = 100 * bound["median_ms"] / row["median_ms"]


def bound_of(rows: Sequence[Row]) -> Row | None:
    """The row of the bound among the rows of one form; None if it has no time."""
    return next((row for row in rows if row["arm"] == BOUNDS[row["form"]] and row["median_ms"] is not None), None)


def rates(results: Sequence[Row]) -> dict[str, float]:
    """Speed of the two bounds, as far as it is measured."""
    found = {}
    for form, key, counted in (("logits", "copy_bytes_per_s", counted_bytes), ("hidden", "matmul_flops_per_s", counted_flops)):
        bound = bound_of([row for row in results if row["form"] == form])
        if bound is not None:
            found[key] = counted(bound) / (bound["median_ms"] / 1e3)
    return found


def machine(device: str) -> dict[str, Any]:
    """Description of the machine."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    about = {"device": device, "cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return about | gpu() if device == "cuda" else about


def gpu() -> dict[str, Any]:
    """Description of the current CUDA device. Clocks are the highest that the device may take, in MHz."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    about = {"gpu": found.name, "sm": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count}
    about |= {"memory_bytes": found.total_memory, "cuda": torch.version.cuda}
    return about | nvidia_smi(str(found.uuid))


def nvidia_smi(uuid: str) -> dict[str, str | float | None]:
    """The values of `SMI_FIELDS` for a device; None for those that nvidia-smi does not give."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(SMI_FIELDS.values())}"]
    try:
        done = subprocess.run([*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(SMI_FIELDS)
    values = [value.strip() for value in done.stdout.strip().partition("\n")[0].split(",")]
    known = dict(zip(SMI_FIELDS, values, strict=False))
    return {key: _number(known.get(key, "")) if key != "driver" else known.get(key) for key in SMI_FIELDS}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def versions(arms: Sequence[Arm]) -> dict[str, str]:
    """Versions of Python, torch and the installed packages of the arms."""
    installed = {"python": platform.python_version(), "torch": torch.__version__}
    for package in dict.fromkeys(("triton", *(package for arm in arms for package in arm.packages))):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def write(outcome: dict[str, Any], path: Path) -> None:
    """Replace the file in one step: a reader, or the next run after a cut, finds the old or the new contents. Raises OSError."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def sizes(row: Row) -> str:
    """The problem of a row in words."""
    text = f"from {TITLES[row['form']]}, {row['dtype']}, {row['tokens']} tokens x {row['vocab']}"
    return text + (f", hidden size {row['hidden']}" if row["hidden"] else f", top-k {row['top_k']}" if row["top_k"] else "")


def table(results: Sequence[Row]) -> str:
    """The results as text: fastest first, with notes, failures and skipped arms below."""
    lines = []
    for form in BOUNDS:
        rows = [row for row in results if row["form"] == form]
        done = sorted((row for row in rows if row["median_ms"] is not None), key=lambda row: row["median_ms"])
        if not rows:
            continue
        lines += ["", sizes(rows[0]) + _speed(bound_of(rows)), ""]
        if done:
            columns = f"{'arm':22}{'in place':>10}{'median ms':>12}{'min ms':>10}{'peak extra MB':>15}"
            lines += [f"{columns}{'% of ' + BOUNDS[form]:>13}{'gradient error':>16}", *map(_line, done), ""]
        lines += dict.fromkeys(f"{row['arm']}: {row['note']}" for row in done if row["note"])
        lines += dict.fromkeys(f"{row['arm']}: failed, {row['failed']}" for row in rows if row["failed"])
        lines += dict.fromkeys(f"{row['arm']}: skipped, {row['skipped']}" for row in rows if row["skipped"])
    return "\n".join(lines).strip("\n")


def _speed(bound: Row | None) -> str:
    """The speed of the bound, for a heading."""
    if bound is None:
        return ""
    seconds = bound["median_ms"] / 1e3
    if bound["form"] == "hidden":
        return f"; matmul {counted_flops(bound) / seconds / 1e12:.3g} TFLOP/s"
    return f"; copy {counted_bytes(bound) / seconds / 1e9:.1f} GB/s"


def _line(row: Row) -> str:
    """A line of the table."""
    has_place = row["form"] != "hidden" and row["arm"] not in (*BOUNDS.values(), "topk")
    place = "" if not has_place else "yes" if row["in_place"] else "no"
    peak = "?" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 1e6:.1f}"
    share = "?" if row["percent_of_bound"] is None else f"{row['percent_of_bound']:.1f}"
    error = "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
    times = f"{row['median_ms']:12.2f}{row['min_ms']:10.2f}"
    return f"{row['arm']:22}{place:>10}{times}{peak:>15}{share:>13}{error:>16}"
