"""Compares the loss, forward and backward, by our kernels and by other packages: `python bench/loss_kernel.py`.

Forms: from logits to the gradient of the logits; with `--top-k K` also with all probabilities taken among the K largest logits
and the label; with `--hidden H` also from hidden states to the gradients of hidden states and of the output layer's weight.

The arms take turns within a round, in random order; every round has fresh random data; times are medians over rounds. Each arm
gets its input as the result of an op whose backward drops the gradient, so no arm pays for copying or accumulating it. The logits
are rewritten before each timed call of any arm, so that arms that work in place find them intact and all find the same caches.

Percentages are relative to the machine's own speed: the arm `copy` moves the bytes that every form from logits must move, the arm
`matmul` computes the matrix products that the form from hidden states needs. Both always run.

Memory is the peak above the level before the call, measured in a separate run: on a GPU by torch; on Linux as the growth of the
resident set, from a trimmed heap to its high-water mark. The gradient's error is relative to a gradient in fp64, over one
sequence; in the hidden form it is the error of the gradient of the hidden states.

Arms whose package or device is missing are skipped, with the reason. An arm that fails is reported with its error, and the others
go on; the exit code is 1 at the end if one of our arms or a bound failed. outcome.py describes the file of `--json`, which holds
what is measured so far at any time. `pip install -e .[bench]` installs TRL.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the default, but not under PYTHONSAFEPATH

from arms import ARMS, BOUNDS, Arm, finish, gradient_error
from chart import draw
from failures import failures
from measuring import elapsed_ms, lost, peak_extra_bytes
from outcome import Row, add_times, machine, new_row, rates, table, versions, write
from problem import BETA, CLIP, LENGTH, STEPS, TEMPERATURE, Form, Problem
from revision import commit
from rivals import Absent, Run, one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OLDEST_CAPABILITY = (8, 0)  # bf16 in hardware
T = TypeVar("T")


class DeviceLost(Exception):
    """The device answers nothing after a fault in a kernel; the message names the arm and the error."""


def attempt(rows: Sequence[Row], where: str, call: Callable[[], T]) -> T | None:
    """The value of a call; None if it raises, with the reason entered in the rows. Raises DeviceLost."""
    try:
        return call()
    except Absent as error:
        reason = {"skipped": str(error)}
    except failures() as error:
        reason = {"failed": where + one_line(error)}
    for row in rows:
        row |= reason
    return None  # here the error, and with it the tensors of its frames, is gone


def clean_up(device: torch.device, what: str) -> None:
    """Return the memory of a call to the device. Raises DeviceLost if the call has broken the device."""
    if error := lost(device):
        raise DeviceLost(f"the device was lost in {what}: {error}")
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def measure(
    form: Form, arms: Sequence[Arm], rows: Sequence[Row], options: argparse.Namespace, report: Callable[[str], object]
) -> None:
    """Measure the arms of one form and enter the results in their rows. Calls `report` before each arm's set-up and each round.
    Raises DeviceLost."""
    device = torch.device(options.device)
    report(f"{form}: data")
    problem = attempt(rows, "no data: ", partial(new_problem, form, options))
    clean_up(device, f"{form}: data")
    if problem is None:
        return
    runs: dict[int, Run] = {}
    for index, (arm, row) in enumerate(zip(arms, rows, strict=True)):
        report(f"{form}: {arm.name}" + (", in place" if arm.in_place and not arm.is_bound else ""))
        run = attempt([row], "", partial(set_up, arm, problem, row, options.warmup))
        if run is not None:
            runs[index] = run
        del run
        clean_up(device, f"{form}: {arm.name}")
    times: list[list[float]] = [[] for _ in arms]
    # On a GPU `clean_up` has emptied the allocator, which finds its blocks again in an untimed turn.
    for turn in range(0 if device.type == "cpu" else -1, options.rounds):
        report(f"{form}: round {turn + 1} of {options.rounds}")
        waiting = [rows[index] for index in runs]
        if not attempt(waiting, f"round {turn + 1}, new data: ", partial(refilled, problem, options.seed + 1 + turn)):
            break
        for index in random.Random(turn).sample(list(runs), len(runs)):
            elapsed = attempt([rows[index]], f"round {turn + 1}: ", partial(elapsed_ms, runs[index], problem))
            if elapsed is None:
                del runs[index]
                clean_up(device, f"{form}: {arms[index].name}, round {turn + 1}")
            elif turn >= 0:
                times[index].append(elapsed)
        add_times(rows, times)
    clean_up(device, f"{form}: the last round")


def new_problem(form: Form, options: argparse.Namespace) -> Problem:
    """The problem of one form, with data."""
    size = (options.tokens, options.vocab, options.hidden, DTYPES[options.dtype], torch.device(options.device))
    top_k = options.top_k if form == "top_k" else 0
    problem = Problem(form, *size, length=min(LENGTH, options.tokens), top_k=top_k)
    return refilled(problem, options.seed)


def refilled(problem: Problem, seed: int) -> Problem:
    """The problem itself, with new data."""
    problem.refill(seed)
    return problem


def set_up(arm: Arm, problem: Problem, row: Row, warmup: int) -> Run:
    """Build an arm; enter the error of its gradient, its peak memory and a first time in the row. Raises FloatingPointError if it
    gives NaN."""
    run = arm.make(problem)
    error = gradient_error(arm, run, problem)
    if error is not None and not math.isfinite(error):
        raise FloatingPointError("the gradient is not finite")
    row["gradient_error"] = error
    row["set_up_ms"] = min((elapsed_ms(run, problem) for _ in range(warmup)), default=None)
    problem.restore()
    row["peak_extra_bytes"] = peak_extra_bytes(partial(finish, run), problem.device)
    return run


def chosen(names: Sequence[str] | None, forms: Sequence[Form]) -> list[Arm]:
    """Arms of these forms by name or by the part before the slash, and the bounds. Raises ValueError for an unknown name."""
    known = {key for arm in ARMS for key in (arm.name, arm.name.partition("/")[0])}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"no arm is called {', '.join(unknown)}: choose among {', '.join(dict.fromkeys(a.name for a in ARMS))}")
    wanted = {*(names or known), *BOUNDS.values()}
    arms = [arm for arm in ARMS if {arm.name, arm.name.partition("/")[0]} & wanted]
    return [arm for form in forms for arm in arms if arm.form == form]


def forms_of(options: argparse.Namespace) -> list[Form]:
    """The forms that the flags ask for. Raises ValueError for a form without its size, and if none is left."""
    able: list[Form] = ["logits", *(["top_k"] if options.top_k else []), *(["hidden"] if options.hidden else [])]
    if missing := [form for form in options.forms or () if form not in able]:
        raise ValueError(f"--forms {missing[0]} needs --{missing[0].replace('_', '-')}: give its size")
    return [form for form in able if form in (options.forms or able)]


def gpu_problem(options: argparse.Namespace) -> str | None:
    """The reason why the GPU cannot take the problem, and what to change; None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device was found: use --device cpu"
    try:
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        free, _ = torch.cuda.mem_get_info()
    except RuntimeError as error:
        return f"the CUDA device does not answer ({one_line(error)}): use --device cpu"
    if torch.version.cuda is not None and capability < OLDEST_CAPABILITY:
        return f"{name} has compute capability {capability[0]}.{capability[1]}, below 8.0: use --device cpu"
    numbers = max(2 * options.tokens * options.vocab, (options.tokens + options.vocab) * options.hidden)
    if (needed := numbers * DTYPES[options.dtype].itemsize) > free:
        return f"the data take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the GPU are free: give fewer --tokens"
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with the defaults of the device filled in. Exits with status 2 if they are invalid."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="dtype of the logits; default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--tokens", type=int, help=f"a multiple of {LENGTH}, or fewer; default: 2048 on a CPU, 8192 on a GPU")
    parser.add_argument("--vocab", type=int, help="default: 32000 on a CPU, 151936 on a GPU")
    parser.add_argument("--hidden", type=int, default=0, help="hidden size; 0 (default): no arms from hidden states")
    parser.add_argument("--forms", nargs="+", choices=tuple(get_args(Form)), help="forms to measure (default: all with a size)")
    parser.add_argument("--top-k", type=int, default=0, help="ids of a top-k support (paper: 100); 0 (default): no such arms")
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
    parser.add_argument("--json", type=Path, help="file for the results, kept up to date while the program runs")
    parser.add_argument("--chart", type=Path, help="file for a chart of the results, as PNG")
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    options.tokens = options.tokens or (8192 if on_gpu else 2048)
    options.vocab = options.vocab or (151936 if on_gpu else 32000)
    if options.tokens > LENGTH and options.tokens % LENGTH:
        parser.error(f"--tokens is {options.tokens}, not a whole number of sequences: give a multiple of {LENGTH}, or fewer")
    if min(options.tokens, options.vocab, options.rounds) < 1 or min(options.hidden, options.warmup) < 0:
        parser.error("--tokens, --vocab and --rounds must be positive, --hidden and --warmup not negative")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}: give 1 or more, or leave it out for all cores")
    if not 0 <= options.top_k <= options.vocab:
        parser.error(f"--top-k is {options.top_k}: give at most {options.vocab} (--vocab), or 0 for no such arms")
    if on_gpu and (reason := gpu_problem(options)):
        parser.error(reason)
    try:
        chosen(options.arms, forms_of(options))
        for path in filter(None, (options.json, options.chart)):
            path.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 1 if one of our arms or a bound failed or a file could not be written, 130 after Ctrl-C."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    begin = time.perf_counter()
    forms = forms_of(options)
    arms = chosen(options.arms, forms)
    size = {name: getattr(options, name) for name in ("dtype", "tokens", "vocab", "hidden", "top_k")}
    results = [new_row(arm, arm.form, size) for arm in arms]
    outcome = {
        "complete": False,
        "doing": None,
        "machine": machine(options.device),
        "versions": versions(arms),
        "commit": commit(),
        "command": " ".join(["python", "bench/loss_kernel.py", *(sys.argv[1:] if argv is None else argv)]),
        "loss": {"clip_eps": CLIP, "kl_coef": BETA, "temperature": TEMPERATURE, "steps": STEPS, "sequence": LENGTH},
        "rounds": options.rounds,
        "seconds": 0.0,
        "results": results,
    }

    def report(doing: str | None) -> bool:
        """Print a line of progress and write the file. Returns False if that failed, which ends nothing."""
        if doing:
            say(doing)
        outcome["doing"], outcome["seconds"] = doing, round(time.perf_counter() - begin, 1)
        outcome["machine"] |= rates(results)
        try:
            if options.json:
                write(outcome, options.json)
        except OSError as error:
            say(f"{options.json} cannot be written: {error}")
            return False
        return True

    status = 0
    try:
        for form in forms:
            mine = [index for index, arm in enumerate(arms) if arm.form == form]
            measure(form, [arms[index] for index in mine], [results[index] for index in mine], options, report)
        outcome["complete"] = True
    except DeviceLost as error:
        outcome["complete"] = True  # nothing more can be measured
        for row in results:
            if not row["skipped"] and not row["failed"] and row["rounds"] < options.rounds:
                row["failed"] = str(error)
    except KeyboardInterrupt:
        say("interrupted: the table holds what was measured")
        status = 130
    if any(arm.must_run and row["failed"] for arm, row in zip(arms, results, strict=True)):
        status = status or 1
    if not report(None):
        status = status or 1
    print(table(results))
    if options.chart and not drawn(outcome, options.chart):
        status = status or 1
    return status


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def drawn(outcome: dict[str, Any], path: Path) -> bool:
    """Draw the chart. Returns False, after a line of the reason, if that cannot be done."""
    try:
        draw(outcome, path)
    except (ValueError, ImportError, OSError) as error:
        say(f"no chart: {one_line(error)}")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
