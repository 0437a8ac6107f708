"""Compares the loss, forward and backward, by our kernels and by other packages: `python bench/loss_kernel.py`.

Two forms: from logits to the gradient of the logits, and with `--hidden H` also from hidden states to the gradients of hidden
states and of the output layer's weight. The arms take turns within a round, in random order; every round has fresh random data;
times are medians over rounds. Each arm gets its input as the result of an op whose backward drops the gradient, so no arm pays
for copying or accumulating it. The logits are rewritten before each timed call of any arm, so that arms that work in place find
them intact and all arms find the same caches.

Percentages are relative to the machine's own speed: the arm `copy` moves the bytes that every logits form must move
(`counted_bytes`), the arm `matmul` computes the matrix products that every hidden form needs (`counted_flops`). Both always run.

Memory is the peak above the level before the call, measured in a separate run: on a GPU by torch; on Linux as the growth of the
resident set, from a trimmed heap to its high-water mark. The gradient's error is relative to a gradient in fp64, over one
sequence; in the hidden form it is the error of the gradient of the hidden states.

Arms whose package or device is missing are skipped, with the reason. `pip install -e .[bench]` installs TRL.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the default, but not under PYTHONSAFEPATH

from arms import ARMS, Absent, Arm, Run, failures, finish, gradient_error
from chart import draw
from problem import BETA, CLIP, LENGTH, STEPS, TEMPERATURE, Form, Problem
from srpo_kernels import cpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUNDS = {"logits": "copy", "hidden": "matmul"}
TITLES = {"logits": "logits", "hidden": "hidden states"}
KEYS = ("median_ms", "min_ms", "peak_extra_bytes", "percent_of_bound", "gradient_error")  # null if the arm is skipped


def counted_bytes(tokens: int, vocab: int, dtype: torch.dtype) -> int:
    """Memory traffic that every logits form needs: each logit is read once, and its gradient written once."""
    return 2 * tokens * vocab * dtype.itemsize


def counted_flops(tokens: int, vocab: int, hidden: int) -> int:
    """Operations that every hidden form needs: three products of 2 T V H each, for the logits and for the two gradients."""
    return 3 * 2 * tokens * vocab * hidden


def elapsed_ms(run: Run, problem: Problem) -> float:
    """Milliseconds of one forward and backward. On a GPU the time between two events: Python queues the kernels while the logits
    are still being restored, so that launch overhead is not measured."""
    problem.restore()
    if problem.device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        finish(run)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    finish(run)
    return (time.perf_counter() - begin) * 1e3


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of a call above the level before it; None if the system does not report it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    cpu.empty_cache()  # reused memory would not show in the resident set
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; for the same reason
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    """A size from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in /proc/self/status")


