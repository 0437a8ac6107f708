"""Stages loss_logits and loss_hidden: bench/loss_kernel.py on shapes of real models; its arms are ours and their rivals.

It writes its result after every arm and every round: when its time is over, what it has measured is read.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpu_proof import lab
from gpu_proof.parts import ROOT, Cut, Found, Wrong, figure, small, state, time_for
from gpu_proof.processes import Ended, run_capped

BOUND_ARMS = ("copy", "matmul")
OURS = ("srpo/", *BOUND_ARMS)
LOST = "the device was lost in "  # loss_kernel.py on an arm that was not reached; "FORM: ARM: ERROR" follows
LEAST_S = 8.0  # no second run with less time
QUICK = ("srpo", "liger", "eager")  # beside the first shape, which has all arms
BOUNDS = {"hidden": "matmul"}  # of every other form: copy
# name -> (flags, seconds)
LOGITS = {
    "bf16 8192 x 151936": ("--dtype bf16 --tokens 8192 --vocab 151936 --top-k 100 --rounds 7", 55),
    "fp32 4096 x 151936": ("--dtype fp32 --tokens 4096 --vocab 151936 --rounds 5 --arms " + " ".join(QUICK), 24),
    "bf16 8192 x 128256": ("--dtype bf16 --tokens 8192 --vocab 128256 --rounds 5 --arms " + " ".join(QUICK), 24),
}
SHAPE = "--dtype bf16 --tokens 8192 --vocab 151936 --hidden 4096"
HIDDEN = {"bf16 8192 x 4096 x 151936": (f"{SHAPE} --forms hidden --rounds 5 --warmup 1", 62)}
SMALL = "--device cpu --tokens 64 --vocab 1000 --rounds 2 --warmup 1 --arms srpo eager"
SMALL_LOGITS = {"fp32 64 x 1000": (f"{SMALL} --top-k 20", 150)}
SMALL_HIDDEN = {"fp32 64 x 64 x 1000": (f"{SMALL} --hidden 64 --forms hidden", 150)}
BYTES_PER_LOGIT = {"bf16": 6, "fp32": 12}  # the logits, a pristine copy, a gradient


def least_memory(flags: list[str]) -> int:
    """Bytes without which not even the bound could run."""
    value = dict(itertools.pairwise(flags))
    logits = int(value["--tokens"]) * int(value["--vocab"]) * BYTES_PER_LOGIT.get(value.get("--dtype", "fp32"), 12)
    return logits + 8 * int(value["--vocab"]) * int(value.get("--hidden", 0))


@dataclass(frozen=True)
class Call:
    """One run of loss_kernel.py. rows: None if it left no result. shortened: the stage's end left it less than its own limit."""

    command: str
    end: Ended
    rows: list[dict[str, Any]] | None
    doing: str | None
    tail: str
    shortened: bool
    limit_s: float


def call(path: Path, flags: list[str], limit_s: float) -> Call:
    """Run loss_kernel.py, with its result in the file `path`."""
    path.unlink(missing_ok=True)
    log = path.with_suffix(".log")
    command = [sys.executable, "-u", str(ROOT / "bench" / "loss_kernel.py"), *flags, "--json", str(path)]
    limit_s, shortened = time_for(limit_s)
    end = run_capped(command, limit_s, log, env=os.environ, folder=ROOT)
    output = log.read_text(encoding="utf-8", errors="replace")
    print(output, flush=True)
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    words, tail = " ".join(["python", *command[2:]]), "\n" + output[-1500:]
    return Call(words, end, result.get("results"), result.get("doing"), tail, shortened, limit_s)


