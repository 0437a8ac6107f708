"""How right a judge is on graded pairs: `python -m srpo.evaluate --checkpoint DIR --data FILE`.

Decodes greedily with the local engine, or scores what is there already: `--rollouts FILE` or `--predictions FILE`. Prints the
scores of 5.1.2 and the accuracy of each step; writes `results.json`, `predictions.jsonl` and `rollouts.jsonl`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srpo.batch import Rollout, read_rollouts, write_rollouts
from srpo.config import Config
from srpo.data.examples import GRADES, Example
from srpo.data.prompts import build_prompt
from srpo.data.readers import load_examples
from srpo.data.tokenizer import encode, load_tokenizer
from srpo.evaluation import predicted_grade, results_dict, true_grades
from srpo.policy.model import load_policy
from srpo.policy.parallel import Parallel
from srpo.progress import Progress
from srpo.report import results_table
from srpo.rollout.collect import to_rollouts
from srpo.rollout.engine import Engine, SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.settings import apply_toml, run_program
from srpo.steps import StepSchema, StepSpec


@dataclass(frozen=True)
class EvaluateConfig:
    """`python -m srpo.evaluate --checkpoint runs/demo/policy --data held_out.jsonl`"""

    checkpoint: str = ""  # folder of a Hugging Face checkpoint; its responses are decoded greedily
    rollouts: str = ""  # instead of a checkpoint: a rollouts.jsonl
    predictions: str = ""  # instead of a checkpoint: JSON Lines with example_id and prediction (1..4, null where there is none)
    data: str = ""  # graded examples (docs/data.md); empty: data.eval of the run's settings
    config: str = ""  # TOML with steps, data.prompt and rollout.max_new_tokens; empty: config.toml of the run, in a folder above
    out: str = ""  # folder for what is written; empty: `evaluation` beside the checkpoint or file
    limit: int = 0  # only the first so many examples; 0: all
    batch_size: int = 256
    max_new_tokens: int = 0  # 0: as in the run's settings


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
) -> tuple[dict[str, Any], list[Rollout]]:
    """(results of `srpo.evaluation.results_dict`, the rollouts) of one greedy response per example, in the order of the examples.

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
    return results_dict(ordered, examples, schema), ordered


