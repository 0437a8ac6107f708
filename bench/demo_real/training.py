"""A stage of `make demo-real`: the settings that `srpo.start` has, for a split, an arm and a size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo_real.plan import Part, Sizes, Stage
from srpo.core.config.chat import ChatConfig
from srpo.core.config.start import StartConfig
from srpo.core.config.train import AdvantageConfig, Config, LoraConfig, PolicyConfig, TrainConfig
from srpo.core.files import read_result, write_result
from srpo.core.step_presets import PAPER
from srpo.data.readers import load_examples, write_examples
from srpo.data.silver import Lexicon
from srpo.data.splits import split_by_query, spread_over_queries
from srpo.data.world import World
from srpo.experiments.start import stage as make_once
from srpo.policy.parallel import init_parallel
from srpo.scores.baselines import KINDS, judge
from srpo.scores.stages import scores_of_verdicts
from srpo.sft import sft
from srpo.start import demonstrate, labelled, read_pairs_of, scored, sft_config, train_config
from srpo.train import train

PROMPT = "Query: {query}\nItem: {item}\n"  # no task and no chat template, a third of all tokens: demonstrations teach the steps
HELD_OUT = 0.2  # of the queries


def settings(part: Part, sizes: Sizes, model: str, runs: Path, columns: dict[str, str]) -> StartConfig:
    """The settings of `srpo.start` for a part."""
    lr = sizes.all_lr if part.all_weights else sizes.sft_lr
    return StartConfig(
        data=part.data,
        model=model,
        run_dir=str(runs / part.name),
        seed=part.seed,
        columns=columns,
        prompt=PROMPT,
        policy=PolicyConfig(
            dtype="bfloat16",
            chat=ChatConfig(template="off"),
            lora=LoraConfig(rank=0 if part.all_weights else sizes.lora_rank),
        ),
        eval_frac=HELD_OUT,
        num_eval=sizes.num_eval,
        num_demonstrations=2**31,
        num_own=0,
        max_new_tokens=sizes.max_new_tokens,
        sft_steps=part.sft_steps(sizes),
        sft_batch=sizes.sft_batch,
        sft_lr=lr,
        verdict_weight=sizes.verdict_weight,
        rl_steps=sizes.rl_steps,
        num_prompts=sizes.num_prompts,
        group_size=sizes.group_size,
        rl_lr=sizes.rl_share * lr,
        eval_every=0,
        micro_batch_tokens=2048,
    )


def run_stage(stage: Stage, sizes: Sizes, model: str, runs: Path, columns: dict[str, str]) -> None:
    """Run a stage that is not done yet; its result lies in the folder of its part."""
    cfg = settings(stage.part, sizes, model, runs, columns)
    run_dir = Path(cfg.run_dir)
    if stage.kind == "data":
        make_once(run_dir / "data", f"{stage.part.name}: splitting by query", lambda out: split(stage.part, cfg, sizes, out))
        baselines(cfg)
    elif stage.kind == "as_it_is":
        asked = replace(cfg, prompt=StartConfig().prompt, policy=replace(cfg.policy, chat=ChatConfig()))
        scored(replace(asked, num_eval=sizes.num_as_it_is), model, "as_it_is")
    elif stage.kind == "sft":
        pairs = load_examples(run_dir / "data" / "train.jsonl", cfg.schema)
        make_once(run_dir / "demonstrations", "making demonstrations", lambda out: demonstrate(cfg, pairs, False, out))
        scored(cfg, sft(sft_config(cfg), init_parallel()), "sft")
    else:
        scored(cfg, train(reinforcement(cfg, stage.kind), init_parallel()), stage.kind)


def split(part: Part, cfg: StartConfig, sizes: Sizes, out: Path) -> None:
    """Write pairs.jsonl, the pairs of the part's share of the training queries, train.jsonl, the same and those of the world, and
    eval.jsonl, the pairs of the held-out queries."""
    train_pairs, held_out = split_by_query([pair for pair in read_pairs_of(cfg) if pair.grade], HELD_OUT, part.seed)
    queries = list(dict.fromkeys(pair.query_id for pair in spread_over_queries(train_pairs, part.seed)))
    kept = set(queries[: math.ceil(part.share * len(queries))])
    chosen = [pair for pair in train_pairs if pair.query_id in kept]
    lexicon = Lexicon.from_examples(chosen)
    world = World(part.seed).examples("train", sizes.num_world) if sizes.num_world else ()
    write_examples(out / "pairs.jsonl", chosen)
    write_examples(out / "train.jsonl", [*labelled(chosen, lexicon, cfg.schema), *world])
    write_examples(out / "eval.jsonl", labelled(spread_over_queries(held_out, part.seed), lexicon, cfg.schema))


def baselines(cfg: StartConfig) -> None:
    """Write baselines.json: the scores of each baseline, with and without class weights, on the pairs that the model is scored
    on."""
    path = Path(cfg.run_dir) / "baselines.json"
    if path.is_file():
        return
    data = Path(cfg.run_dir) / "data"
    pairs = load_examples(data / "pairs.jsonl", cfg.schema)
    held_out = load_examples(data / "eval.jsonl", cfg.schema, cfg.num_eval)
    found: dict[str, Any] = {}
    for kind in KINDS:
        for balanced in (False, True)[: 1 if kind == "majority" else 2]:
            judged = judge(kind, pairs, held_out, cfg.grades.names, balanced=balanced)
            found[kind + ", class weights" * balanced] = scores_of_verdicts(judged, held_out, cfg.grades)
    write_result(path, found)


def reinforcement(cfg: StartConfig, kind: str) -> Config:
    """Settings of GRPO or SRPO from the policy after SFT: the same samples, steps and learning rate."""
    run_dir = Path(cfg.run_dir)
    config = train_config(cfg, run_dir / "sft" / "policy")
    method = AdvantageConfig(method="grpo") if kind == "grpo" else AdvantageConfig()
    last = TrainConfig(micro_batch_tokens=cfg.micro_batch_tokens, checkpoint_every=20)
    data = replace(config.data, eval="")
    return replace(config, run_dir=str(run_dir / kind), advantage=method, train=last, data=data)


def results_of(part: Part, runs: Path) -> dict[str, Any]:
    """All results of a part that there are, by the name of the stage."""
    names = ("baselines", "as_it_is", "sft", "grpo", "srpo")
    found: dict[str, Any] = {name: read_result(path) for name in names if (path := runs / part.name / f"{name}.json").is_file()}
    if (seconds := runs / part.name / "seconds.json").is_file():
        found["seconds"] = json.loads(seconds.read_text(encoding="utf-8"))
    if (pairs := runs / part.name / "data" / "pairs.jsonl").is_file():
        found["num_queries"] = len({pair.query_id for pair in load_examples(pairs, PAPER)})
    return found
