"""Does an adapter learn what all weights learn? `python bench/lora.py [--seeds 0 1 2] [--json FILE]`.

For each seed a run of `srpo.demo` on the catalogue world trains all weights by SRPO; a second run of `srpo.train` starts from the
same policy, on the same data, for as many optimizer steps, with `policy.lora`. Both are judged on the same held-out pairs.
Writes macro F1 before and after of each seed, and its mean over the seeds with the ratio adapter / full. A run that was stopped
goes on when the command is given again with the same --runs.

On two cores a seed takes about two runs of `srpo.demo` (docs/programs/demo.md). A try in seconds: `--tiny`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the default, but not under PYTHONSAFEPATH

from revision import commit

from srpo.core.config.demo import DemoConfig
from srpo.core.config.train import LoraConfig
from srpo.core.step_presets import PAPER
from srpo.demo import demo, evaluated
from srpo.experiments.start import train_config
from srpo.policy.checkpoint_folders import latest_checkpoint
from srpo.policy.parallel import init_parallel
from srpo.train import train

SCORES = ("macro_f1", "accuracy", "parse_rate")
TINY = {"num_demonstrations": 200, "num_train": 64, "num_eval": 32, "vocab_size": 700, "sft_steps": 30, "sft_batch": 16}
TINY |= {"rl_steps": 2, "num_prompts": 4, "group_size": 4}


def checkpoint_bytes(run_dir: Path) -> int:
    """Bytes of the last checkpoint of a run."""
    folder = latest_checkpoint(run_dir / "checkpoints")
    assert folder is not None
    return sum(path.stat().st_size for path in folder.iterdir())


def arms(cfg: DemoConfig, lora: LoraConfig, lr: float) -> dict[str, Any]:
    """The row of a seed: scores before training, and after it with all weights and with an adapter."""
    parallel, run_dir = init_parallel(), Path(cfg.run_dir)
    results = demo(cfg, parallel)
    full = train_config(cfg, run_dir / "sft" / "policy")
    adapter = replace(
        full,
        run_dir=str(run_dir / "lora"),
        policy=replace(full.policy, lora=lora),
        optimizer=replace(full.optimizer, lr=lr),
    )
    policy = train(adapter, parallel)
    after = evaluated(cfg, policy, run_dir / "after_lora.json", "evaluation of the adapter", PAPER)
    found = {"before": results["before"], "full": results["after"], "lora": after}
    row: dict[str, Any] = {name: {key: scores[key] for key in SCORES} for name, scores in found.items()}
    row["checkpoint_bytes"] = {"full": checkpoint_bytes(run_dir), "lora": checkpoint_bytes(run_dir / "lora")}
    return {"seed": cfg.seed, "num_steps": cfg.rl_steps, **row}


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean macro F1 over the seeds before and after, and the ratio of the two runs' means."""
    means = {name: sum(row[name]["macro_f1"] for row in rows) / len(rows) for name in ("before", "full", "lora")}
    return means | {"lora_over_full": means["lora"] / means["full"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=10 * DemoConfig().rl_lr, help="peak learning rate of the adapter")
    parser.add_argument("--runs", type=Path, default=Path("runs/lora"), help="folder of the runs")
    parser.add_argument("--tiny", action="store_true", help="sizes of a few seconds, whose scores mean nothing")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "lora.json")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        cfg = DemoConfig(run_dir=str(args.runs / f"seed-{seed}"), seed=seed)
        rows.append(arms(replace(cfg, **TINY) if args.tiny else cfg, LoraConfig(rank=args.rank), args.lr))
        machine = {"processor": platform.processor() or platform.machine(), "system": platform.system()}
        versions = {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "srpo")},
        }
        report = {"machine": machine, "versions": versions, "commit": commit(), "command": shlex.join(["python", *sys.argv])}
        report |= {"rank": args.rank, "lr": args.lr, "tiny": args.tiny, "mean_macro_f1": summary(rows), "seeds": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # after each seed
    print(json.dumps(report["mean_macro_f1"], indent=1))


if __name__ == "__main__":
    main()
