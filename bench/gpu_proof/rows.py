"""Stage rows: the CUDA kernels of csrc/ without torch, each problem a process of its own, smallest first, then timings.

rows_check takes key=value arguments and prints one JSON line; it exits with 0 if all is right, 1 if not, 2 after a CUDA error. A
problem that hangs is run again by the variant with a watchdog, which says which barrier is stuck.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gpu_proof.checker import binary
from gpu_proof.parts import OUT_OF_MEMORY, Found, Skip, Wrong, figure, run_parts, small

LIMIT_S, TIMING_LIMIT_S, WATCHDOG_LIMIT_S = (30 if small() else 6), 15, 20
ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2}
SHOWN = ("plan", "bad", "first_wrong", "repeats_differ", "logprob_error", "gradient_error", "error", "at", "line")
NO_MEMORY = "cudaErrorMemoryAllocation"
NO_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice")
Problem = dict[str, Any]


def problem(dtype: str, rows: int, vocab: int, **more: Any) -> Problem:
    """Arguments of rows_check."""
    return {"dtype": dtype, "T": rows, "V": vocab, **more}


def checks() -> Iterator[Problem]:
    """Problems by rising size: a kernel that fails is seen first where it is easiest to understand."""
    for rows in (1, 2, 5, 700):
        for cluster in (1, 2, 4, 8, 16):
            yield problem("bf16", rows, 4104, cluster=cluster, place="out", repeats=2)
    for cluster in (0, 1, 2, 4, 8, 16):
        yield problem("f32", 33, 4104, cluster=cluster, place="in")
        yield problem("f16", 33, 8, cluster=cluster, place="out")
    for dtype in ("bf16", "f32", "f16"):
        yield problem(dtype, 64, 32000, place="none")
        yield problem(dtype, 300, 32000, place="in", repeats=3)
        yield problem(dtype, 300, 32000, place="in", pad=3)
        yield problem(dtype, 40, 50257, place="out")
        yield problem(dtype, 64, 128256, place="out")
        yield problem(dtype, 64, 151643, place="in")
        yield problem(dtype, 200, 151936, place="out", repeats=3)
        yield problem(dtype, 40, 262144, place="in")
        yield problem(dtype, 64, 32000, place="in", kept=100)
        yield problem(dtype, 64, 151936, place="out", kept=100)
        yield problem(dtype, 64, 32000, place="in", top_k=100)
        yield problem(dtype, 64, 151936, place="out", top_k=100)
        yield problem(dtype, 64, 32000, place="out", full=1)


def timings() -> Iterator[Problem]:
    """Without ignored rows, so that the kernels move all bytes that `least_bytes` counts."""
    for cluster in (-1, 4, 8, 16, 0):
        yield problem("bf16", 8192, 151936, cluster=cluster, place="out", ignored=0, repeats=9)
    yield problem("bf16", 8192, 151936, place="in", ignored=0, repeats=9)
    yield problem("bf16", 8192, 151936, place="none", ignored=0, repeats=9)
    yield problem("bf16", 8192, 151936, place="out", top_k=100, ignored=0, repeats=5)
    yield problem("bf16", 8192, 151643, place="out", ignored=0, repeats=5)
    yield problem("f32", 4096, 151936, place="out", ignored=0, repeats=9)
    yield problem("bf16", 8192, 128256, place="out", ignored=0, repeats=9)


def small_checks() -> Iterator[Problem]:
    """For the emulator: each kind once, with few rows."""
    for cluster in (0, 1, 2, 4, 8, 16):
        yield problem("bf16", 8, 4104, cluster=cluster, place="out", repeats=2)
    yield problem("f32", 2, 1032, cluster=2, place="in")
    yield problem("f16", 2, 264, place="in", pad=3)
    yield problem("f32", 2, 264, place="none")
    yield problem("f32", 8, 50257, place="out")
    yield problem("f32", 8, 151643, place="in")
    yield problem("f32", 8, 151936, place="out")
    yield problem("f32", 8, 50257, place="in", kept=100)
    yield problem("f32", 8, 32000, place="out", top_k=100)
    yield problem("f32", 8, 32000, place="out", full=1)


def arguments(problem: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in problem.items()]


def least_bytes(problem: Mapping[str, Any]) -> int:
    """Traffic that no kernel can avoid: each logit is read once and, with a gradient, written once."""
    passes = 1 if problem.get("place") == "none" else 2
    return passes * problem["T"] * problem["V"] * ITEM_BYTES[problem["dtype"]]


def check(program: Path, watchdog: Path | None, problem: Problem, limit_s: float, timed: bool) -> Found:
    """Run one problem. Raises Wrong with what shows where it failed."""
    try:
        done = subprocess.run([program, *arguments(problem)], capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise Wrong(f"no end within {limit_s:g} s", watchdog=stuck_at(watchdog, problem)) from None
    result = last_json(done.stdout)
    shown = {name: result[name] for name in SHOWN if name in result}
    if any(word in result.get("error", "") for word in NO_DRIVER):
        raise Skip(f"the CUDA runtime of nvcc cannot use this driver: {result['error']}")
    if NO_MEMORY in result.get("error", ""):
        raise Skip(OUT_OF_MEMORY)
    if done.returncode or not result.get("ok"):
        bad, gradient, logprob = (result.get(name, "?") for name in ("bad", "gradient_error", "logprob_error"))
        words = {1: f"wrong values: {bad} entries; errors of the gradient {gradient}, of log-probabilities {logprob}"}
        words[2] = f"CUDA error {result.get('error', '')}".strip()
        reason = words.get(done.returncode, f"exit code {done.returncode}")
        said = "" if result and not done.stderr else "\n" + (done.stderr or done.stdout)[-1500:]
        raise Wrong(reason, **shown, **({"output": said} if said else {}))
    figures = [figure("time", result["ms"], "ms", bytes=least_bytes(problem))] if timed else []
    if timed and problem.get("top_k") and "top_k_ms" in result:
        figures.append(figure("of which top-k", result["top_k_ms"], "ms", bytes=least_bytes({**problem, "place": "none"})))
    return {"figures": figures, **{name: shown[name] for name in ("plan", "logprob_error", "gradient_error") if name in shown}}


def stuck_at(watchdog: Path | None, problem: Problem) -> str:
    """The output of the variant with a watchdog on a problem that hangs."""
    if watchdog is None:
        return "the variant with a watchdog is not built"
    try:
        run = subprocess.run(
            [watchdog, *arguments(problem)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=WATCHDOG_LIMIT_S,
            check=False,
        )
        output = run.stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"") + b"\nand it did not end either"
    return "\n" + "\n".join(output.decode(errors="replace").splitlines()[:40])


def last_json(text: str) -> dict[str, Any]:
    """The last line that is a JSON object; empty if there is none."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return {}


def main() -> None:
    program = binary()
    try:
        watchdog = binary("rows_check_watchdog")
    except Skip:
        watchdog = None
    lists = [(small_checks(), LIMIT_S, False)] if small() else [(checks(), LIMIT_S, False), (timings(), TIMING_LIMIT_S, True)]
    run_parts(
        {
            " ".join(arguments(each)): partial(check, program, watchdog, each, limit, timed)
            for problems, limit, timed in lists
            for each in problems
        }
    )