def bench(name: str, arguments: str, limit_s: float, form: str) -> Found:
    """Run loss_kernel.py; if an arm breaks the device, once more without it for the arms that were not reached."""
    flags = arguments.split()
    lab.needs_memory(least_memory(flags))
    begin = time.monotonic()
    path = state() / f"loss_{name.replace(' ', '_')}.json"
    last = call(path, flags, limit_s)
    if last.rows is None:
        words = f"no result within {last.limit_s:.0f} s" if last.end.killed else f"no result, exit code {last.end.code}"
        raise (Cut if last.end.killed and last.shortened else Wrong)(words, output=last.tail)
    rows, commands, left_s = last.rows, [last.command], limit_s - (time.monotonic() - begin)
    if (more := flags_again(flags, rows)) and time_for(left_s)[0] >= LEAST_S:
        last = call(path.with_name(f"{path.stem}_again.json"), more, left_s)
        rows, commands = merged(rows, last.rows or []), [*commands, last.command]
    rows = [row for row in rows if form != "hidden" or row["form"] == form]
    found = {"figures": figures(rows), "arms_not_run": not_run(rows), "command": "; ".join(commands)}
    if last.end.killed:
        words = f"ended after {last.limit_s:.0f} s at {last.doing or 'an unknown arm'}; the figures were measured before"
        raise (Cut if last.shortened else Wrong)(words, **found, output=last.tail)
    broken = [text for text in found["arms_not_run"] if text.startswith(OURS) and "failed" in text]
    if last.end.code or (broken and len(commands) > 1):
        raise Wrong(f"failed of ours: {broken or 'see the output'}; exit code {last.end.code}", **found, output=last.tail)
    if not any(row["median_ms"] for row in rows if is_kernel(row)):
        raise Wrong("no kernel of ours has a time: see arms_not_run", **found, output=last.tail)
    return found


def is_kernel(row: dict[str, Any]) -> bool:
    """Whether an arm is one of our kernels; "reference" is plain torch."""
    return row["arm"].startswith("srpo/") and row["arm"] != "srpo/reference"


def unreached(row: dict[str, Any]) -> bool:
    """Whether another arm, or the data, broke the device before the arm had its times."""
    return (row.get("failed") or "").startswith(LOST)


def flags_again(flags: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """The flags of a second run: the arms that were not reached, in their forms. Empty if nothing is left to measure."""
    waiting = [row for row in rows if unreached(row)]
    culprits = {row["failed"].removeprefix(LOST).split(": ")[1].partition(",")[0] for row in waiting}
    waiting = [row for row in waiting if row["arm"] not in culprits]
    arms = list(dict.fromkeys(row["arm"] for row in waiting))
    if not set(arms) - set(BOUND_ARMS):
        return []
    kept: list[str] = []
    flag = ""
    for word in flags:
        flag = word if word.startswith("--") else flag
        kept += [word] if flag not in ("--arms", "--forms") else []
    return [*kept, "--arms", *arms, "--forms", *dict.fromkeys(row["form"] for row in waiting)]


def merged(rows: list[dict[str, Any]], again: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with those of a second run where the first one did not reach the arm."""
    new = {_key(row): row for row in again}
    return [new.get(_key(row), row) if unreached(row) else row for row in rows]


def _key(row: dict[str, Any]) -> tuple[str, str, bool]:
    return row["form"], row["arm"], row["in_place"]


def label(row: dict[str, Any]) -> str:
    """An arm as one name; whether a bound works in place tells nothing."""
    return f"{row['arm']}, {row['form']}{', in place' if row['in_place'] and row['arm'] not in BOUND_ARMS else ''}"


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time of each arm beside its bound, which the same rounds measured; its memory and the error of its gradient."""
    found = []
    for name, of in (("median_ms", ""), ("set_up_ms", ", at its set-up")):  # set-up: where no round was reached
        done = [row for row in rows if row.get(name) and (name == "median_ms" or not row["median_ms"])]
        floors = {(row["form"], row["arm"]): row[name] for row in rows if row.get(name)}
        for row in sorted(done, key=lambda row: (row["form"], row[name])):
            bound = BOUNDS.get(row["form"], "copy")
            limit = {"floor": floors[row["form"], bound], "floor_of": bound} if (row["form"], bound) in floors else {}
            more = {key: row[key] for key in ("peak_extra_bytes", "gradient_error") if row.get(key) is not None}
            found.append(figure(label(row) + of, row[name], "ms", arm=row["arm"], **limit, **more))
    return found


def not_run(rows: list[dict[str, Any]]) -> list[str]:
    """The arms that failed, were skipped or have no time yet, with the reason."""
    reasons = [(row, f"failed, {row['failed']}" if row.get("failed") else row["skipped"]) for row in rows]
    reasons = [(row, reason or "not reached") for row, reason in reasons if reason or not row["median_ms"]]
    return [f"{label(row)}: {reason}" for row, reason in reasons]


def main(form: str) -> None:
    shapes = {"logits": SMALL_LOGITS if small() else LOGITS, "hidden": SMALL_HIDDEN if small() else HIDDEN}[form]
    lab.run({name: partial(bench, name, flags, limit_s, form) for name, (flags, limit_s) in shapes.items()})
