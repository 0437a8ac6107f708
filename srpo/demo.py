"""The whole method in miniature, in minutes on a laptop: `python -m srpo.demo`.

`make demo` runs it, too. On the catalogue world: a tokenizer, a tiny mixture-of-experts policy, an SFT warm start on imperfect
demonstrations, Stepwise Reward Policy Optimization, and scores on held-out pairs before and after it. Each stage leaves its
result in the run folder and is skipped if the result exists, so a stopped demo continues.
"""

from __future__ import annotations

from srpo.core.config.demo import DemoConfig
from srpo.core.settings import check_command_line, check_one_process, run_program

if __name__ == "__main__":
    check_command_line(DemoConfig)  # -h and mistakes answer before torch is imported

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from srpo.core.files import read_result, write_result, write_whole
from srpo.core.metrics import read_metrics
from srpo.core.run_dir import claim_run_dir
from srpo.core.run_lock import locks_run_dir
from srpo.core.step_presets import PAPER
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm
from srpo.data.readers import load_examples
from srpo.data.tokenizer import load_tokenizer
from srpo.experiments.start import PROMPT, make_base, make_data, sft_config, stage, train_config
from srpo.policy.model import load_policy
from srpo.policy.parallel import Parallel, distributed
from srpo.rollout.local import LocalEngine
from srpo.scores.plots import write_plots
from srpo.scores.tables import before_after_table
from srpo.sft import sft
from srpo.train import train
from srpo.training.evaluation import evaluate_policy


@locks_run_dir
def demo(cfg: DemoConfig, parallel: Parallel) -> dict[str, Any]:
    """Run the stages that are not done yet. Returns the contents of `results.json`."""
    run_dir = Path(cfg.run_dir)
    start, new = time.monotonic(), not (run_dir / "data").is_dir()
    claim_run_dir(run_dir / "demo", cfg, parallel.is_main)
    schema = PAPER
    stage(run_dir / "data", "making the data", lambda out: make_data(cfg, out))
    stage(run_dir / "base", "making tokenizer and model", lambda out: make_base(cfg, run_dir / "data", out))
    policy = sft(sft_config(cfg), parallel)
    train_cfg = train_config(cfg, policy)
    before = evaluated(cfg, policy, run_dir / "before.json", "evaluation before training", schema)
    policy = train(train_cfg, parallel)
    after = evaluated(cfg, policy, run_dir / "after.json", "evaluation after training", schema)
    minutes = (time.monotonic() - start) / 60
    results = {
        "before": before,
        "after": after,
        "seed": cfg.seed,
        "command": shlex.join(["python", "-m", "srpo.demo", *sys.argv[1:]]),
        "minutes": round(minutes, 1) if new else None,  # unknown for a demo that was stopped and continued
    }
    write_whole(run_dir / "results.json", json.dumps(results, indent=1) + "\n")
    write_plots(run_dir / "plots", read_metrics(run_dir / "metrics.jsonl"), schema, results, run_dir.name)
    print(before_after_table(before, after, schema))
    print(f"{minutes:.1f} minutes. Everything is in {run_dir}: policy/, plots/, results.json, metrics.jsonl")
    return results


def evaluated(cfg: DemoConfig, policy: Path, path: Path, title: str, schema: StepSchema) -> dict[str, Any]:
    """Results of a checkpoint on the held-out pairs: read from the file `path`, or computed and written there."""
    if not path.is_file():
        examples: list[Example] = load_examples(Path(cfg.run_dir) / "data" / "eval.jsonl", schema, cfg.num_eval)
        engine = LocalEngine(load_policy(policy))
        results, _ = evaluate_policy(
            engine,
            load_tokenizer(policy),
            schema,
            examples,
            form=PromptForm(PROMPT),
            max_new_tokens=cfg.max_new_tokens,
            batch_size=256,
            description=title,
        )
        write_result(path, results)
    return read_result(path)


def main(cfg: DemoConfig) -> None:
    """Run the demo in this process."""
    check_one_process("srpo.demo", "the demo runs in one process (srpo.train takes several)")
    distributed(demo)(cfg)


if __name__ == "__main__":
    torch.set_num_threads(min(torch.get_num_threads(), 8))
    run_program(main, DemoConfig)
