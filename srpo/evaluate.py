"""How right a judge is on graded pairs: `python -m srpo.evaluate --checkpoint DIR --data FILE`, or the same under torchrun.

Decodes greedily, or scores what is there already: `--rollouts FILE` or `--predictions FILE`. Prints the scores of 5.1.2, the
accuracy of each step and how verdict and steps go together, with bootstrap intervals over queries, for all pairs and each query
type; writes `results.json`, `predictions.jsonl` and `rollouts.jsonl`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from srpo.core.batch import Rollout, write_rollouts
from srpo.core.config.evaluation import BootstrapConfig, EvaluateConfig
from srpo.core.config.train import Config
from srpo.core.progress import Progress
from srpo.core.run_dir import write_whole
from srpo.core.settings import apply_toml, check_one_process, run_program
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.prompts import build_prompt
from srpo.data.readers import load_examples
from srpo.data.tokenizer import encode, load_tokenizer
from srpo.policy.model import load_policy
from srpo.policy.parallel import Parallel, init_parallel
from srpo.report import results_table
from srpo.rollout.build import open_vllm
from srpo.rollout.engine import Engine, SamplingParams, check_prompts
from srpo.rollout.local import LocalEngine
from srpo.rollout.rollouts import to_rollouts
from srpo.scores.evaluation import predicted_grade, results_dict, true_grades
from srpo.scores.responses import from_predictions, from_rollouts, load_rollouts, read_predictions


def evaluate_policy(
    engine: Engine,
    tokenizer: Any,
    schema: StepSchema,
    examples: Sequence[Example],
    *,
    prompt_template: str,
    max_new_tokens: int,
    batch_size: int,
    parallel: Parallel | None = None,
    description: str = "evaluation",
    by: Sequence[str] = ("query_type",),
    bootstrap: BootstrapConfig | None = None,
) -> tuple[dict[str, Any], list[Rollout]]:
    """(results of `evaluation.results_dict`, the rollouts) of one greedy response per example, in the order of the examples.

    `by` and `bootstrap` are those of `results_dict`; training passes none: intervals cost it nothing.
    With `parallel` each rank decodes its share and all ranks return the same; every rank must call it. Raises ValueError for an
    example without a grade or whose prompt does not fit.
    """
    true_grades(examples)
    rank, world_size = (parallel.rank, parallel.world_size) if parallel is not None else (0, 1)
    stop_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    params = SamplingParams(max_new_tokens, temperature=1.0, top_k=0, group_size=1, stop_ids=stop_ids, greedy=True)
    mine = range(rank, len(examples), world_size)
    rollouts: dict[int, Rollout] = {}
    with Progress(description, len(mine), enabled=rank == 0) as bar:
        for first in range(0, len(mine), batch_size):
            chunk = mine[first : first + batch_size]
            chosen = [examples[i] for i in chunk]
            prompts = [encode(tokenizer, build_prompt(example, prompt_template)) for example in chosen]
            samples = engine.generate(prompts, params, seed=0)
            made = to_rollouts(chosen, samples, prompts, schema, tokenizer, engine.policy_version)
            rollouts |= {i: replace(rollout, group=i) for i, rollout in zip(chunk, made, strict=True)}
            bar.advance(len(chunk))
    if parallel is not None and world_size > 1:
        rollouts = {i: rollout for share in parallel.all_gather_object(rollouts) for i, rollout in share.items()}
    ordered = [rollouts[i] for i in range(len(examples))]
    return results_dict(ordered, examples, schema, by=by, bootstrap=bootstrap), ordered


def evaluate(config: EvaluateConfig, parallel: Parallel) -> None:
    """Decode or read, score, print and write; the ranks decode a share each, and the first one says and writes what they found.

    Raises ValueError for settings that do not say what to evaluate.
    """
    sources = [source for source in (config.checkpoint, config.rollouts, config.predictions) if source]
    if len(sources) != 1:
        raise ValueError("give one of --checkpoint DIR, --rollouts FILE and --predictions FILE")
    if config.engine != "local" and not config.checkpoint:
        raise ValueError(f"engine is {config.engine} and nothing is decoded: give --checkpoint DIR, or leave the engine out")
    source = Path(sources[0])
    if not source.exists():
        raise ValueError(f"no such file or folder: {source}")
    run = run_settings(source, config.config, say=parallel.is_main)
    schema = StepSchema(run.steps)
    data = config.data or run.data.eval
    if not data:
        raise ValueError("no data: give graded examples with --data FILE")
    limit = 0 if config.predictions else config.limit  # of predictions, one of no example at all is to be told from one past it
    examples = load_examples(data, schema.num_steps, limit, options=[spec.options for spec in schema.specs])
    check_tags((example.tags for example in examples), config.by)
    true_grades(examples[: config.limit or None])
    out = Path(config.out) if config.out else source.resolve().parent / "evaluation"
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, which is a file: name a folder")

    rollouts: list[Rollout] = []
    if config.checkpoint:
        results, rollouts = decode(config, run, schema, examples, parallel)
    else:
        if config.predictions:
            found = from_predictions(read_predictions(source, schema), examples, schema, config.limit)
        else:
            found = from_rollouts(load_rollouts(source), examples, schema)
            rollouts = found.rollouts
        if found.num_others:
            print(f"{found.num_others:,} rollouts are of pairs that are not evaluated, and are left out")
        schema = found.schema
        results = results_dict(found.rollouts, found.examples, schema, by=config.by, bootstrap=config.bootstrap)
    if parallel.is_main:
        print(results_table(results, schema))
        print(f"written to {write_evaluation(out, results, rollouts, examples)}")


def decode(
    config: EvaluateConfig, run: Config, schema: StepSchema, examples: Sequence[Example], parallel: Parallel
) -> tuple[dict[str, Any], list[Rollout]]:
    """`evaluate_policy` of the checkpoint, under the settings of its run. Collective.

    Raises ValueError for a prompt that does not fit, on all ranks and before any is decoded.
    """
    tokenizer = load_tokenizer(config.checkpoint)
    max_new_tokens = config.max_new_tokens or run.rollout.max_new_tokens
    engine = open_engine(config, run, parallel)
    prompts = [encode(tokenizer, build_prompt(example, run.data.prompt)) for example in examples]
    check_prompts(prompts, SamplingParams(max_new_tokens), engine.max_context, [example.example_id for example in examples])
    made = evaluate_policy(
        engine,
        tokenizer,
        schema,
        examples,
        prompt_template=run.data.prompt,
        max_new_tokens=max_new_tokens,
        batch_size=config.batch_size,
        parallel=parallel,
        by=config.by,
        bootstrap=config.bootstrap,
    )
    engine.close()  # not after an error: one that ranks share waits for all of them
    return made


def open_engine(config: EvaluateConfig, run: Config, parallel: Parallel) -> Engine:
    """The engine that decodes, with the weights of the checkpoint: nothing is ever synced into it. Collective where it is shared.

    Raises ValueError for settings that cannot work, ImportError where the engine is not installed.
    """
    dtype, max_context = getattr(torch, run.policy.dtype), run.policy.max_context
    if config.engine == "local":
        model = load_policy(config.checkpoint, experts=run.policy.experts, dtype=dtype)
        return LocalEngine(model, device=parallel.device, max_context=max_context)
    try:
        return open_vllm(config.checkpoint, parallel, dtype=dtype, max_context=max_context, config=config.vllm)
    except (ValueError, ImportError) as error:
        said = str(error).replace("rollout.vllm.", "vllm.").replace("rollout.engine", "engine")
        raise (ImportError if isinstance(error, ImportError) else ValueError)(said) from error


def check_tags(tags: Iterable[Mapping[str, str]], by: Sequence[str]) -> None:
    """Raise ValueError for a tag of `by`, other than the default one, that is in none of `tags` (of examples or queries)."""
    known = sorted({tag for carried in tags for tag in carried})
    for tag in by:
        if tag not in known and tag not in EvaluateConfig.by:
            raise ValueError(f"by: nothing carries the tag {tag!r}; tags of the data: {', '.join(known) or 'none'}")


def run_settings(source: Path, config: str, say: bool = True) -> Config:
    """The settings that `source` is evaluated under; prints whence they are, where it may `say` so.

    Those of the TOML `config`; else of the training run in whose folder `source` lies (up to three folders deep); else the
    defaults.
    """
    if config:
        return apply_toml(Config(), Path(config))
    for folder in source.resolve().parents[:4]:
        path = folder / "config.toml"
        if path.is_file() and tomllib.loads(path.read_text(encoding="utf-8")).keys() >= {"steps", "rollout"}:
            if say:
                print(f"steps, prompt and lengths as in {path}")
            return apply_toml(Config(), path)
    if say:
        print("no config.toml of a training run around it: steps, prompt and lengths are the defaults")
    return Config()


def write_evaluation(out: Path, results: dict[str, Any], rollouts: Sequence[Rollout], examples: Sequence[Example]) -> Path:
    """Write results.json and, where there are responses, predictions.jsonl and rollouts.jsonl into `out`; returns it."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
    if rollouts:
        grades = {example.example_id: example.grade for example in examples}
        with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for r in rollouts:
                grade = grades[r.example_id]
                row = {"example_id": r.example_id, "prediction": predicted_grade(r), "grade": grade, "answers": r.answers}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        (out / "rollouts.jsonl").unlink(missing_ok=True)
        write_rollouts(out / "rollouts.jsonl", rollouts, step=0)
    return out


def main(config: EvaluateConfig) -> None:
    """The program."""
    if not config.checkpoint:
        check_one_process("srpo.evaluate on --rollouts or --predictions", "nothing is decoded that ranks could share")
    parallel = init_parallel()
    try:
        evaluate(config, parallel)
    finally:
        parallel.close()


if __name__ == "__main__":
    run_program(main, EvaluateConfig)
