"""From judged pairs and a pretrained model to a better judge, in one command: `python -m srpo.start DATA --model DIR`.

It looks at the data, scores the model as it is, makes demonstrations (by the model itself if its responses are right, else from
templates), trains with SFT and SRPO, keeps the best policy, and reports on held-out queries beside the majority's answer and a
regression on words. Each stage leaves its result in the run folder, so the same command continues a stopped one. `--check` only
looks.
"""

from __future__ import annotations

from srpo.core.config.start import StartConfig
from srpo.core.errors import UserError
from srpo.core.settings import check_command_line, check_one_process, run_program

if __name__ == "__main__":
    check_command_line(StartConfig)  # -h and mistakes answer before torch is imported

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from srpo.core.batch import write_rollouts
from srpo.core.config.evaluation import BootstrapConfig
from srpo.core.config.sft import SftConfig
from srpo.core.config.train import (
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    RolloutConfig,
    SamplerConfig,
    TrainConfig,
)
from srpo.core.digests import digest_of, digest_of_data
from srpo.core.files import read_result, whole_file, write_result, write_whole
from srpo.core.metrics import read_metrics
from srpo.core.progress import Progress
from srpo.core.ranges import LARGEST_INT
from srpo.core.run_dir import claim_run_dir
from srpo.core.run_lock import locks_run_dir
from srpo.core.steps import StepSchema
from srpo.core.tables import percent
from srpo.data.balance import balanced
from srpo.data.checkpoint_tokens import stop_ids
from srpo.data.examples import Example
from srpo.data.pairs import write_pairs
from srpo.data.prompts import PromptForm, build_prompt
from srpo.data.readers import load_examples, write_examples
from srpo.data.silver import Lexicon, silver_gold, silver_response
from srpo.data.splits import split_by_query, spread_over_queries
from srpo.data.survey import survey
from srpo.data.tokenizer import encode, encode_prompts, load_tokenizer
from srpo.experiments.start import stage
from srpo.policy.folder import read_config
from srpo.policy.forward import context_of
from srpo.policy.grade_probs import grade_probs
from srpo.policy.loading import model_size
from srpo.policy.model import Policy, load_policy
from srpo.policy.parallel import Parallel, distributed
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.rollout.rollouts import to_rollouts
from srpo.scores.plots import write_plots
from srpo.scores.ranking import ranking_scores
from srpo.scores.stages import NAMES, stages_table, words
from srpo.scores.tables import before_after_table
from srpo.scores.tally import true_grades
from srpo.sft import sft
from srpo.train import train
from srpo.training.checks import check_prompt_lengths
from srpo.training.evaluation import evaluate_policy
from srpo.training.inputs import model_inputs, starting_policy

_NAMES = {  # settings of the stages and of this program
    "policy.path": "--model",
    "data.prompt": "--prompt",
    "data.guidelines": "--guidelines",
    "data.columns": "--columns",
    "rollout.max_new_tokens": "--max-new-tokens",
    "train.micro_batch_tokens": "--micro-batch-tokens",
    "check data.train and data.eval": "check the path",
}
SMALL = 1_000_000_000  # parameters below which a model stands the larger learning rates


@locks_run_dir
def start(cfg: StartConfig, parallel: Parallel) -> dict[str, Any]:
    """Run the stages that are not done yet. Returns the contents of `results.json`."""
    run_dir = Path(cfg.run_dir)
    train_pairs, dev_pairs, eval_pairs = look(cfg)
    guidelines = digest_of([form_of(cfg).guidelines])
    inputs = {"the data": (cfg.data, digest_of_data(cfg.data)), "the guidelines": (cfg.guidelines, guidelines)}
    inputs |= model_inputs(starting_policy(replace(cfg.policy, path=cfg.model)))
    free, paths = ("check", "micro_batch_tokens"), ("data", "model", "guidelines", "policy.lora.start")
    claim_run_dir(run_dir / "start", cfg, parallel.is_main, free, inputs, paths)

    def make(out: Path) -> None:
        lexicon = Lexicon.from_examples(train_pairs)
        write_examples(out / "train.jsonl", labelled(train_pairs, lexicon, cfg.schema) if cfg.read_labels else train_pairs)
        write_examples(out / "dev.jsonl", dev_pairs)
        write_examples(out / "eval.jsonl", eval_pairs)

    stage(run_dir / "data", "splitting the data by query", make)
    results = {"before": scored(cfg, cfg.model, "before")}
    own = results["before"]["parse_rate"] >= cfg.min_parse_rate and cfg.num_own > 0
    stage(run_dir / "demonstrations", "making demonstrations", lambda out: demonstrate(cfg, train_pairs, own, out))
    policy = sft(sft_config(cfg), parallel)
    results["sft"] = scored(cfg, policy, "sft")
    if not results["sft"]["parse_rate"]:
        raise UserError("no response parses after SFT, so nothing earns a reward: raise sft_steps or sft_lr, in another run_dir")
    train(train_config(cfg, policy), parallel)
    results["after"] = scored(cfg, run_dir / "rl" / "policy-best", "after")
    return report(cfg, results)


