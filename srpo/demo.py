"""The whole method in miniature, in minutes on a laptop: `make demo`, or `python -m srpo.demo`.

On the catalogue world, or on real judged pairs (`--data PATH`): a tokenizer, a tiny mixture-of-experts policy, an SFT warm start
on imperfect demonstrations, Stepwise Reward Policy Optimization, and the same held-out pairs judged before and after. Each stage
leaves its result in the run folder and is skipped when it is there: a demo that was stopped continues.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from srpo.core.config.demo import DemoConfig
from srpo.core.config.sft import SftConfig
from srpo.core.config.train import (
    Config,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
    SamplerConfig,
    TrainConfig,
)
from srpo.core.metrics import read_metrics
from srpo.core.progress import Progress
from srpo.core.run_dir import claim_run_dir, write_whole
from srpo.core.settings import run_program
from srpo.core.steps import PAPER_STEPS, StepSchema
from srpo.data.examples import Example
from srpo.data.prompts import build_prompt
from srpo.data.readers import load_examples, read_examples, split_by_query, write_examples
from srpo.data.silver import Lexicon, silver_response
from srpo.data.teacher import teach
from srpo.data.tokenizer import load_tokenizer, train_tokenizer
from srpo.data.world import World
from srpo.evaluate import evaluate_policy
from srpo.policy.model import load_policy, make_tiny
from srpo.policy.parallel import Parallel, init_parallel
from srpo.report import before_after_table
from srpo.rollout.local import LocalEngine
from srpo.scores.evaluation import true_grades
from srpo.scores.plots import write_plots
from srpo.sft import read_pairs, sft, write_pairs
from srpo.train import train

PROMPT = DataConfig().prompt
# Fixed texts of prompts and responses: one token each.
PHRASES = (
    "Query: ", "\nItem: ", "\nbrand: ", "\ncolor: ", "\ncategory: ", "\ntext: ",
    "1. Query intent: ", "\n2. Item: ", "\n3. Category match: ", "\n4. Attribute match: ", "\n5. Verdict: ",
)  # fmt: skip


def demo(cfg: DemoConfig, parallel: Parallel) -> dict[str, Any]:
    """Run every stage that is not done yet; returns what `results.json` holds."""
    run_dir = Path(cfg.run_dir)
    start, new = time.monotonic(), not (run_dir / "data").is_dir()
    claim = run_dir / "demo"
    if not new:  # data that could not be read leave the folder free for other settings
        claim_run_dir(claim, cfg, parallel.is_main)
    schema = StepSchema(PAPER_STEPS)
    stage(run_dir / "data", "making the data", lambda out: make_data(cfg, out))
    claim_run_dir(claim, cfg, parallel.is_main)
    stage(run_dir / "base", "making tokenizer and model", lambda out: make_base(cfg, run_dir / "data", out))
    policy = sft(sft_config(cfg), parallel)
    train_cfg = train_config(cfg, policy)
    before = evaluated(cfg, policy, run_dir / "before.json", "judging held-out pairs, before", schema)
    policy = train(train_cfg, parallel)
    after = evaluated(cfg, policy, run_dir / "after.json", "judging held-out pairs, after", schema)
    minutes = (time.monotonic() - start) / 60
    results = {
        "before": before,
        "after": after,
        "seed": cfg.seed,
        "command": shlex.join(["python", "-m", "srpo.demo", *sys.argv[1:]]),
        "minutes": round(minutes, 1) if new else None,  # of a demo that was stopped only the last part is known
    }
    write_whole(run_dir / "results.json", json.dumps(results, indent=1) + "\n")
    write_plots(run_dir / "plots", read_metrics(run_dir / "metrics.jsonl"), schema, results, run_dir.name)
    print(before_after_table(before, after, schema))
    print(f"{minutes:.1f} minutes. Everything is in {run_dir}: policy/, plots/, results.json, metrics.jsonl")
    return results


def stage(out: Path, title: str, make: Callable[[Path], None]) -> None:
    """Make the folder `out` unless it is there; it appears under its name only when whole."""
    if out.is_dir():
        return
    print(title, flush=True)
    aside = out.with_name(out.name + ".tmp")
    aside.mkdir(parents=True, exist_ok=True)
    make(aside)
    aside.rename(out)


def make_data(cfg: DemoConfig, out: Path) -> None:
    """train.jsonl and eval.jsonl of pairs, sft.jsonl of demonstrations."""
    if cfg.data:
        read = read_examples(cfg.data, len(PAPER_STEPS), options=[spec.options for spec in PAPER_STEPS])
        pairs = [replace(e, fields={k: v for k, v in e.fields.items() if k not in cfg.drop_fields}) for e in read]
        train_pairs, eval_pairs = split_by_query(pairs, cfg.eval_frac, cfg.seed)
        true_grades(eval_pairs)  # an ungraded one stops the demo here and not after the warm start
        lexicon = Lexicon.from_examples(train_pairs)
        write_examples(out / "train.jsonl", train_pairs)
        write_examples(out / "eval.jsonl", eval_pairs)
        shown, num_shown, teacher = iter(train_pairs), len(train_pairs), partial(silver_response, lexicon=lexicon)
    else:
        world = World(cfg.seed)
        write_examples(out / "train.jsonl", world.examples("train", cfg.num_train, start=cfg.num_demonstrations))
        write_examples(out / "eval.jsonl", world.examples("wild", cfg.num_eval))
        write_examples(out / "eval_balanced.jsonl", world.examples("balanced", cfg.num_eval))
        shown, num_shown = world.examples("train", cfg.num_demonstrations), cfg.num_demonstrations
        teacher = partial(teach, bias=cfg.bias, seed=cfg.seed)
    with Progress("demonstrations", num_shown) as bar:

        def demonstrations() -> Iterator[tuple[str, str]]:
            for example in shown:
                yield build_prompt(example, PROMPT), teacher(example)
                bar.advance()

        write_pairs(out / "sft.jsonl", demonstrations())


def make_base(cfg: DemoConfig, data: Path, out: Path) -> None:
    """A tokenizer trained on the demonstrations and a policy that has learned nothing yet."""
    texts = [strip(prompt + response) for prompt, response in read_pairs(data / "sft.jsonl")]
    tokenizer = train_tokenizer(texts[:20_000], cfg.vocab_size, PHRASES)
    make_tiny(tokenizer, cfg.model, cfg.seed).save_pretrained(out)
    tokenizer.save_pretrained(out)


def strip(text: str) -> str:
    """The text without the fixed phrases, which are tokens of their own."""
    for phrase in PHRASES:
        text = text.replace(phrase, "\n")
    return text


def sft_config(cfg: DemoConfig) -> SftConfig:
    """The warm start."""
    run_dir = Path(cfg.run_dir)
    return SftConfig(
        run_dir=str(run_dir / "sft"),
        seed=cfg.seed,
        data=str(run_dir / "data" / "sft.jsonl"),
        num_steps=cfg.sft_steps,
        batch_size=cfg.sft_batch,
        checkpoint_every=200,
        policy=PolicyConfig(path=str(run_dir / "base")),
        optimizer=OptimizerConfig(lr=cfg.sft_lr, warmup_steps=30, schedule="linear", min_lr_frac=0.1),
    )


def train_config(cfg: DemoConfig, policy: Path) -> Config:
    """Algorithm 1 on hybrid step rewards. Real pairs have neither labels for S1 to S4 nor an annotator: the verdict is
    rewarded."""
    run_dir = Path(cfg.run_dir)
    steps = PAPER_STEPS
    if cfg.data:
        steps = tuple(replace(spec, sources=("gold", "skip")) for spec in steps)
    return Config(
        run_dir=str(run_dir),
        seed=cfg.seed,
        num_steps=cfg.rl_steps,
        steps=steps,
        data=DataConfig(train=str(run_dir / "data" / "train.jsonl"), eval=str(run_dir / "data" / "eval.jsonl"), prompt=PROMPT),
        policy=PolicyConfig(path=str(policy)),
        rollout=RolloutConfig(num_prompts=cfg.num_prompts, group_size=cfg.group_size, max_new_tokens=cfg.max_new_tokens),
        reward=RewardConfig(judge="none" if cfg.data else "oracle", judge_error_rate=cfg.judge_error_rate),
        advantage=cfg.advantage,
        loss=LossConfig(kl_coef=cfg.kl_coef),
        optimizer=OptimizerConfig(lr=cfg.rl_lr, warmup_steps=3, schedule="linear", min_lr_frac=0.1),
        sampler=SamplerConfig(),
        train=TrainConfig(micro_batch_tokens=4096, checkpoint_every=15, eval_every=cfg.eval_every, eval_examples=256),
    )


def evaluated(cfg: DemoConfig, policy: Path, path: Path, title: str, schema: StepSchema) -> dict[str, Any]:
    """Results of a checkpoint on the held-out pairs, kept in a file."""
    if not path.is_file():
        examples: list[Example] = load_examples(Path(cfg.run_dir) / "data" / "eval.jsonl", schema.num_steps, cfg.num_eval)
        engine = LocalEngine(load_policy(policy))
        results, _ = evaluate_policy(
            engine,
            load_tokenizer(policy),
            schema,
            examples,
            prompt_template=PROMPT,
            max_new_tokens=cfg.max_new_tokens,
            batch_size=256,
            description=title,
        )
        write_whole(path, json.dumps(results, indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def main(cfg: DemoConfig) -> None:
    """The program."""
    parallel = init_parallel()
    try:
        if parallel.world_size > 1:
            raise ValueError("the demo is one process: start it without torchrun (srpo.train takes several)")
        demo(cfg, parallel)
    finally:
        parallel.close()


if __name__ == "__main__":
    torch.set_num_threads(min(torch.get_num_threads(), 8))
    run_program(main, DemoConfig)
