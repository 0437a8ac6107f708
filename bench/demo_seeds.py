"""Gains of `python -m srpo.demo --seed S` over several seeds: `python bench/demo_seeds.py RUN_DIR... [--json FILE]`.

Reads the `results.json` of finished demo runs and prints, for each seed, macro F1 before and after on the held-out queries and
the change in accuracy of each reasoning step, then whether every seed gains at least ten points of macro F1 with no step worse.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

KEYS = ("macro_f1", "accuracy", "good_f1", "class_f1", "step_accuracy", "parse_rate", "num_examples")


def read(run_dir: Path) -> dict[str, Any]:
    """The part of a run's results that the report keeps."""
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    kept = {when: {key: results[when][key] for key in KEYS} for when in ("before", "after")}
    return {"seed": results["seed"], "command": results["command"], "minutes": results["minutes"], **kept}


def changes(run: dict[str, Any]) -> tuple[float, list[float]]:
    """(gain in macro F1, change in accuracy of each step), in points."""
    before, after = run["before"], run["after"]
    steps = [100 * (b - a) for a, b in zip(before["step_accuracy"], after["step_accuracy"], strict=True)]
    return 100 * (after["macro_f1"] - before["macro_f1"]), steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs = sorted((read(run_dir) for run_dir in args.run_dirs), key=lambda run: run["seed"])
    for run in runs:
        gain, steps = changes(run)
        scores = [100 * run[when]["macro_f1"] for when in ("before", "after")]
        print(
            f"seed {run['seed']}: macro F1 {scores[0]:.1f} -> {scores[1]:.1f} ({gain:+.1f}), steps "
            + " ".join(f"{change:+.1f}" for change in steps)
        )
    holds = all(gain >= 10 and min(steps) >= 0 for gain, steps in map(changes, runs))
    print(f"at least ten points in each of {len(runs)} seeds and no step worse: {'yes' if holds else 'NO'}")
    if args.json:
        machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "system": platform.system()}
        versions = {name: version(name) for name in ("torch", "transformers", "numpy", "srpo")}
        report = {"machine": machine, "versions": {"python": platform.python_version(), **versions}, "holds": holds, "runs": runs}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