def look(cfg: StartConfig) -> tuple[list[Example], list[Example], list[Example]]:
    """(pairs to train on, pairs that choose the best policy, pairs of the final scores), each of other queries, after saying what
    was found in data and model. Raises UserError for what cannot work."""
    if not cfg.data or not cfg.model:
        raise UserError("give judged pairs and a model: python -m srpo.start pairs.csv --model DIR")
    if cfg.policy.path:
        raise UserError("the setting path of [policy] is set: name the model by --model alone")
    schema, form = cfg.schema, form_of(cfg)
    examples = read_pairs_of(cfg)
    tokenizer = load_tokenizer(cfg.model, cfg.policy.bos, cfg.policy.chat)
    print(f"{cfg.data}:")
    prompts = encode_prompts(tokenizer, examples, form)
    print("\n".join(f"  {line}" for line in survey(examples, cfg.grades, schema.names, prompts).lines()))
    context = min(cfg.policy.max_context or LARGEST_INT, context_of(read_config(cfg.model)))
    check_prompt_lengths(prompts, examples, SamplingParams(cfg.max_new_tokens), context, cfg.micro_batch_tokens)
    graded = [example for example in examples if example.grade is not None]
    if not graded:
        raise UserError(f"{cfg.data}: no pair has a grade: name the column of the grades, --columns grade=NAME")
    true_grades(graded, cfg.grades)
    lexicon = Lexicon.from_examples(graded)
    longest = max(len(encode(tokenizer, silver_response(example, lexicon, schema))) + 1 for example in graded)
    if longest > cfg.max_new_tokens:
        raise UserError(f"demonstrations have up to {longest} tokens and max_new_tokens is {cfg.max_new_tokens}: raise it")
    others, eval_pairs = split_by_query(graded, cfg.eval_frac, cfg.seed)
    train_pairs, dev_pairs = split_by_query(others, cfg.dev_frac, cfg.seed + 1)
    print(
        f"  split by query: {len(train_pairs):,} pairs to train on, {len(dev_pairs):,} to choose the best policy, "
        f"{len(eval_pairs):,} for the scores of the report (--dev-frac, --eval-frac, --seed)"
    )
    return train_pairs, spread_over_queries(dev_pairs, cfg.seed), spread_over_queries(eval_pairs, cfg.seed)


def read_pairs_of(cfg: StartConfig) -> list[Example]:
    """All pairs of the data, without the fields that are left out."""
    return [
        replace(example, fields={name: value for name, value in example.fields.items() if name not in cfg.drop_fields})
        for example in load_examples(cfg.data, cfg.schema, columns=cfg.columns)
    ]


def labelled(pairs: Iterable[Example], lexicon: Lexicon, schema: StepSchema) -> list[Example]:
    """The pairs with the labels of category and attribute match that can be read off them; a label that a pair has stays."""
    return [replace(pair, gold=silver_gold(pair, lexicon, schema)) for pair in pairs]


def plan(cfg: StartConfig, train_pairs: Sequence[Example], _: Sequence[Example], eval_pairs: Sequence[Example]) -> list[str]:
    """The stages that would run on the parts of the data, one line per stage."""
    name, size = model_size(cfg.model)
    shown = min(cfg.num_eval or len(eval_pairs), len(eval_pairs))
    num = min(cfg.num_demonstrations, len(balanced(train_pairs, cfg.grades, cfg.seed)))
    return [
        f"model: {name} of {size / 1e6:,.3g} M parameters in {cfg.policy.dtype}",
        f"1. score the model as it is on {shown} held-out pairs",
        f"2. make {num:,} demonstrations, balanced over the grades: its own right responses if "
        f"at least {percent(cfg.min_parse_rate)} % of them parse, else templates",
        f"3. SFT: {cfg.sft_steps} steps of {cfg.sft_batch} responses, learning rate {sft_lr(cfg, size):g}",
        f"4. SRPO: {cfg.rl_steps} steps of {cfg.num_prompts} prompts x {cfg.group_size} responses, learning rate "
        f"{rl_lr(cfg, size):g}",
        f"5. score it again, and report in {cfg.run_dir}/report.md",
    ]


def form_of(cfg: StartConfig) -> PromptForm:
    """The form of the prompts."""
    return PromptForm.of(DataConfig(prompt=cfg.prompt, guidelines=cfg.guidelines), cfg.schema)


