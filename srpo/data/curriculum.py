"""The stages of a run, one after another (4.2.2): the examples of each, how it draws them, and when it ends.

Stages share one set of solve-rate estimates, by example_id: scores observed in one stage count in the next.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from srpo.core.config.train import Config, SamplerConfig, StageConfig
from srpo.core.errors import UserError
from srpo.core.metrics import METRICS, filled
from srpo.data.examples import Example
from srpo.data.sampler import PromptSampler, SamplerState
from srpo.data.solve_rates import SolveRates, SolveRateState
from srpo.data.strata import tags_with_grade

SOLVE_RATE = "solve_rate"  # the tag that StageConfig.solve_rate reads
_AREAS = ("reward", "advantage", "train", "policy", "rollout", "sampler", "eval")  # areas of the metrics that may end a stage


@dataclass(frozen=True)
class Stage:
    """A stage with its data."""

    name: str  # empty if there is no curriculum
    examples: list[Example]
    settings: SamplerConfig  # `sampler`, overridden by the settings of the stage
    ends: StageConfig


# ---- checks before the data is read --------------------------------------------------------------------------------------------


def check_curriculum(cfg: Config) -> None:
    """Raise UserError, with the fix, if the stages cannot run one after another within `num_steps`."""
    stages = cfg.curriculum
    names = [stage.name for stage in stages]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or "" in names:
        raise UserError(f"curriculum: the stage name {twice or ''!r} is empty or used twice: give every stage a name of its own")
    for stage in stages:
        _check_stage(stage, cfg, is_last=stage is stages[-1])
    if not stages:
        return
    ends, last = [0], stages[-1]
    for stage in stages[:-1]:
        ends.append(_earliest_end(stage, cfg, ends[-1]))
    if ends[-1] >= cfg.num_steps and len(stages) > 1:
        stage_ends = ", ".join(f"{name!r} {end}" for name, end in zip(names, ends[1:], strict=False))
        raise UserError(
            f"curriculum: the stage {last.name!r} can never begin: the stages before it end at optimizer step {ends[-1]} at the "
            f"earliest ({stage_ends}) and num_steps is {cfg.num_steps}: raise num_steps above {ends[-1]}, or shorten the stages"
        )
    if last.num_steps and (any(stage.metric for stage in stages) or ends[-1] + last.num_steps != cfg.num_steps):
        raise UserError(
            f"curriculum: the last stage {last.name!r} lasts until the end of the run, {cfg.num_steps} steps, but its num_steps "
            f"is {last.num_steps}: remove it, or make the stages add up to the num_steps of the run"
        )


def _check_stage(stage: StageConfig, cfg: Config, is_last: bool) -> None:
    where = f"curriculum stage {stage.name!r}"
    settings = _settings(stage, cfg.sampler)
    low, high = settings.difficulty_low, settings.difficulty_high
    if not (low < high and low < 1 and high > 0):
        raise UserError(
            f"{where}: the difficulty window ({low}, {high}) filters out everything: give bounds in order, within 0 to 1"
        )
    if stage.solve_rate is not None and not stage.solve_rate[0] <= stage.solve_rate[1]:
        raise UserError(f"{where}: no solve_rate lies in {list(stage.solve_rate)}: give the lower bound first")
    empty = next((tag for tag, values in stage.tags.items() if not values), None)
    if empty is not None:
        raise UserError(f'{where}: tags.{empty} names no value: write {empty} = ["..."], or remove it')
    if bool(stage.metric) != (stage.patience > 0):
        given, lacks = ("metric", "patience") if stage.metric else ("patience", "metric")
        raise UserError(f"{where}: {given} is set and {lacks} is not: a plateau needs both, or neither")
    if is_last and stage.metric:
        raise UserError(f"{where} is the last and lasts until the end of the run: remove metric, min_gain and patience")
    if stage.metric:
        _check_metric(stage, cfg, where)
    if not is_last and not stage.num_steps and not stage.metric:
        raise UserError(
            f"{where} has no end but is not the last: set its num_steps, or metric and patience, or make it the last stage"
        )


def _check_metric(stage: StageConfig, cfg: Config, where: str) -> None:
    known = _known_metrics(cfg)
    if stage.metric not in known:
        near = difflib.get_close_matches(stage.metric, known, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise UserError(f"{where}: the run logs no metric {stage.metric!r} at its steps{hint}: take one of docs/metrics.md")
    if stage.metric.startswith("eval/") and not ((cfg.data.eval or cfg.data.eval_frac) and cfg.train.eval_every):
        raise UserError(f"{where} waits for {stage.metric}: set data.eval and train.eval_every, or data.eval_frac for data.eval")


def _known_metrics(cfg: Config) -> list[str]:
    """Metric keys that may end a stage."""
    keys: list[str] = []
    for key, text in METRICS.items():
        if key.partition("/")[0] in _AREAS and not text.startswith(("SFT", "DPO")):
            keys += filled(key, cfg.schema.names, len(cfg.grades.names))
    return [key for key in keys if cfg.loss.kl_coef or not key.startswith("policy/kl")]


def _earliest_end(stage: StageConfig, cfg: Config, start: int) -> int:
    """The earliest optimizer step at which a stage that begins after step `start` can end."""
    every = cfg.train.eval_every if stage.metric.startswith("eval/") else 1
    plateau = [(start // every + 1 + stage.patience) * every] if stage.metric else []  # a best value, then `patience` others
    return min([start + stage.num_steps] * bool(stage.num_steps) + plateau)


def _settings(stage: StageConfig, settings: SamplerConfig) -> SamplerConfig:
    own = {key: getattr(stage, key) for key in ("balance", "difficulty_low", "difficulty_high")}
    return replace(settings, **{key: value for key, value in own.items() if value is not None})


# ---- the data ------------------------------------------------------------------------------------------------------------------


def load_stages(cfg: Config, read: Callable[[str], list[Example]]) -> list[Stage]:
    """The stages with their examples; without a curriculum, one stage with all of data.train.

    `read` returns the examples of a path; it is called once per path. UserError if a stage has fewer examples than an optimizer
    step has prompts, if no example has a tag or value that a stage selects, or if a tag solve_rate is missing or not a number.
    """
    read_once: dict[str, list[Example]] = {}
    stages = []
    for ends in cfg.curriculum or (StageConfig(""),):
        path = ends.data or cfg.data.train
        if path not in read_once:
            read_once[path] = read(path)
        examples = _chosen(read_once[path], ends, path)
        if cfg.curriculum and len(examples) < cfg.rollout.num_started:
            more = f" and rollout.oversample {cfg.rollout.oversample}" if cfg.rollout.oversample else ""
            raise UserError(
                f"curriculum stage {ends.name!r} has {len(examples)} of the {len(read_once[path])} examples of {path}, fewer "
                f"than rollout.num_prompts = {cfg.rollout.num_prompts}{more}: lower it, widen tags or solve_rate, or add data"
            )
        stages.append(Stage(ends.name, examples, _settings(ends, cfg.sampler), ends))
    return stages


def all_examples(stages: Sequence[Stage]) -> list[Example]:
    """Examples of all stages without duplicates, in the order of the stages. UserError if two with the same id differ."""
    known: dict[str, Example] = {}
    for stage in stages:
        for example in stage.examples:
            if known.setdefault(example.example_id, example) != example:
                raise UserError(
                    f"curriculum stage {stage.name!r}: example_id {example.example_id!r} is another pair in an earlier stage: "
                    "give every pair an id of its own"
                )
    return list(known.values())


def _chosen(examples: list[Example], ends: StageConfig, path: str) -> list[Example]:
    where = f"curriculum stage {ends.name!r}"
    for tag, wanted in ends.tags.items():
        values = sorted({tags_with_grade(example).get(tag, "") for example in examples} - {""})
        if not values:
            known = sorted({tag for example in examples for tag in tags_with_grade(example)})
            raise UserError(f"{where}: no example of {path} has the tag {tag!r}: use one of {', '.join(known) or 'none'}")
        unknown = [value for value in wanted if value not in values]
        if unknown:
            raise UserError(f"{where}: no example of {path} has {tag} = {unknown[0]!r}: use some of {', '.join(values[:20])}")
    chosen = [e for e in examples if all(tags_with_grade(e).get(tag) in wanted for tag, wanted in ends.tags.items())]
    if ends.solve_rate is not None:
        low, high = ends.solve_rate
        chosen = [example for example in chosen if low <= _solve_rate(example, where) <= high]
    return chosen


def _solve_rate(example: Example, where: str) -> float:
    text = example.tags.get(SOLVE_RATE, "")
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 <= rate <= 1:
        raise UserError(
            f"{where}: the tag {SOLVE_RATE} of {example.shown} is {text!r}, not a number from 0 to 1: "
            "write the tag with srpo.select, or remove solve_rate from the stage"
        )
    return rate


# ---- the run -------------------------------------------------------------------------------------------------------------------


class CurriculumState(TypedDict):
    """JSON-able state; a curriculum that resumes from it draws the same batches and switches stages at the same steps."""

    fingerprint: str  # of the examples of all stages, in their order
    stage: int
    num_steps: int  # optimizer steps done in this stage
    best: float | None  # best value of the stage's metric so far
    num_stalled: int  # consecutive values that did not exceed it
    rates: SolveRateState
    sampler: SamplerState  # of this stage; no stage runs twice


class Curriculum:
    """The sampler of a run: draws from the current stage and switches to the next one.

    Paper: 4.2.2 does not say when a stage ends. Here it ends after `num_steps` optimizer steps, or when `patience` consecutive
    values of its metric have not exceeded the best value of the stage by `min_gain`. Only such a rise updates the best value, so
    small gains add up. A value that is not finite is no rise.
    """

    def __init__(self, stages: Sequence[Stage], seed: int):
        settings = stages[0].settings
        names = [example.example_id for example in all_examples(stages)] if len(stages) > 1 else _ids(stages[0])
        self._rates = SolveRates(names, new_weight=settings.new_weight, max_age=settings.max_age)
        self._stages = stages
        self._samplers = [self._make(number, seed) for number in range(len(stages))]
        self._fingerprint = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
        self._enter(0)

    def _make(self, number: int, seed: int) -> PromptSampler:
        stage = self._stages[number]
        low, high, balance = stage.settings.difficulty_low, stage.settings.difficulty_high, stage.settings.balance
        try:
            return PromptSampler(stage.examples, self._rates, seed=seed, low=low, high=high, balance=balance, stage=number)
        except UserError as error:
            raise UserError(f"curriculum stage {stage.name!r}: {error}" if stage.name else str(error)) from error

    def _enter(self, number: int) -> None:
        self._number, self._num_steps, self._num_stalled = number, 0, 0
        self._best: float | None = None

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self._stages[self._number]

    def next(self, n: int) -> list[Example]:
        """`PromptSampler.next` of the current stage."""
        return self._samplers[self._number].next(n)

    def more(self, n: int) -> list[Example]:
        """`PromptSampler.more` of the current stage."""
        return self._samplers[self._number].more(n)

    def put_back(self, examples: Sequence[Example]) -> None:
        """`PromptSampler.put_back` of the current stage."""
        self._samplers[self._number].put_back(examples)

    def observe(self, example_ids: Sequence[str], scores: Sequence[float]) -> None:
        """Record the group mean score of each example, the same on all ranks. UserError for an unknown id or NaN."""
        self._rates.observe(example_ids, scores)

    def metrics(self) -> dict[str, float]:
        """The `sampler/*` metrics after the last `observe`. Call it before `end_step`, which may switch stages."""
        return {**self._samplers[self._number].metrics(), "sampler/stage": self._number + 1}

    def end_step(self, metrics: Mapping[str, float]) -> bool:
        """Count an optimizer step that had these metrics, the same on all ranks. True if the next stage begins."""
        ends = self.stage.ends
        self._num_steps += 1
        value = metrics.get(ends.metric) if ends.metric else None
        if value is not None:
            best = -math.inf if self._best is None else self._best
            if math.isfinite(value) and value > best and value >= best + ends.min_gain:
                self._best, self._num_stalled = float(value), 0
            else:
                self._num_stalled += 1
        over = 0 < ends.num_steps <= self._num_steps or 0 < ends.patience <= self._num_stalled
        if not over or self._number + 1 == len(self._stages):
            return False
        self._enter(self._number + 1)
        return True

    def state_dict(self) -> CurriculumState:
        """State that determines the next batches and switches, except for the constructor's arguments."""
        return {
            "fingerprint": self._fingerprint,
            "stage": self._number,
            "num_steps": self._num_steps,
            "best": self._best,
            "num_stalled": self._num_stalled,
            "rates": self._rates.state_dict(),
            "sampler": self._samplers[self._number].state_dict(),
        }

    def load_state_dict(self, state: CurriculumState | dict[str, Any]) -> None:
        """Resume from a `state_dict`. UserError if it was made with other examples, another seed or another balance."""
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "the sampler state was saved with other training data, or in another order: resume with the data and config of "
                "the run, or start a new run_dir"
            )
        self._enter(state["stage"])
        self._num_steps, self._num_stalled, self._best = state["num_steps"], state["num_stalled"], state["best"]
        self._rates.load_state_dict(state["rates"])
        self._samplers[self._number].load_state_dict(state["sampler"])


def _ids(stage: Stage) -> list[str]:
    return [example.example_id for example in stage.examples]
