"""Verdicts without a language model on judged pairs: `python bench/baselines.py PAIRS... [--seeds N] [--json FILE]`.

A fifth of the queries is held out (`split_by_query`); the baselines of `srpo.scores.baselines` are fitted on the other pairs.
Printed are accuracy and macro F1 in percent, with and without class weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the default, but not under PYTHONSAFEPATH

from revision import commit

from srpo.core.step_presets import PAPER
from srpo.data.readers import load_examples, split_by_query
from srpo.scores.baselines import KINDS, class_scores, judge

HELD_OUT = 0.2  # of the queries
CLASSES = PAPER.grades.names


def measure(path: Path, seed: int) -> dict[str, Any]:
    """Scores of every baseline on one split of a file."""
    train, held_out = split_by_query(load_examples(path, PAPER), HELD_OUT, seed)
    result: dict[str, Any] = {"train": len(train), "held_out": len(held_out)}
    for kind in KINDS:
        for balanced in (False, True) if kind != "majority" else (False,):
            verdicts = judge(kind, train, held_out, CLASSES, balanced=balanced).verdicts
            result[kind + ", class weights" * balanced] = class_scores(held_out, verdicts, CLASSES)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pairs", nargs="+", type=Path, help="files of graded pairs (docs/data.md)")
    parser.add_argument("--seeds", type=int, default=1, help="splits of each file (default 1)")
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    files = {}
    for path in options.pairs:
        runs = files[str(path)] = [measure(path, seed) for seed in range(options.seeds)]
        print(f"{path}: {runs[0]['train']} pairs, {runs[0]['held_out']} held out, mean of {len(runs)} splits")
        for name in (name for name in runs[0] if isinstance(runs[0][name], dict)):
            accuracy, macro = (100 * statistics.mean(run[name][key] for run in runs) for key in ("accuracy", "macro_f1"))
            print(f"  {name:30s} accuracy {accuracy:5.1f}  macro F1 {macro:5.1f}", flush=True)
    if options.json:
        text = json.dumps({"files": files, "commit": commit(), "command": " ".join(["python", *sys.argv])}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