def read_predictions(path: Path) -> dict[str, int | None]:
    """example_id -> predicted grade of a JSON Lines file. Raises ValueError with file and line for a bad or repeated one."""
    predictions: dict[str, int | None] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                example_id, prediction = row["example_id"], row["prediction"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {number}: want {{"example_id": "...", "prediction": 1}} ({error})') from error
            if prediction is not None and (type(prediction) is not int or prediction not in GRADES):
                raise ValueError(f"{path}, line {number}: prediction is {prediction!r}: give 1, 2, 3, 4, or null for none")
            if example_id in predictions:
                raise ValueError(f"{path}, line {number}: a second prediction of {example_id!r}: keep one per example")
            predictions[example_id] = prediction
    return predictions


def score_predictions(predictions: dict[str, int | None], examples: Sequence[Example]) -> dict[str, Any]:
    """Results of verdicts alone, as those of responses with one step. Raises ValueError where an example has no prediction."""
    _check_all_there(predictions, examples, "prediction")
    verdicts = [predictions[example.example_id] for example in examples]
    answers = [None if grade is None else f"L{grade}" for grade in verdicts]
    rollouts = [
        Rollout(example.example_id, i, (), (), (), (0,), (answer,), "", "stop", 0)
        for i, (example, answer) in enumerate(zip(examples, answers, strict=True))
    ]
    return results_dict(rollouts, [replace(e, gold=e.gold[-1:], truth=()) for e in examples], VERDICT_ONLY)


VERDICT_ONLY = StepSchema([StepSpec("verdict", r"\S")])


def score_rollouts(
    rollouts: Iterable[Rollout], examples: Sequence[Example], schema: StepSchema
) -> tuple[dict[str, Any], list[Rollout]]:
    """(results, rollouts that count) of responses that are there already; each of several to one pair counts.

    Rollouts of other pairs are left out. Raises ValueError where an example has none, or a rollout another number of steps.
    """
    by_id = {example.example_id: example for example in examples}
    mine = [rollout for rollout in rollouts if rollout.example_id in by_id]
    for rollout in mine:
        if len(rollout.answers) != schema.num_steps:
            raise ValueError(
                f"the rollout of {rollout.example_id} has {len(rollout.answers)} steps, the settings have {schema.num_steps}: "
                "name the TOML that it was sampled with by --config"
            )
    _check_all_there({rollout.example_id for rollout in mine}, examples, "rollout")
    return results_dict(mine, [by_id[rollout.example_id] for rollout in mine], schema), mine


def _check_all_there(have: Iterable[str], examples: Sequence[Example], what: str) -> None:
    missing = {example.example_id for example in examples} - set(have)
    if missing:
        raise ValueError(f"{len(missing)} of {len(examples)} examples have no {what}, such as {min(missing)}: all must have one")


def main(config: EvaluateConfig) -> None:
    """The program. Raises ValueError for settings that do not say what to evaluate."""
    sources = [source for source in (config.checkpoint, config.rollouts, config.predictions) if source]
    if len(sources) != 1:
        raise ValueError("give one of --checkpoint DIR, --rollouts FILE and --predictions FILE")
    source = Path(sources[0])
    if not source.exists():
        raise ValueError(f"no such file or folder: {source}")
    run = run_settings(source, config.config)
    schema = StepSchema(run.steps)
    data = config.data or run.data.eval
    if not data:
        raise ValueError("no data: give graded examples with --data FILE")
    examples = load_examples(data, schema.num_steps, config.limit, options=[spec.options for spec in schema.specs])
    out = Path(config.out) if config.out else source.resolve().parent / "evaluation"

    rollouts: list[Rollout] = []
    if config.predictions:
        schema = VERDICT_ONLY
        results = score_predictions(read_predictions(source), examples)
    elif config.rollouts:
        results, rollouts = score_rollouts(load_rollouts(source), examples, schema)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_policy(source, experts=run.policy.experts, dtype=getattr(torch, run.policy.dtype))
        engine = LocalEngine(nn.Module.to(model, device), max_context=run.policy.max_context)
        results, rollouts = evaluate_policy(
            engine,
            load_tokenizer(source),
            schema,
            examples,
            prompt_template=run.data.prompt,
            max_new_tokens=config.max_new_tokens or run.rollout.max_new_tokens,
            batch_size=config.batch_size,
        )
    print(results_table(results, schema))
    print(f"written to {write_evaluation(out, results, rollouts, examples)}")


def load_rollouts(path: Path) -> list[Rollout]:
    """All rollouts of a file. ValueError where it is no rollouts.jsonl."""
    try:
        return [rollout for _, rollout in read_rollouts(path)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a rollouts.jsonl of a run or an evaluation ({error})") from error


def run_settings(source: Path, config: str) -> Config:
    """The settings that `source` is evaluated under; prints whence they are.

    Those of the TOML `config`; else of the training run in whose folder `source` lies (up to three folders deep); else the
    defaults.
    """
    if config:
        return apply_toml(Config(), Path(config))
    for folder in source.resolve().parents[:4]:
        path = folder / "config.toml"
        if path.is_file() and tomllib.loads(path.read_text(encoding="utf-8")).keys() >= {"steps", "rollout"}:
            print(f"steps, prompt and lengths as in {path}")
            return apply_toml(Config(), path)
    print("no config.toml of a training run around it: steps, prompt and lengths are the defaults")
    return Config()


def write_evaluation(out: Path, results: dict[str, Any], rollouts: Sequence[Rollout], examples: Sequence[Example]) -> Path:
    """Write results.json and, where there are responses, predictions.jsonl and rollouts.jsonl into `out`; returns it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
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


if __name__ == "__main__":
    run_program(main, EvaluateConfig)
