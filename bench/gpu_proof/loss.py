"""Stages loss_logits and loss_hidden: bench/loss_kernel.py on shapes of real models; its arms are ours and their rivals.

It writes its result after every arm and every round: when its time is over, what it has measured is read.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from gpu_proof import lab
from gpu_proof.parts import ROOT, Cut, Found, Wrong, figure, small, state, time_for
from gpu_proof.processes import run_capped

BOUND_ARMS = ("copy", "matmul")
OURS = ("srpo/", *BOUND_ARMS)
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


def bench(name: str, arguments: str, limit_s: float, form: str) -> Found:
    flags = arguments.split()
    lab.needs_memory(least_memory(flags))
    path = state() / f"loss_{name.replace(' ', '_')}.json"
    path.unlink(missing_ok=True)
    log = path.with_suffix(".log")
    command = [sys.executable, "-u", str(ROOT / "bench" / "loss_kernel.py"), *flags, "--json", str(path)]
    limit_s, shortened = time_for(limit_s)
    end = run_capped(command, limit_s, log, env=os.environ, folder=ROOT)
    print(log.read_text(encoding="utf-8", errors="replace"), flush=True)
    if not path.is_file():
        words = f"no result within {limit_s:.0f} s" if end.killed else f"no result, exit code {end.code}"
        raise (Cut if end.killed and shortened else Wrong)(words, output=_tail(log))
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in result["results"] if form != "hidden" or row["form"] == form]
    found = {"figures": figures(rows), "arms_not_run": not_run(rows), "command": " ".join(["python", *command[2:]])}
    if end.killed:
        words = f"ended after {limit_s:.0f} s at {result.get('doing') or 'an unknown arm'}; the figures were measured before"
        raise (Cut if shortened else Wrong)(words, **found, output=_tail(log))
    if end.code:
        broken = [text for text in found["arms_not_run"] if text.startswith(OURS) and "failed" in text]
        raise Wrong(f"exit code {end.code}, of ours: {broken or 'see the output'}", **found, output=_tail(log))
    return found


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


def _tail(log: Path) -> str:
    return "\n" + log.read_text(encoding="utf-8", errors="replace")[-1500:]


def main(form: str) -> None:
    shapes = {"logits": SMALL_LOGITS if small() else LOGITS, "hidden": SMALL_HIDDEN if small() else HIDDEN}[form]
    lab.run({name: partial(bench, name, flags, limit_s, form) for name, (flags, limit_s) in shapes.items()})
