"""Scores of a policy on graded pairs: `python -m srpo.evaluate --checkpoint DIR --data FILE`.

Decodes greedily, alone or under torchrun, or scores existing responses: `--rollouts FILE` or `--predictions FILE`. Prints the
scores of 5.1.2, the accuracy of each step and the consistency of verdict and steps, with bootstrap intervals over queries, for
all pairs and for each query type. Writes `results.json`, `predictions.jsonl` and `rollouts.jsonl`.
"""

from __future__ import annotations

from srpo.core.config.evaluation import EvaluateConfig
from srpo.core.errors import UserError
from srpo.core.settings import check_command_line, check_one_process, run_program

if __name__ == "__main__":
    check_command_line(EvaluateConfig)  # -h and mistakes answer before torch is imported

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from srpo.core.batch import Rollout, write_rollouts
from srpo.core.config.train import Config
from srpo.core.digests import digest_of_model
from srpo.core.files import whole_file, write_whole
from srpo.core.run_dir import check_out, run_settings
from srpo.core.run_lock import hold
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm
from srpo.data.readers import load_examples, load_parts
from srpo.data.splits import spread_over_queries
from srpo.data.tokenizer import encode_prompts, load_tokenizer
from srpo.policy.checkpoint_folders import checkpoints, step_of
from srpo.policy.folder import check_stored
from srpo.policy.grade_probs import grade_probs
from srpo.policy.model import Policy, load_policy
from srpo.policy.parallel import Parallel, distributed
from srpo.rollout.build import open_vllm
from srpo.rollout.engine import Engine, SamplingParams, check_prompts
from srpo.rollout.local import LocalEngine
from srpo.scores.evaluation import check_tags, results_dict
from srpo.scores.ranking import ranking_scores
from srpo.scores.responses import from_predictions, from_rollouts, load_rollouts, read_predictions
from srpo.scores.tables import results_table
from srpo.scores.tally import true_grades
from srpo.training.evaluation import evaluate_policy

RESULTS, PREDICTIONS, ROLLOUTS = "results.json", "predictions.jsonl", "rollouts.jsonl"  # files in `out`


def evaluate(config: EvaluateConfig, parallel: Parallel) -> None:
    """Decode or read the responses, score them, and print and write the results. Collective.

    Each rank decodes its share; rank 0 prints and writes. Raises UserError for settings that cannot work.
    """
    sources = [source for source in (config.checkpoint, config.rollouts, config.predictions) if source]
    if len(sources) != 1:
        raise UserError("give one of --checkpoint DIR, --rollouts FILE and --predictions FILE")
    if config.engine != "local" and not config.checkpoint:
        raise UserError(f"engine is {config.engine}, but only a checkpoint is decoded: give --checkpoint DIR or no --engine")
    source = Path(sources[0])
    if not source.exists():
        raise UserError(f"no such file or folder: {source}")
    if config.checkpoint:
        check_is_model(source)
    run = run_settings(source, config.config, say=parallel.is_main)
    schema = run.schema
    data, columns = config.data or run.data.eval, config.columns or run.data.columns
    held_out = run.data.eval_frac if not data else 0.0  # of the run's data.train
    data = data or (run.data.train if held_out else "")
    if not data:
        raise UserError("no data: give graded examples with --data FILE")
    # Load every example for predictions: one for an unknown id is an error, one for an example beyond --limit is not.
    limit = 0 if config.predictions else config.limit
    if held_out:
        examples = spread_over_queries(load_parts(data, schema, held_out, columns)[1])[: limit or None]
    else:
        examples = load_examples(data, schema, limit, columns)
    check_tags((example.tags for example in examples), config.by)
    true_grades(examples[: config.limit or None], schema.grades)
    out = Path(config.out) if config.out else source.resolve().parent / "evaluation"
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {out}, which is a file: name a folder")
    check_out(out, (RESULTS, PREDICTIONS, ROLLOUTS), (*sources, data))

    rollouts: list[Rollout] = []
    if config.checkpoint:
        digest_of_model(config.checkpoint)  # UserError if it is not as it was written
        results, rollouts = decode(config, run, schema, examples, parallel)
    else:
        if config.predictions:
            responses = from_predictions(read_predictions(source, schema), examples, schema, config.limit)
        else:
            responses = from_rollouts(load_rollouts(source), examples, schema)
            rollouts = responses.rollouts
        if responses.num_others:
            print(f"left out {responses.num_others:,} rollouts of pairs that are not evaluated")
        schema = responses.schema
        results = results_dict(responses.rollouts, responses.examples, schema, by=config.by, bootstrap=config.bootstrap)
    if parallel.is_main:
        print(results_table(results, schema))
        print(f"written to {write_evaluation(out, results, rollouts, examples)}")


