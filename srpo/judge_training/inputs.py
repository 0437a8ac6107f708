"""Settings and data of `srpo.train_judge`, read and checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from srpo.core.config.judge import JudgeConfig
from srpo.core.config.sft import SftConfig
from srpo.core.digests import digest_of
from srpo.core.errors import UserError
from srpo.core.files import write_result, write_whole
from srpo.core.ranges import check_ranges
from srpo.core.run_dir import Inputs
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.prompts import read_guidelines
from srpo.data.readers import load_examples
from srpo.data.strata import stratum
from srpo.judge_training.human_queue import read_queue
from srpo.judge_training.judgments import Judgment, hold_out, read_judgments, simulate_judgments
from srpo.policy.parallel import Parallel
from srpo.scores.responses import load_rollouts
from srpo.training.inputs import model_inputs, starting_policy

QUEUE = "judge_queue.jsonl"


@dataclass(frozen=True)
class Work:
    """Settings and data that all stages share."""

    cfg: JudgeConfig
    parallel: Parallel
    schema: StepSchema
    examples: dict[str, Example]
    shown: list[Judgment]  # judgments that train
    held_out: list[Judgment]  # judgments that evaluate the judge
    num_left_out: int  # number of other judgments of the held-out queries, which are not used
    pool: list[Judgment]  # responses among which hard cases are mined

    @property
    def run_dir(self) -> Path:
        return Path(self.cfg.run_dir)

    @cached_property
    def guidelines(self) -> str:
        """The text that the judge's prompts begin with."""
        return read_guidelines(self.cfg.guidelines, "guidelines")

    def is_done(self, name: str) -> bool:
        """Whether the result file of a stage exists; the same on all ranks. Collective."""
        return self.parallel.broadcast_object((self.run_dir / name).is_file())

    def write(self, name: str, text: str) -> None:
        """Write a file of the run folder, on rank 0 and atomically. Collective."""
        if self.parallel.is_main:
            write_whole(self.run_dir / name, text)
        self.parallel.barrier()

    def write_result(self, name: str, values: dict[str, Any]) -> None:
        """Write the result of a stage, on rank 0 and atomically. Collective."""
        if self.parallel.is_main:
            write_result(self.run_dir / name, values)
        self.parallel.barrier()


def judge_inputs(work: Work) -> Inputs:
    """Digests of everything that the judge learns from."""
    cfg = work.cfg
    data = {"the data": (cfg.data, digest_of(sorted(work.examples.items())))}
    data["the file of judgments"] = (cfg.judgments or cfg.rollouts, digest_of([*work.shown, *work.held_out]))
    if cfg.guidelines:
        data["the guidelines"] = (cfg.guidelines, digest_of([work.guidelines]))
    return model_inputs(starting_policy(cfg.sft.policy)) | data


def simulates(cfg: JudgeConfig) -> bool:
    """Whether the simulated annotator verifies the queue of hard cases."""
    return bool(cfg.rollouts) and cfg.simulate_human and not cfg.verified


