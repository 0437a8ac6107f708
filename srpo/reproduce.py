"""The paper's tables in miniature: `python -m srpo.reproduce table3`.

The tables are table1 to 6, 8, 9 and headline; `all` makes each of them. Trains the rows of a table that do not exist yet, over
several seeds, and prints the paper's numbers next to ours. Rows and starting checkpoints that several tables share are made once.
A run that was stopped continues when it is started again. Several processes may work on different seeds.
"""

from __future__ import annotations

from srpo.core.config.reproduce import ReproduceConfig
from srpo.core.errors import UserError
from srpo.core.settings import check_command_line, check_one_process, run_program

if __name__ == "__main__":
    check_command_line(ReproduceConfig)  # -h and mistakes answer before torch is imported

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from srpo.core.files import write_whole
from srpo.core.run_dir import claim_run_dir
from srpo.core.run_lock import FolderInUse, run_lock
from srpo.experiments.lab import Lab
from srpo.experiments.plots import plot_headline, plot_table
from srpo.experiments.recipes import RECIPES
from srpo.experiments.summary import headline, judge_scores_of, scores_of, summarize, table_text
from srpo.experiments.tables import TABLES
from srpo.policy.parallel import Parallel, distributed

HEADLINE = ("srpo", "srpo_discounted", "grpo")  # recipes of the headline table; the last one is the baseline
NAMES = (*TABLES, "headline")
OWN_CLAIM = {"judge_sft_steps": 0, "judge_grpo_steps": 0, "judge_lr": 0.0}  # checked in the judges' folders, not in the lab's


def reproduce(cfg: ReproduceConfig, parallel: Parallel) -> list[dict[str, Any]]:
    """Make the tables of `cfg.table`. Returns the contents of each `run_dir/<table>.json`.

    Only one process at a time writes tables; with `train_only` several may work, each on its own seeds.
    """
    with nullcontext() if cfg.train_only else run_lock(Path(cfg.run_dir), parallel):
        return _reproduce(cfg, parallel)


def _reproduce(cfg: ReproduceConfig, parallel: Parallel) -> list[dict[str, Any]]:
    run_dir, results = Path(cfg.run_dir), []
    for name in wanted(cfg):
        start = time.monotonic()
        outcome = make_headline(cfg, parallel) if name == "headline" else make_table(cfg, name, parallel)
        if cfg.train_only:
            continue
        minutes = (time.monotonic() - start) / 60
        result = {"table": name} | outcome | {"seeds": cfg.seeds, "scale": asdict(cfg.scale)} | evidence(minutes)
        write_whole(run_dir / f"{name}.json", json.dumps(result, indent=1) + "\n")
        results.append(result)
    return results


def wanted(cfg: ReproduceConfig) -> tuple[str, ...]:
    """Names of the tables of `cfg.table`. Raises UserError for an unknown name, and for missing or repeated seeds."""
    names = NAMES if cfg.table == "all" else (cfg.table,)
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"table is {unknown[0]!r}: set it to one of {', '.join(NAMES)}, or all")
    if not cfg.seeds or len(set(cfg.seeds)) < len(cfg.seeds):
        raise UserError(f"seeds is {list(cfg.seeds)}: give one or more seeds, each once")
    return names


def make_table(cfg: ReproduceConfig, name: str, parallel: Parallel) -> dict[str, Any]:
    """Make all rows of a table for all seeds. Returns their summary, prints it and draws `<name>.png`; {} with train_only."""
    table = TABLES[name]
    by_seed = []
    for seed in cfg.seeds:
        with lab_of(cfg, seed, parallel) as lab:
            if table.test_set == "judge":
                stages = lab.judge("generative")
                by_seed.append([judge_scores_of(stages[row.recipe]) for row in table.rows])
            else:
                by_seed.append([scores_of(lab.results(r.recipe, RECIPES[r.recipe], table.test_set)) for r in table.rows])
    if cfg.train_only:
        return {}
    summary = summarize(table, list(zip(*by_seed, strict=True)))
    print(table_text(table, summary, len(cfg.seeds)), flush=True)
    plot_table(Path(cfg.run_dir) / f"{name}.png", table, summary)
    return {"title": table.title, "test_set": table.test_set, "note": table.note, **summary}


def make_headline(cfg: ReproduceConfig, parallel: Parallel) -> dict[str, Any]:
    """Compare curves of macro F1 over sampled responses: SRPO with the hybrid reward against GRPO with the verdict's reward.

    Returns `headline` of the curves, prints it and draws `headline.png`; {} with train_only.
    """
    curves: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in HEADLINE}
    tests: dict[str, list[float]] = {name: [] for name in HEADLINE}
    for seed in cfg.seeds:
        with lab_of(cfg, seed, parallel) as lab:
            for name in HEADLINE:
                tests[name].append(lab.results(name, RECIPES[name], "wild")["macro_f1"])
                curves[name].append(lab.curve(name))
    if cfg.train_only:
        return {}
    comparison = headline(curves, tests, HEADLINE[-1])
    for name, rival in comparison["rivals"].items():
        for seed, ours, theirs in zip(cfg.seeds, rival["per_seed"], comparison["per_seed"], strict=True):
            share = ours["share"]
            reached = "never reaches that" if share is None else f"reaches that with {100 * share:.0f} % of the responses"
            end, test = ([f"{100 * scores[key]:.1f}" for scores in (theirs, ours)] for key in ("end", "test"))
            print(f"seed {seed}: final macro F1 of grpo {end[0]}, of {name} {end[1]}; {name} {reached};", end=" ")
            print(f"on the test set {test[0]} and {test[1]}")
    plot_headline(Path(cfg.run_dir) / "headline.png", curves)
    return comparison


@contextmanager
def lab_of(cfg: ReproduceConfig, seed: int, parallel: Parallel) -> Iterator[Lab]:
    """The lab of a seed, locked for this process. Raises UserError if another process has the lock or the scale differs."""
    root = Path(cfg.run_dir) / f"seed-{seed}"
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(root, parallel))
        except FolderInUse as error:
            raise UserError(f"another process works on seed {seed}: wait for it, or give other seeds ({error})") from error
        claim_run_dir(root, replace(cfg.scale, **OWN_CLAIM), parallel.is_main)
        yield Lab(root, seed, cfg.scale, parallel)


def evidence(minutes: float) -> dict[str, Any]:
    """Command, commit, versions and machine of a result, and the minutes of this call without those of earlier ones."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # not a checkout, or no git
        commit, changed = None, ""
    return {
        "command": shlex.join(["python", "-m", "srpo.reproduce", *sys.argv[1:]]),
        "commit": commit and commit + ("+changes" if changed else ""),
        "minutes": round(minutes, 1),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform()},
    }


def start_in_background(cfg: ReproduceConfig) -> None:
    """Start the same command in its own session; prints process id and log file. Raises UserError like `wanted`."""
    wanted(cfg)
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir / f"{cfg.table}.log"
    arguments = [argument for argument in sys.argv[1:] if argument != "--background"]
    with log.open("a") as out:
        command = [sys.executable, "-m", "srpo.reproduce", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    print(f"started process {process.pid}; its output goes to {log}")


def main(cfg: ReproduceConfig) -> None:
    """Make the tables, in this process or in the background."""
    check_one_process("srpo.reproduce", "start several processes with different --seeds instead")
    if cfg.background:
        start_in_background(replace(cfg, background=False))
    else:
        distributed(reproduce)(cfg)


if __name__ == "__main__":
    torch.set_num_threads(min(torch.get_num_threads(), 8))
    run_program(main, ReproduceConfig)