def measure(form: Form, arms: Sequence[Arm], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for each arm of the form."""
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    size = {"dtype": options.dtype, "tokens": options.tokens, "vocab": options.vocab}
    size["hidden"] = options.hidden if form == "hidden" else 0
    problem = Problem(form, options.tokens, options.vocab, options.hidden, dtype, device, min(LENGTH, options.tokens))
    problem.refill(options.seed)
    results = [{"arm": arm.name, "form": form, "in_place": arm.in_place} | size | dict.fromkeys(KEYS) for arm in arms]
    for result, arm in zip(results, arms, strict=True):
        result |= {"note": arm.note, "skipped": None}
    runs: dict[int, Run] = {}
    for index, arm in enumerate(arms):
        ours = arm.name in BOUNDS.values() or arm.name.startswith("srpo/")
        say(f"{form}: {arm.name}")
        try:
            run = arm.make(problem)
            results[index]["gradient_error"] = gradient_error(arm, run, problem)
            for _ in range(options.warmup):
                elapsed_ms(run, problem)
            problem.restore()
            results[index]["peak_extra_bytes"] = peak_extra_bytes(lambda run=run: finish(run), device)
            runs[index] = run
        except Absent as error:
            results[index]["skipped"] = str(error)
        except torch.OutOfMemoryError:
            if arm.name in BOUNDS.values():
                raise
            results[index]["skipped"] = "not enough memory"
        except failures() as error:
            if ours:
                raise
            results[index]["skipped"] = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        if results[index]["skipped"]:
            results[index] |= dict.fromkeys(KEYS)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    times: dict[int, list[float]] = {index: [] for index in runs}
    for turn in range(options.rounds):
        say(f"{form}: round {turn + 1} of {options.rounds}")
        problem.refill(options.seed + 1 + turn)
        for index in random.Random(turn).sample(list(runs), len(runs)):
            times[index].append(elapsed_ms(runs[index], problem))
    for index, values in times.items():
        results[index] |= {"median_ms": statistics.median(values), "min_ms": min(values)}
    bound = next(times[index] for index in times if arms[index].name == BOUNDS[form])
    for index, values in times.items():
        results[index]["percent_of_bound"] = 100 * statistics.median(bound) / statistics.median(values)
    return results


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def machine(options: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Description of the machine, with the two rates that percentages refer to."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    about: dict[str, Any] = {"device": options.device, "cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if options.device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    seconds = {result["arm"]: result["median_ms"] / 1e3 for result in results if result["arm"] in BOUNDS.values()}
    about["copy_bytes_per_s"] = counted_bytes(options.tokens, options.vocab, DTYPES[options.dtype]) / seconds["copy"]
    if "matmul" in seconds:
        about["matmul_flops_per_s"] = counted_flops(options.tokens, options.vocab, options.hidden) / seconds["matmul"]
    return about


def versions(arms: Sequence[Arm]) -> dict[str, str]:
    """Versions of Python, torch and the installed packages of the arms."""
    installed = {"python": platform.python_version(), "torch": torch.__version__}
    for package in dict.fromkeys(("triton", *(package for arm in arms for package in arm.packages))):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def table(outcome: dict[str, Any]) -> str:
    """The results as text: fastest first, with notes and skipped arms below."""
    about, lines = outcome["machine"], []
    for form in BOUNDS:
        rows = [row for row in outcome["results"] if row["form"] == form]
        done = sorted((row for row in rows if not row["skipped"]), key=lambda row: row["median_ms"])
        if not done:
            continue
        first = done[0]
        size = f"{first['tokens']} tokens x {first['vocab']}" + (f", hidden size {first['hidden']}" if first["hidden"] else "")
        rate = f"copy {about['copy_bytes_per_s'] / 1e9:.1f} GB/s"
        if form == "hidden":
            rate = f"matmul {about['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s"
        lines += ["", f"from {TITLES[form]}, {first['dtype']}, {size}; {rate}", ""]
        columns = f"{'arm':22}{'in place':>10}{'median ms':>12}{'min ms':>10}{'peak extra MB':>15}"
        lines.append(f"{columns}{'% of ' + BOUNDS[form]:>13}{'gradient error':>16}")
        for row in done:
            place = "" if row["arm"] in BOUNDS.values() or form == "hidden" else "yes" if row["in_place"] else "no"
            peak = "?" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 1e6:.1f}"
            error = "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
            text = f"{row['arm']:22}{place:>10}{row['median_ms']:12.2f}{row['min_ms']:10.2f}{peak:>15}"
            lines.append(f"{text}{row['percent_of_bound']:13.1f}{error:>16}")
        lines.append("")
        lines += dict.fromkeys(f"{row['arm']}: {row['note']}" for row in done if row["note"])
        lines += dict.fromkeys(f"{row['arm']}: skipped, {row['skipped']}" for row in rows if row["skipped"])
    return "\n".join(lines).strip("\n")


def chosen(names: Sequence[str] | None, with_hidden: bool) -> list[Arm]:
    """Arms by name or by the part before the slash, and the bounds. Raises ValueError for an unknown name."""
    known = {key for arm in ARMS for key in (arm.name, arm.name.partition("/")[0])}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"no arm is called {', '.join(unknown)}: choose among {', '.join(dict.fromkeys(a.name for a in ARMS))}")
    wanted = {*(names or known), *BOUNDS.values()}
    arms = [arm for arm in ARMS if {arm.name, arm.name.partition("/")[0]} & wanted]
    return [arm for arm in arms if with_hidden or arm.form == "logits"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with the defaults of the device filled in. Exits with status 2 if they are invalid."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="dtype of the logits; default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--tokens", type=int, help=f"a multiple of {LENGTH}, or fewer; default: 2048 on a CPU, 8192 on a GPU")
    parser.add_argument("--vocab", type=int, help="default: 32000 on a CPU, 151936 on a GPU")
    parser.add_argument("--hidden", type=int, default=0, help="hidden size; 0 (default): no arms from hidden states")
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="names of arms, or of groups: srpo, compile, liger (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed calls of each arm after its first (default 2)")
    parser.add_argument("--threads", type=int, help="torch threads; default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data (default 0)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--chart", type=Path, help="file for a chart of the results, as PNG")
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device was found: use --device cpu")
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    options.tokens = options.tokens or (8192 if on_gpu else 2048)
    options.vocab = options.vocab or (151936 if on_gpu else 32000)
    if options.tokens > LENGTH and options.tokens % LENGTH:
        parser.error(f"--tokens is {options.tokens}, not a whole number of sequences: give a multiple of {LENGTH}, or fewer")
    if min(options.tokens, options.vocab, options.rounds) < 1 or min(options.hidden, options.warmup) < 0:
        parser.error("--tokens, --vocab and --rounds must be positive, --hidden and --warmup not negative")
    try:
        chosen(options.arms, False)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    begin = time.perf_counter()
    arms = chosen(options.arms, options.hidden > 0)
    forms: tuple[Form, ...] = ("logits", "hidden") if options.hidden else ("logits",)
    results = [result for form in forms for result in measure(form, [arm for arm in arms if arm.form == form], options)]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    outcome = {
        "machine": machine(options, results),
        "versions": versions(arms),
        "commit": commit.stdout.strip() or None,
        "command": " ".join(["python", "bench/loss_kernel.py", *(sys.argv[1:] if argv is None else argv)]),
        "loss": {"clip_eps": CLIP, "kl_coef": BETA, "temperature": TEMPERATURE, "steps": STEPS, "sequence": LENGTH},
        "rounds": options.rounds,
        "seconds": round(time.perf_counter() - begin, 1),
        "results": results,
    }
    print(table(outcome))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    if options.chart:
        options.chart.parent.mkdir(parents=True, exist_ok=True)
        draw(outcome, options.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
