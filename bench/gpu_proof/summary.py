"""The text at the end of a call, for a reader who has no GPU: each stage, its figures, and what shows where it failed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpu_proof.figures import all_figures, as_text
from gpu_proof.stages import Stage

_SHOWN = 6  # failed parts of a stage that are shown with their details
# Of a log: where threads stand, errors, and what the watchdog of the kernels says.
_TELLING = re.compile(r'File ".*", line \d+|^(Current thread|Thread) |Error|error:|watchdog|barrier|^E  |CUDA|FAILED')


def line_of(entry: Mapping[str, Any]) -> str:
    """One line for a stage that has ended."""
    oks = sum(part["status"] == "ok" for part in entry.get("parts", ()))
    text = f"{entry['stage']:15} {entry['status']:8} {entry['seconds']:6.1f} s  {oks:3} ok  {entry['reason']}"
    return text.rstrip()[:240]


def summary(stages: Sequence[Stage], entries: Mapping[str, dict[str, Any]], key: str) -> str:
    """All of it. key: digest of the present sources; results of other sources are marked."""
    in_order = {stage.name: entries[stage.name] for stage in stages if stage.name in entries}
    lines = ["", "stage           status     time  parts"]
    for stage in stages:
        entry = in_order.get(stage.name)
        if entry is None:
            lines.append(f"{stage.name:15} not run   (about {stage.expected_s} s: {stage.proves})")
            continue
        lines.append(line_of(entry) + ("  [of other sources]" if entry["key"] != key else ""))
        lines += _skipped(entry) if entry["status"] != "skipped" else []
        lines += _arms_not_run(entry)
    figures = all_figures(in_order)
    for name in in_order:
        own = [figure for figure in figures if figure["stage"] == name]
        lines += ["", name, *(f"    {as_text(figure)}" for figure in own)] if own else []
    for entry in in_order.values():
        lines += failure(entry) if entry["status"] in ("failed", "cut") else []
    statuses = [entry["status"] for entry in in_order.values()]
    counts = ", ".join(f"{statuses.count(word)} {word}" for word in ("ok", "failed", "skipped", "cut"))
    return "\n".join([*lines, "", f"{counts}, {len(stages) - len(statuses)} not run"])


def _skipped(entry: Mapping[str, Any]) -> list[str]:
    """One line for each reason why parts of a stage were skipped."""
    names: dict[str, list[str]] = {}
    for part in entry.get("parts", ()):
        if part["status"] == "skipped":
            names.setdefault(part["reason"], []).append(part["part"])
    return [f"    skipped {n[0]}{f' and {len(n) - 1} more' if len(n) > 1 else ''}: {reason}" for reason, n in names.items()]


def _arms_not_run(entry: Mapping[str, Any]) -> list[str]:
    """One line for each arm of the loss without a time; `failure` shows those of failed parts."""
    parts = [part for part in entry.get("parts", ()) if part["status"] != "failed"]
    return [f"    {part['part']}: not run: {text}"[:240] for part in parts for text in part.get("arms_not_run", ())]


def failure(entry: Mapping[str, Any]) -> list[str]:
    """Lines that show where a stage failed: its failed parts with their details, else the telling lines of its log."""
    lines = ["", f"{entry['status']}: {entry['stage']}, {entry['reason']}"]
    wrong = [part for part in entry.get("parts", ()) if part["status"] == "failed"]
    for part in wrong[:_SHOWN]:
        lines.append(f"    {part['part']}: {part['reason']}")
        for name, value in part.items():
            if name not in ("part", "status", "reason", "seconds", "figures"):
                lines += _detail(name, value)
    if len(wrong) > _SHOWN:
        lines.append(f"    and {len(wrong) - _SHOWN} more: {', '.join(part['part'] for part in wrong[_SHOWN:])}"[:600])
    if not wrong:
        tail = entry.get("tail", "").splitlines()
        lines += [f"    {line[:200]}" for line in ([x for x in tail if _TELLING.search(x)] or tail)[-25:]]
    return lines


def _detail(name: str, value: Any) -> list[str]:
    if isinstance(value, str) and "\n" in value:
        return [f"        {name}:", *(f"            {line[:200]}" for line in value.splitlines()[-25:])]
    return [f"        {name}: {value if isinstance(value, str) else json.dumps(value)}"[:400]]