def check_is_model(folder: Path) -> None:
    """Raise UserError for a folder with the training state of a run, or with a run, in place of a model."""
    root = next(root for root in (folder, folder.parent, folder / "checkpoints") if root.name == "checkpoints")
    steps = checkpoints(root)
    if steps and not (folder / "config.json").exists():
        step = step_of(folder) or max(steps)
        raise UserError(
            f"{folder} holds the training state of a run and no model: write one with `python -m srpo.export {root.parent} "
            f"--step {step}`, and give {root.parent / 'export' / f'step_{step:06d}'}"
        )


def decode(
    config: EvaluateConfig, run: Config, schema: StepSchema, examples: Sequence[Example], parallel: Parallel
) -> tuple[dict[str, Any], list[Rollout]]:
    """`evaluate_policy` of the checkpoint with the settings of its run. Collective.

    Raises UserError on all ranks, before decoding, if a prompt does not fit into the context.
    """
    tokenizer = load_tokenizer(config.checkpoint, run.policy.bos, run.policy.chat)
    form = PromptForm.of(run.data, schema)
    max_new_tokens = config.max_new_tokens or run.rollout.max_new_tokens
    engine = open_engine(config, run, parallel)
    prompts = encode_prompts(tokenizer, examples, form)
    check_prompts(prompts, SamplingParams(max_new_tokens), engine.max_context, [example.shown for example in examples])
    evaluation = evaluate_policy(
        engine,
        tokenizer,
        schema,
        examples,
        form=form,
        max_new_tokens=max_new_tokens,
        batch_size=config.batch_size,
        parallel=parallel,
        by=config.by,
        bootstrap=config.bootstrap,
    )
    engine.close()  # not after an error: a shared engine would wait for all ranks
    if config.ranking:
        model = load_policy(config.checkpoint, experts=run.policy.experts, dtype=getattr(torch, run.policy.dtype))
        policy = Policy(model).to(parallel.device)
        evaluation[0]["ranking"] = ranking(policy, tokenizer, schema, examples, evaluation[1], parallel)
    return evaluation


def ranking(
    policy: Policy,
    tokenizer: Any,
    schema: StepSchema,
    examples: Sequence[Example],
    rollouts: Sequence[Rollout],
    parallel: Parallel,
) -> dict[str, Any]:
    """`ranking_scores` of the responses' verdicts; each rank reads its share. Collective."""
    share = range(parallel.rank, len(rollouts), parallel.world_size)
    own = dict(zip(share, grade_probs(policy, tokenizer, [rollouts[i] for i in share], schema), strict=True))
    probs = {i: row for part in parallel.all_gather_object(own) for i, row in part.items()}
    return ranking_scores([probs[i] for i in range(len(rollouts))], examples, schema.grades)


def open_engine(config: EvaluateConfig, run: Config, parallel: Parallel) -> Engine:
    """The engine that decodes. It loads the weights of the checkpoint and never syncs others. Collective if ranks share it.

    Raises UserError for settings that cannot work, MissingPackage if the engine is not installed.
    """
    dtype, max_context = getattr(torch, run.policy.dtype), run.policy.max_context
    if config.engine == "local":
        model = load_policy(config.checkpoint, experts=run.policy.experts, dtype=dtype)
        return LocalEngine(model, device=parallel.device, max_context=max_context)
    parallel.on_main(lambda: check_stored(config.checkpoint))
    try:
        return open_vllm(config.checkpoint, parallel, dtype=dtype, max_context=max_context, config=config.vllm)
    except UserError as error:
        message = str(error).replace("rollout.vllm.", "vllm.").replace("rollout.engine", "engine")
        raise type(error)(message) from error


def write_evaluation(out: Path, results: dict[str, Any], rollouts: Sequence[Rollout], examples: Sequence[Example]) -> Path:
    """Write results.json and, if rollouts are given, predictions.jsonl and rollouts.jsonl into `out`. Returns `out`."""
    with hold(out):
        _write(out, results, rollouts, examples)
    return out


def _write(out: Path, results: dict[str, Any], rollouts: Sequence[Rollout], examples: Sequence[Example]) -> None:
    if rollouts:
        grades = {example.example_id: example.grade for example in examples}
        rows = (
            {"example_id": r.example_id, "prediction": r.answers[-1], "grade": grades[r.example_id], "answers": r.answers}
            for r in rollouts
        )
        write_whole(out / PREDICTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        with whole_file(out / ROLLOUTS) as part:
            write_rollouts(part, rollouts, step=0)
    write_whole(out / RESULTS, json.dumps(results, indent=2) + "\n")  # last: it says that the others are whole


def main(config: EvaluateConfig) -> None:
    """Evaluate as configured, on all ranks of torchrun if a checkpoint is decoded."""
    if not config.checkpoint:
        check_one_process("srpo.evaluate with --rollouts or --predictions", "ranks only share the decoding of a checkpoint")
    distributed(evaluate)(config)


if __name__ == "__main__":
    run_program(main, EvaluateConfig)