def sft_lr(cfg: StartConfig, size: int) -> float:
    """Peak learning rate of SFT for a model of `size` parameters."""
    return cfg.sft_lr or (3e-4 if size < SMALL else 1e-5)


def rl_lr(cfg: StartConfig, size: int) -> float:
    """Peak learning rate of SRPO for a model of `size` parameters."""
    return cfg.rl_lr or (1e-5 if size < SMALL else 1e-6)


# ---- the stages ----------------------------------------------------------------------------------------------------------------


def scored(cfg: StartConfig, policy: str | Path, name: str) -> dict[str, Any]:
    """Results of a policy on the held-out pairs, with `ranking`: read from NAME.json in the run folder, or computed and written
    there, beside the responses in NAME.rollouts.jsonl."""
    path = Path(cfg.run_dir) / f"{name}.json"
    if not path.is_file():
        schema = cfg.schema
        examples = load_examples(Path(cfg.run_dir) / "data" / "eval.jsonl", schema, cfg.num_eval)
        tokenizer = load_tokenizer(policy, cfg.policy.bos, cfg.policy.chat)
        engine = open_engine(cfg, policy)
        results, rollouts = evaluate_policy(
            engine,
            tokenizer,
            schema,
            examples,
            form=form_of(cfg),
            max_new_tokens=cfg.max_new_tokens,
            batch_size=64,
            description=NAMES.get(name, name),
            by=(),
            bootstrap=BootstrapConfig(),
        )
        engine.close()
        model = Policy(open_model(cfg, policy)).to(device())
        probs = grade_probs(model, tokenizer, rollouts, schema, cfg.micro_batch_tokens)
        with whole_file(Path(cfg.run_dir) / f"{name}.rollouts.jsonl") as part:
            write_rollouts(part, rollouts, step=0)
        write_result(path, results | {"ranking": ranking_scores(probs, examples, cfg.grades)})
    return read_result(path)


def open_engine(cfg: StartConfig, policy: str | Path) -> LocalEngine:
    """An engine in this process with the weights of a checkpoint."""
    return LocalEngine(open_model(cfg, policy), device=device(), max_context=cfg.policy.max_context)


def open_model(cfg: StartConfig, policy: str | Path) -> Any:
    """The model of a checkpoint in the dtype of the settings."""
    return load_policy(policy, experts=cfg.policy.experts, dtype=getattr(torch, cfg.policy.dtype))


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def demonstrate(cfg: StartConfig, pairs: Sequence[Example], own: bool, out: Path) -> None:
    """Write sft.jsonl, a demonstration for each of `num_demonstrations` pairs balanced over the grades, and counts.json.

    own: ask the model first; of its responses to a pair the shortest that parses and has the human grade is taken.
    """
    schema, form = cfg.schema, form_of(cfg)
    lexicon = Lexicon.from_examples(pairs)
    chosen = balanced(pairs, cfg.grades, cfg.seed)[: cfg.num_demonstrations]
    texts = own_responses(cfg, chosen) if own else {}
    write_pairs(
        out / "sft.jsonl",
        (
            (build_prompt(example, form), texts.get(example.example_id) or silver_response(example, lexicon, schema))
            for example in chosen
        ),
    )
    num_own = sum(example.example_id in texts for example in chosen)
    counts = {"num_demonstrations": len(chosen), "num_own": num_own}
    write_whole(out / "counts.json", json.dumps(counts) + "\n")
    print(f"{len(chosen):,} demonstrations: {num_own:,} by the model itself, the others from templates", flush=True)


def own_responses(cfg: StartConfig, pairs: Sequence[Example]) -> dict[str, str]:
    """{example_id: text of the shortest right response} among `num_own` that the model samples to each pair."""
    schema, form, engine = cfg.schema, form_of(cfg), open_engine(cfg, cfg.model)
    tokenizer: Any = load_tokenizer(cfg.model, cfg.policy.bos, cfg.policy.chat)
    params = SamplingParams(cfg.max_new_tokens, group_size=cfg.num_own, stop_ids=stop_ids(tokenizer))
    unique = list({example.example_id: example for example in pairs}.values())
    found: dict[str, str] = {}
    with Progress("the model's own demonstrations", len(unique)) as bar:
        for first in range(0, len(unique), 16):
            chunk = unique[first : first + 16]
            prompts = encode_prompts(tokenizer, chunk, form)
            samples = engine.generate(prompts, params, seed=cfg.seed, numbers=range(first, first + len(chunk)))
            for rollout in to_rollouts(chunk, samples, prompts, schema, tokenizer, 0):
                example = chunk[rollout.group]
                right = rollout.finish == "stop" and rollout.answers[-1] == example.grade and None not in rollout.answers
                if right and len(rollout.text) < len(found.get(example.example_id, rollout.text + " ")):
                    found[example.example_id] = rollout.text
            bar.advance(len(chunk))
    return found


