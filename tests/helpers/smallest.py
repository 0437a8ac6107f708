"""The settings of every program at its smallest, and the files that some of them read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import small_world as small

from srpo.core.config.demo import DemoConfig
from srpo.core.config.dpo import DpoConfig
from srpo.core.config.evaluation import BootstrapConfig, EvaluateConfig
from srpo.core.config.export import ExportConfig
from srpo.core.config.judge import JudgeConfig, JudgeGrpoConfig, MineConfig
from srpo.core.config.reproduce import ReproduceConfig, Scale
from srpo.core.config.selection import Criteria, SelectConfig
from srpo.core.config.start import StartConfig
from srpo.core.config.train import OptimizerConfig, PolicyConfig, RolloutConfig
from srpo.data.pairs import read_pairs
from srpo.experiments import lab as stages
from srpo.experiments.start import PROMPT

RUN = Path("run")  # the run folder, below the folder of each case
MODULES = {"ppo": "train", "scalar": "train_judge"}
PROGRAMS = ("train", "ppo", "sft", "dpo", "export", "select", "evaluate", "train_judge", "scalar", "start", "demo", "reproduce")


def _train(world: small.SmallWorld) -> Any:
    return world.config(
        RUN,
        num_steps=2,
        data={"eval": str(world.eval)},
        rollout={"num_prompts": 2, "group_size": 4, "max_new_tokens": 64},  # some responses are whole and earn a reward
        sampler={"difficulty_low": -1.0, "difficulty_high": 2.0},
        train={"checkpoint_every": 1, "keep_checkpoints": 1, "eval_examples": 2, "eval_every": 1, "best": "eval/parse_rate"},
    )


def _judge(world: small.SmallWorld) -> JudgeConfig:
    optimizer = OptimizerConfig(lr=1e-3)
    return JudgeConfig(
        run_dir=str(RUN),
        data=str(world.train),
        rollouts=str(world.folder / "faults" / "rollouts.jsonl"),
        annotator_reasons=False,
        held_out=2,
        num_votes=1,
        max_new_tokens=8,
        sft=replace(world.sft_config(RUN, num_steps=2, batch_size=2), data="", optimizer=optimizer),
        mine=MineConfig(num_responses=4, num_votes=2, num_cases=4, solve_low=-1.0, solve_high=2.0, balance=()),
        grpo=JudgeGrpoConfig(num_steps=1, rollout=RolloutConfig(num_prompts=2, group_size=2), optimizer=optimizer),
    )


def settings_of(program: str, world: small.SmallWorld) -> Any:
    """The settings of a program at its smallest, for the run folder `run`."""
    train = _train(world)
    if program == "train":
        return train
    if program == "ppo":
        return small.changed(train, {"advantage": {"method": "ppo"}})
    if program == "sft":
        return world.sft_config(RUN, num_steps=2, batch_size=4, checkpoint_every=1)
    if program == "dpo":
        policy = PolicyConfig(path=str(world.policy))
        return DpoConfig(
            run_dir=str(RUN),
            pairs=str(world.folder / "faults" / "pairs.jsonl"),
            num_steps=2,
            batch_size=2,
            checkpoint_every=1,
            policy=policy,
        )
    if program == "export":
        return ExportConfig(run_dir=str(world.folder / "faults" / "run"), out=str(RUN / "model"))
    if program == "select":
        criteria = Criteria(difficulty_low=-1.0, difficulty_high=2.0, uniform="keep")
        fields = vars(small.changed(train, {"data": {"train": str(world.eval), "eval": ""}}))
        return SelectConfig(**fields, shard_examples=4, select=criteria)
    if program == "evaluate":
        bootstrap = BootstrapConfig(num_draws=20)
        files: dict[str, Any] = {"checkpoint": str(world.policy), "data": str(world.eval), "out": str(RUN)}
        return EvaluateConfig(**files, limit=3, max_new_tokens=16, bootstrap=bootstrap)
    if program == "train_judge":
        return _judge(world)
    if program == "scalar":
        return replace(_judge(world), kind="scalar")
    if program == "start":
        rl: dict[str, Any] = {"rl_steps": 1, "num_prompts": 2, "group_size": 2, "eval_every": 1, "eval_examples": 2}
        sizes: dict[str, Any] = {"num_eval": 4, "num_demonstrations": 6, "num_own": 2, "max_new_tokens": 128}
        return StartConfig(
            str(world.train),
            str(world.policy),
            str(RUN),
            prompt=PROMPT,
            sft_batch=2,
            sft_steps=2,
            eval_frac=0.3,
            dev_frac=0.3,
            **rl,
            **sizes,
        )
    if program == "demo":
        sizes: dict[str, Any] = {"num_demonstrations": 40, "num_train": 16, "num_eval": 4, "model": small.TINY}
        rl: dict[str, Any] = {"rl_steps": 1, "num_prompts": 2, "group_size": 2, "max_new_tokens": 16}
        return DemoConfig(run_dir=str(RUN), **sizes, **rl, vocab_size=500, sft_steps=2, sft_batch=4)
    scale = Scale(num_steps=1, num_prompts=2, group_size=4, eval_examples=2, num_eval=2, dpo_prompts=24, dpo_steps=1)
    files = {"train.jsonl": world.train, "eval.jsonl": world.eval, "eval_balanced.jsonl": world.eval}
    stages.Lab.data = lambda self, name="train.jsonl": files[name]  # the stages before are those of the demo
    stages.Lab.sft = lambda self: world.policy
    return ReproduceConfig(table="table4", run_dir=str(RUN), seeds=(0,), scale=scale)


def make_inputs(world: small.SmallWorld) -> None:
    """Inputs of some programs: sampled responses, preferences, a run with checkpoints, in `faults` beside the world's data."""
    folder = world.folder / "faults"
    if folder.is_dir():
        return
    aside = folder.with_name("faults.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    cfg = small.changed(_train(world), {"run_dir": str(aside / "run"), "data": {"eval": ""}, "train": {"best": ""}})
    cfg = small.changed(cfg, {"rollout": {"num_prompts": 4}})
    import srpo.train

    srpo.train.train(cfg, small.ONE)
    shutil.copy(aside / "run" / "rollouts.jsonl", aside / "rollouts.jsonl")
    pairs = list(read_pairs(world.pairs))[:6]
    rows = [
        {"prompt": prompt, "chosen": right, "rejected": wrong}
        for (prompt, right), (_, wrong) in zip(pairs, pairs[1:] + pairs[:1], strict=True)
    ]
    (aside / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.rename(folder)
