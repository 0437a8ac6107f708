"""The command line of `python bench/gpu_proof`. Needs no package."""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from gpu_proof.report import write_report
from gpu_proof.runner import Entry, Runner
from gpu_proof.stages import STAGES
from gpu_proof.summary import line_of, summary

CHART_S = 7  # within runner.END_S
DRY_RUN = "the same code, small, on a CPU; a second one skips what passed; writes OUT, the state folder and compiled libraries"
KEPT = ("junit.xml",)  # files that a stage leaves in the state folder for OUT


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags. Exits with status 2 if they are invalid."""
    names = [stage.name for stage in STAGES]
    cache = Path(os.environ.get("SRPO_CACHE_DIR") or Path.home() / ".cache" / "srpo")
    parser = argparse.ArgumentParser(prog="gpu_proof", description="Proves this machine's GPU: docs/gpu_proof.md.")
    parser.add_argument("--deadline", type=float, default=600.0, metavar="SECONDS", help="end by then (default 600)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=[],
        metavar="STAGE",
        help=f"only these and what they wait for: {', '.join(names)}",
    )
    parser.add_argument("--again", nargs="+", choices=names, default=[], metavar="STAGE", help="stages to run though they passed")
    parser.add_argument("--out", type=Path, help="folder of the results (default: $OUT, else runs/gpu_proof)")
    parser.add_argument("--state", type=Path, help="folder that a second call goes on from (default: in ~/.cache/srpo)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels and zips to unpack for the stages")
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    options = parser.parse_args(argv)
    if not options.deadline >= 20:  # nan, too
        parser.error(f"--deadline is {options.deadline:g}: give at least 20 seconds")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels is {options.wheels}, which is no folder: give the folder that holds them")
    options.out = options.out or Path(os.environ.get("OUT") or "runs/gpu_proof")
    options.state = options.state or cache / ("gpu_proof_dry_run" if options.dry_run else "gpu_proof")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, print the summary, write the report. Exit code 0: something passed on the GPU, nothing failed, and all was
    written; 2 if OUT or the state folder cannot be written from the start."""
    options = parse(argv)
    out, state = options.out.resolve(), options.state.resolve()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # SIGABRT asks for stacks alone
    if options.wheels is not None:
        os.environ["GPU_PROOF_WHEELS"] = str(options.wheels.resolve())
    try:
        runner = Runner(STAGES, out, state, dry_run=options.dry_run, say=lambda entry: say(line_of(entry)), warn=say)
    except OSError as error:
        print(f"gpu_proof: {error}: give other folders with --out and --state", file=sys.stderr)
        return 2

    def interrupted(_number: int, _frame: FrameType | None) -> None:
        runner.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupted)
    runner.run(options.deadline, only=options.only, again=options.again)
    text = summary(STAGES, runner.entries, runner.key)
    say(text)
    written = _written(text, runner)
    statuses = {name: entry["status"] for name, entry in runner.entries.items()}
    fresh = {name: entry for name, entry in runner.entries.items() if entry["key"] == runner.key}
    proved = any(_proves(fresh[stage.name]) for stage in STAGES if stage.lane == "gpu" and stage.name in fresh)
    return 0 if proved and written and "failed" not in statuses.values() else 1


def _proves(entry: Entry) -> bool:
    """Whether a stage of the GPU has passed on it: the stage env passes without its first kernel, where torch has no CUDA."""
    parts = {part["part"]: part["status"] for part in entry.get("parts", ())}
    return entry["status"] == "ok" and parts.get("first_kernel", "ok") == "ok"


def _written(text: str, runner: Runner) -> bool:
    """Write the summary, what stages have left for OUT, the report and its chart; False, after a line, if that fails."""
    try:
        (runner.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
        for name in KEPT:
            if (runner.state / name).is_file():
                shutil.copy(runner.state / name, runner.out / name)
        for line in _charted(write_report(runner.entries, runner.key, runner.out, dry_run=runner.dry_run), runner):
            say(line)
    except OSError as error:
        say(f"the results are above, and not all in {runner.out}: {error}")
        return False
    return True


def say(text: str) -> None:
    """Print; a console that is gone must not cost a result."""
    with suppress(OSError):
        print(text, flush=True)


def _charted(paths: Sequence[Path], runner: Runner) -> list[str]:
    """Draw the result file, in a process of its own: matplotlib may be missing. Returns a line for each of its copies."""
    if not paths:
        return []
    command = [sys.executable, "-m", "gpu_proof.chart", str(paths[0])]
    env = runner.environment(paths[0], math.inf)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHART_S, env=env, check=False)
    except subprocess.TimeoutExpired:
        return [f"{path}, without a chart: drawing took more than {CHART_S} s" for path in paths]
    if done.returncode:
        return [f"{path}, without a chart: {(done.stderr.strip().splitlines() or ['?'])[-1]}" for path in paths]
    chart = paths[0].with_suffix(".png")
    for path in paths[1:]:
        shutil.copy(chart, path.with_suffix(".png"))
    return [f"{path} and its chart" for path in paths]
