"""`srpo.train` without settings: a tiny policy on the built-in catalogue world, from nothing to a run of Algorithm 1."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from srpo.core.config.demo import DemoConfig
from srpo.core.config.train import Config
from srpo.core.run_dir import claim_run_dir
from srpo.core.run_lock import locks_run_dir
from srpo.experiments.start import make_base, make_data, sft_config, stage, train_config
from srpo.policy.parallel import Parallel
from srpo.sft import sft

WORLD = DemoConfig(run_dir="runs/world", num_demonstrations=20_000, num_train=4000, num_eval=512, sft_steps=500, rl_steps=30)
SAYS = """\
No settings are given, so this trains a tiny policy on the built-in catalogue world, in {run_dir}: demonstrations and a warm start
(some minutes on a CPU), then {num_steps} optimizer steps of SRPO. The same command again continues it.
Your own data and model, from a table to a judge:  python -m srpo.start FILE --model DIR
SRPO alone:  python -m srpo.train @ configs/verdict_only.toml --data.train FILE --policy.path DIR    (-h lists the settings)"""


@locks_run_dir
def first_run(world: DemoConfig, parallel: Parallel) -> Config:
    """Make data and warm start in the run folder, where they are not there yet, and return the settings of the run. Collective.

    The number of prompts is rounded up to a multiple of the processes.
    """
    run_dir, world_size = Path(world.run_dir), parallel.world_size
    if parallel.is_main:
        print(SAYS.format(run_dir=run_dir, num_steps=world.rl_steps), flush=True)
    claim_run_dir(run_dir / "first", world, parallel.is_main)

    def make() -> None:
        stage(run_dir / "data", "making the data", lambda out: make_data(world, out))
        stage(run_dir / "base", "making tokenizer and model", lambda out: make_base(world, run_dir / "data", out))

    parallel.on_main(make)
    policy = sft(sft_config(world), parallel)
    cfg = train_config(world, policy)
    num_prompts = math.ceil(cfg.rollout.num_prompts / world_size) * world_size
    return replace(cfg, rollout=replace(cfg.rollout, num_prompts=num_prompts))