def prepare(cfg: JudgeConfig, parallel: Parallel) -> Work:
    """Read and check settings and data. Raises UserError for what would fail later; writes nothing."""
    schema = cfg.schema
    check_ranges(cfg)
    if not cfg.data:
        raise UserError("data is not set: name the file of the examples that were judged")
    if bool(cfg.judgments) == bool(cfg.rollouts):
        raise UserError("set either judgments (human verdicts) or rollouts (which the simulated annotator judges)")
    if cfg.kind == "scalar" and cfg.stage in ("mine", "grpo"):
        raise UserError(f"stage is {cfg.stage} and kind scalar: a scalar judge has no verdicts to sample, set stage to 'sft'")
    if cfg.kind == "scalar" and cfg.guidelines:
        raise UserError("guidelines are set and kind is scalar: a scalar judge reads no instructions, leave guidelines empty")
    if cfg.kind == "scalar" and cfg.sft.inputs != "logits":
        raise UserError(
            f"sft.inputs is {cfg.sft.inputs!r} and kind scalar: a scalar judge has no loss over the vocabulary, set sft.inputs "
            "to 'logits'"
        )
    for key in ("verdict_weight", "steps", "grades"):
        if getattr(cfg.sft, key) != getattr(SftConfig(), key):
            raise UserError(f"sft.{key} is set: a judge's verdicts have no steps to weigh; leave it out (its steps are steps.*)")
    if cfg.sft.prompt != SftConfig().prompt:
        raise UserError(
            "sft.prompt is set, but a judge is asked without it: put the text into the file of guidelines, or use sft.policy.chat"
        )
    if not cfg.mine.solve_low < cfg.mine.solve_high:
        raise UserError(
            f"mine.solve_low is {cfg.mine.solve_low} and mine.solve_high {cfg.mine.solve_high}: set solve_low below solve_high"
        )
    if cfg.stage == "grpo" and not (cfg.verified or simulates(cfg)):
        raise UserError(f"stage is grpo and verified is not set: set it to a copy of {QUEUE} with its field human filled in")
    for stage, needs in (("mine", "sft.json"), ("grpo", QUEUE)):
        if cfg.stage == stage and not (Path(cfg.run_dir) / needs).is_file():
            raise UserError(
                f"stage {stage} needs {Path(cfg.run_dir) / needs}, which does not exist: run the earlier stages first"
            )
    if cfg.verified:
        read_queue(cfg.verified, schema)
    examples = {e.example_id: e for e in load_examples(cfg.data, schema, columns=cfg.columns)}
    if cfg.judgments:
        judgments = list(read_judgments(cfg.judgments, schema.num_steps))
    else:
        judgments = simulate_judgments(
            load_rollouts(Path(cfg.rollouts)),
            examples,
            schema,
            cfg.annotator_error_rate,
            cfg.sft.seed,
            cfg.annotator_reasons,
        )
    if unknown := [j.example_id for j in judgments if j.example_id not in examples]:
        raise UserError(
            f"{len(unknown)} judgments are of examples that are not in {cfg.data}, such as {unknown[0]}: set data to the file "
            "that was judged"
        )
    judgments = [j for j in judgments if any(verdict is not None for verdict in j.verdicts)]
    shown, held_out, num_left_out = hold_out(judgments, examples, cfg.held_out)
    if not shown:
        raise UserError(
            f"held_out is {cfg.held_out} and {len(judgments)} judgments have a verdict: without the held-out queries none "
            "is left to train on; lower held_out, or judge more responses (the simulated annotator needs examples with a truth)"
        )
    pool = _pool(cfg, examples, schema, held_out) if cfg.mine.pool else shown
    pool = pool[: cfg.mine.num_responses or None]
    if cfg.kind == "generative" and cfg.stage != "sft":
        for judgment in pool:
            _check_tags(examples[judgment.example_id], cfg.mine.balance)
    return Work(cfg, parallel, schema, examples, shown, held_out, num_left_out, pool)


def _check_tags(example: Example, tags: Sequence[str]) -> None:
    try:
        stratum(example, tags)
    except UserError as error:
        raise UserError(f"mine.balance: {error}; `--mine.balance` without a value balances nothing") from error


def _pool(cfg: JudgeConfig, examples: dict[str, Example], schema: StepSchema, held_out: Sequence[Judgment]) -> list[Judgment]:
    """The responses in `mine.pool` to queries that are not held out, without verdicts."""
    queries = {examples[j.example_id].query_id for j in held_out}
    unjudged = (None,) * schema.num_steps
    responses = {(r.example_id, r.text): None for r in load_rollouts(Path(cfg.mine.pool)) if r.example_id in examples}
    pool = [Judgment(*key, unjudged, unjudged) for key in responses if examples[key[0]].query_id not in queries]
    if not pool:
        raise UserError(
            f"{cfg.mine.pool} has no response to a query of {cfg.data} that is not held out: sample the pool on the same data"
        )
    return pool
