"""Stages memcheck, synccheck and racecheck: compute-sanitizer on small problems of rows_check.

memcheck and synccheck have to be clean. racecheck has no full model of bulk copies and clusters and may report hazards that are
none: it is read, not held.
"""

from __future__ import annotations

import re
import subprocess
from functools import partial
from pathlib import Path

from gpu_proof.card import tool
from gpu_proof.checker import binary
from gpu_proof.parts import Found, Skip, Wrong, figure, run_parts, small
from gpu_proof.rows import arguments, problem

PROBLEMS = [
    problem("bf16", 7, 4104, cluster=1, place="out"),
    problem("bf16", 7, 4104, cluster=8, place="in"),
    problem("f32", 5, 1000, cluster=2, place="out"),
    problem("f16", 6, 2048, cluster=16, place="in"),
    problem("bf16", 5, 1003, place="out"),
    problem("bf16", 5, 1000, place="in", kept=20),
    problem("bf16", 5, 1000, place="out", top_k=20),
    problem("f32", 5, 1000, place="out", full=1),
]
LIMIT_S = 20
FOUND = 9  # exit code for errors that the tool found
_COUNT = re.compile(r"SUMMARY: (\d+) (?:errors?|hazards?)")


def check(sanitizer: str, kind: str, program: Path, words: list[str]) -> Found:
    command = [sanitizer, "--error-exitcode", str(FOUND), "--tool", kind, str(program), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Wrong(f"no end within {LIMIT_S} s") from None
    output = done.stdout + done.stderr
    print(output, flush=True)
    counts = [int(number) for number in _COUNT.findall(output)]
    found = {"figures": [figure("reports", max(counts, default=0), "")]}
    if done.returncode == FOUND and kind == "racecheck":
        return {**found, "output": "\n" + output[-1500:]}
    if done.returncode:
        words_of = {FOUND: f"{kind} reports errors", 1: "wrong values under the tool"}
        raise Wrong(words_of.get(done.returncode, f"exit code {done.returncode}"), output="\n" + output[-1500:])
    if not counts:  # it has not looked at the program
        raise Wrong(f"{kind} printed no summary", output="\n" + output[-1500:])
    return found


def main(kind: str) -> None:
    program = binary()
    if small():
        raise Skip("a dry run has no CUDA program to check")
    sanitizer = tool("compute-sanitizer")
    run_parts({" ".join(words): partial(check, sanitizer, kind, program, words) for words in map(arguments, PROBLEMS)})