def sft_config(cfg: StartConfig) -> SftConfig:
    """Settings of SFT on the demonstrations."""
    run_dir = Path(cfg.run_dir)
    return SftConfig(
        run_dir=str(run_dir / "sft"),
        seed=cfg.seed,
        data=str(run_dir / "demonstrations" / "sft.jsonl"),
        num_steps=cfg.sft_steps,
        batch_size=cfg.sft_batch,
        micro_batch_tokens=cfg.micro_batch_tokens,
        checkpoint_every=100,
        steps=cfg.steps,
        grades=cfg.grades,
        verdict_weight=cfg.verdict_weight,
        policy=replace(cfg.policy, path=cfg.model),
        optimizer=OptimizerConfig(lr=sft_lr(cfg, model_size(cfg.model)[1]), warmup_steps=10, schedule="linear"),
    )


def train_config(cfg: StartConfig, policy: Path) -> Config:
    """Settings of Algorithm 1 on the labels of the data, balanced over the grades. An adapter goes on from that of SFT."""
    run_dir = Path(cfg.run_dir)
    lora = LoraConfig(start=str(run_dir / "sft" / "adapter"))
    model = replace(cfg.policy, path=cfg.model, lora=lora) if cfg.policy.lora.on else replace(cfg.policy, path=str(policy))
    return Config(
        run_dir=str(run_dir / "rl"),
        seed=cfg.seed,
        num_steps=cfg.rl_steps,
        steps=cfg.steps,
        grades=cfg.grades,
        data=DataConfig(
            train=str(run_dir / "data" / "train.jsonl"),
            eval=str(run_dir / "data" / "dev.jsonl"),
            prompt=cfg.prompt,
            guidelines=cfg.guidelines,
        ),
        policy=model,
        rollout=RolloutConfig(num_prompts=cfg.num_prompts, group_size=cfg.group_size, max_new_tokens=cfg.max_new_tokens),
        loss=LossConfig(kl_coef=cfg.kl_coef),
        optimizer=OptimizerConfig(lr=rl_lr(cfg, model_size(cfg.model)[1]), warmup_steps=3, schedule="linear"),
        sampler=SamplerConfig(balance=("grade",)),
        train=TrainConfig(
            micro_batch_tokens=cfg.micro_batch_tokens,
            checkpoint_every=20,
            eval_every=cfg.eval_every,
            eval_examples=cfg.eval_examples,
            best="eval/macro_f1",
        ),
    )


def report(cfg: StartConfig, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write report.md, results.json and plots/, and print the table. Returns the contents of results.json."""
    run_dir, schema = Path(cfg.run_dir), cfg.schema
    data = run_dir / "data"
    pairs, held_out = load_examples(data / "train.jsonl", schema), load_examples(data / "eval.jsonl", schema, cfg.num_eval)
    if found := words(pairs, held_out, cfg.grades):
        results = results | {"words": found}
    table = stages_table(results)
    print(table)
    parts = [f"# A judge from {Path(cfg.data).name}", "```", table, "```", "## All scores, after SFT and after SRPO", "```"]
    parts += [before_after_table(results["sft"], results["after"], schema), "```"]
    write_whole(run_dir / "report.md", "\n".join(parts) + "\n")
    summary = {"before": results["sft"], "after": results["after"], "as_it_is": results["before"], "words": results.get("words")}
    write_whole(run_dir / "results.json", json.dumps(summary, indent=1) + "\n")
    write_plots(run_dir / "plots", read_metrics(run_dir / "rl" / "metrics.jsonl"), schema, summary, run_dir.name)
    print(f"The judge is {run_dir / 'rl' / 'policy-best'}; the report is {run_dir / 'report.md'}")
    return summary


def main(cfg: StartConfig) -> None:
    """Look, or run all stages in this process."""
    check_one_process("srpo.start", "it runs in one process (srpo.train takes several)")
    if cfg.check:
        with _own_names():
            print("\n".join(plan(cfg, *look(cfg))))
    else:
        with _own_names():
            distributed(start)(cfg)


@contextmanager
def _own_names() -> Iterator[None]:
    """Errors of the stages with the names that this program's settings have."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for theirs, ours in _NAMES.items():
            message = message.replace(theirs, ours)
        raise type(error)(message) from error


if __name__ == "__main__":
    torch.set_num_threads(min(torch.get_num_threads(), 8))
    run_program(main, StartConfig)
