"""Selection of training data (4.1, 5.5): `python -m srpo.select @ train.toml`.

First the starting policy answers every example `rollout.group_size` times, and the responses are scored as in training: one file
of records per shard of the data. Then examples are selected from the records alone and written as training data. Runs alone or
under torchrun. A run that was killed continues with the missing shards, with the same or another number of processes.
"""

from __future__ import annotations

from srpo.core.config.selection import Criteria, SelectConfig
from srpo.core.errors import UserError
from srpo.core.ranges import check_ranges
from srpo.core.settings import check_command_line, run_program

if __name__ == "__main__":
    check_command_line(SelectConfig)  # -h and mistakes answer before torch is imported

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from srpo.core.config.train import PolicyConfig, RolloutConfig
from srpo.core.files import write_whole
from srpo.core.progress import Progress
from srpo.core.run_dir import Inputs, check_unchanged, claim_run_dir
from srpo.core.run_lock import run_lock
from srpo.core.steps import StepSchema
from srpo.data.curriculum import SOLVE_RATE
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm
from srpo.data.readers import read_examples, write_examples
from srpo.data.strata import stratum, tags_with_grade
from srpo.data.tokenizer import encode_prompts, load_tokenizer
from srpo.policy.model import load_policy
from srpo.policy.parallel import Parallel, distributed
from srpo.rewards.audit import asked_counts, silence
from srpo.rewards.build import build_judge
from srpo.rewards.hybrid import score
from srpo.rewards.judge import Judge
from srpo.rollout.build import open_engine, sampling_params
from srpo.rollout.engine import Engine, Sample, SamplingParams, check_prompts
from srpo.rollout.rollouts import to_rollouts
from srpo.selection.criteria import check_quotas, collect_scores, rates, select
from srpo.selection.records import Record, RecordSettings, record_of, unsampled
from srpo.selection.report import report_json, report_of, report_text
from srpo.selection.shards import check_shard, finished_shards, read_shard, shard_seed, shards_of, write_shard
from srpo.training.checks import check_judge, check_rollout
from srpo.training.inputs import judge_model, model_inputs
from srpo.training.run import derive_seed

# Settings that only matter with updates or a loss; srpo.select ignores them and says so.
_OF_TRAINING = ("overlap", "oversample", "cut_tail", "off_policy_steps", "support", "routing")  # of rollout
_OF_UPDATES = ("reference", "attention", "activation_checkpointing", "lora")  # of policy
_POLL_S = 0.5  # seconds between two looks of rank 0 at the shards that other ranks have finished


@dataclass(frozen=True)
class SelectionSettings:
    """The settings that the selected examples depend on; they identify an output folder."""

    format: str
    select: Criteria
    records: RecordSettings


@dataclass(frozen=True)
class Parts:
    """The objects that sample and score."""

    tokenizer: Any
    form: PromptForm
    engine: Engine
    judge: Judge | None
    params: SamplingParams
    max_context: int
    inputs: Inputs = field(default_factory=dict)  # the models by their contents


def open_parts(cfg: SelectConfig, schema: StepSchema, parallel: Parallel) -> Parts:
    """Tokenizer, engine with the starting policy, and judge, as in training except for `ignored_settings`."""
    cfg = replace(cfg, rollout=replace(cfg.rollout, **{name: getattr(RolloutConfig(), name) for name in _OF_TRAINING}))
    tokenizer = load_tokenizer(cfg.policy.path, cfg.policy.bos, cfg.policy.chat)
    params = sampling_params(cfg, tokenizer)
    loaded = load_policy(cfg.policy.path, experts=cfg.policy.experts)
    engine = open_engine(cfg, loaded, parallel)
    inputs = parallel.on_main(lambda: model_inputs(_models(cfg)))
    form = PromptForm.of(cfg.data, schema)
    return Parts(tokenizer, form, engine, build_judge(cfg, schema, parallel), params, engine.max_context, inputs)


def _models(cfg: SelectConfig) -> dict[str, str]:
    return {"the starting policy": cfg.policy.path} | judge_model(cfg.reward)


def _models_left(cfg: SelectConfig) -> dict[str, str]:
    """The models whose folders are still there: choosing from finished records needs none."""
    return {name: path for name, path in _models(cfg).items() if (Path(path) / "config.json").is_file()}


def ignored_settings(cfg: SelectConfig) -> list[str]:
    """Names of the settings in `cfg` that are not at their default and that only training uses."""
    parts = (("rollout", cfg.rollout, RolloutConfig(), _OF_TRAINING), ("policy", cfg.policy, PolicyConfig(), _OF_UPDATES))
    return [
        f"{part}.{name}" for part, own, default, names in parts for name in names if getattr(own, name) != getattr(default, name)
    ]


def run(
    cfg: SelectConfig, parallel: Parallel, parts_of: Callable[[SelectConfig, StepSchema, Parallel], Parts] = open_parts
) -> dict[str, Any] | None:
    """Sample the missing records, then select. Returns the contents of `selection.json` on rank 0, None on the others."""
    check_settings(cfg)
    with run_lock(records_dir(cfg), parallel), run_lock(out_dir(cfg), parallel):
        sample(cfg, parallel, parts_of)
        return choose(cfg) if parallel.is_main else None


# ---- first stage: sample and score ---------------------------------------------------------------------------------------------


def sample(
    cfg: SelectConfig, parallel: Parallel, parts_of: Callable[[SelectConfig, StepSchema, Parallel], Parts] = open_parts
) -> None:
    """Write this rank's share of the missing records. Rank 0 returns when all ranks are done, another rank when it is done.

    The k-th missing shard belongs to rank k % world_size. Its random draws depend on (seed, ids of its examples) alone. Raises
    UserError for settings and data that would fail later, before anything is sampled or written.
    """
    check_settings(cfg)
    schema, folder = cfg.schema, records_dir(cfg)
    for claimed, settings, name in _claims(cfg):
        if (claimed / "config.toml").is_file():
            _claim(claimed, settings, name, parallel.is_main)
    done = parallel.broadcast_object(finished_shards(folder))
    if done and not (folder / "config.toml").is_file():
        raise UserError(f"{folder} has records, but no config.toml with their settings: give another records_dir")
    parts = _Once(lambda: parts_of(cfg, schema, parallel))
    missing = survey(cfg, schema, done, parts)
    if not missing:
        parallel.on_main(lambda: check_unchanged(folder, model_inputs(_models_left(cfg))))
        return
    if parallel.is_main and (names := ignored_settings(cfg)):
        print(f"ignored, because only training uses them: {', '.join(names)}", flush=True)
    _claim(*_claims(cfg)[0], parallel.is_main, parts().inputs)
    parallel.barrier()
    if not (folder / "config.toml").is_file():
        raise UserError(
            f"process {parallel.rank} does not see {folder / 'config.toml'}, which process 0 wrote: set records_dir to a folder "
            "that all hosts share"
        )
    own, asked = set(missing[parallel.rank :: parallel.world_size]), np.zeros(2)
    with Progress("shards sampled", len(done) + len(missing), start=len(done), enabled=parallel.is_main) as bar:
        for number, examples in shards_of(_examples(cfg), cfg.shard_examples):
            if number in own:
                records, counts = sample_shard(parts(), examples, cfg, schema)
                was_silent, asked = bool(silence(asked, cfg.reward)), asked + counts
                if (alarm := silence(asked, cfg.reward)) and cfg.reward.audit == "stop":
                    raise UserError(alarm)  # before the shard is written
                if alarm and not was_silent and cfg.reward.audit != "off":
                    print(alarm, flush=True)
                write_shard(folder, number, examples, records)
                bar.advance(len(finished_shards(folder)) - bar.done)
        while parallel.is_main and bar.done < bar.total:
            time.sleep(_POLL_S)  # not a collective, which could time out while another rank samples its last shards
            bar.advance(len(finished_shards(folder)) - bar.done)
    parts().engine.close()


def check_settings(cfg: SelectConfig) -> None:
    """Raise UserError for settings that cannot work with any data."""
    check_ranges(cfg)
    if not cfg.data.train:
        raise UserError("data.train is not set: name the examples to choose from (docs/data.md)")
    if cfg.rollout.group_size < 2:
        raise UserError(
            f"rollout.group_size is {cfg.rollout.group_size}: set it to 2 or more, because rejection sampling compares responses"
        )
    if cfg.select.score in ("best", "uncertain") and cfg.reward.judge == "none":
        raise UserError(f"select.score is {cfg.select.score!r}, which needs the verdicts of a judge: set reward.judge")
    check_rollout(cfg)
    check_judge(cfg)
    data = Path(cfg.data.train.partition("?")[0]).resolve()
    for folder, name in ((records_dir(cfg), "records_dir"), (out_dir(cfg), "out")):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{name} is {folder}, which is a file: name a folder")
        if folder.resolve() == data:
            raise UserError(f"{name} is {folder}, the folder of data.train, where its files would be read as data: give another")
    if data in ((out_dir(cfg) / f"selected.{cfg.format}").resolve(), (out_dir(cfg) / "selection.json").resolve()):
        raise UserError(f"data.train is {data}, which would be replaced by the selected examples: give another out")
    if records_dir(cfg).resolve() == out_dir(cfg).resolve():
        raise UserError(f"records_dir and out are both {out_dir(cfg)}: give another out")


def survey(cfg: SelectConfig, schema: StepSchema, done: frozenset[int], parts: Callable[[], Parts]) -> list[int]:
    """Numbers of the missing shards, after all of the data was read once.

    Raises UserError for a bad row, an example without a tag of `select.balance`, a quota above the size of its stratum, finished
    shards of other data, a prompt that is too long, and, in a new run, if no example can be graded.
    """
    strata: Counter[tuple[str, ...]] = Counter()
    missing: list[int] = []
    num_shards = num_gradable = 0
    error_text = ""
    for number, examples in shards_of(_examples(cfg, check_duplicates=True), cfg.shard_examples):
        num_shards += 1
        try:
            strata.update(stratum(example, cfg.select.balance) for example in examples)
        except UserError as error:
            raise UserError(f"select.balance: {error}") from error
        if number in done:
            check_shard(records_dir(cfg), number, examples)
            continue
        missing.append(number)
        prompts = encode_prompts(parts().tokenizer, examples, parts().form)
        check_prompts(prompts, parts().params, parts().max_context, [example.shown for example in examples])
        gradable, problem = split_gradable(parts(), examples, cfg, schema)
        error_text, num_gradable = error_text or problem, num_gradable + len(gradable)
    if error_text and not num_gradable and not done:  # the missing shards of a resumed run may have no gradable example
        raise UserError(error_text)
    if extra := sorted(number for number in done if number >= num_shards):
        raise UserError(
            f"{records_dir(cfg)} has {len(extra)} more shards than {cfg.data.train}: restore the data, "
            "or give another records_dir"
        )
    check_quotas(strata, cfg.select)
    return missing


def split_gradable(parts: Parts, examples: Sequence[Example], cfg: SelectConfig, schema: StepSchema) -> tuple[list[Example], str]:
    """(the examples whose steps can be graded, the error of the first example that cannot be graded or "")."""
    silence = [Sample(i, (), (), "stop") for i in range(len(examples))]
    rollouts = to_rollouts(examples, silence, [()] * len(examples), schema, parts.tokenizer, 0)
    try:
        score(rollouts, examples, schema, parts.judge, cfg.reward.missing_verdict)  # no judge call: all answers are missing
    except UserError as error:
        if len(examples) == 1:
            return [], str(error)
        splits = [split_gradable(parts, [example], cfg, schema) for example in examples]
        return [e for gradable, _ in splits for e in gradable], next((problem for _, problem in splits if problem), "")
    return list(examples), ""


def sample_shard(
    parts: Parts, examples: Sequence[Example], cfg: SelectConfig, schema: StepSchema
) -> tuple[list[Record], np.ndarray]:
    """(the record of each example, `asked_counts` [2] of the judge). An example that nothing can grade is not sampled."""
    gradable, _ = split_gradable(parts, examples, cfg, schema)
    records: dict[str, Record] = {}
    asked = np.zeros(2)
    if gradable:
        prompts = encode_prompts(parts.tokenizer, gradable, parts.form)
        samples = parts.engine.generate(prompts, parts.params, derive_seed(*shard_seed(cfg.seed, examples)))
        rollouts = to_rollouts(gradable, samples, prompts, schema, parts.tokenizer, parts.engine.policy_version)
        scored = score(rollouts, [gradable[r.group] for r in rollouts], schema, parts.judge, cfg.reward.missing_verdict)
        asked = asked_counts(scored, schema)
        for i, group in groupby(scored, key=lambda rollout: rollout.group):  # an engine returns samples prompt by prompt
            records[gradable[i].example_id] = record_of(list(group), schema, tags_with_grade(gradable[i]))
    every = [records.get(e.example_id) or unsampled(e.example_id, schema.num_steps, tags_with_grade(e)) for e in examples]
    return every, asked


# ---- second stage: choose from the records -------------------------------------------------------------------------------------


def choose(cfg: SelectConfig) -> dict[str, Any]:
    """Select from the records, write examples and `selection.json`, and print a table. Returns the contents of `selection.json`.

    The examples get a tag `solve_rate`, by which stages of a curriculum can filter them. Those that data.eval_frac holds out are
    written, too, beside the records: training on the selected file can evaluate on them.
    """
    folder, out = records_dir(cfg), out_dir(cfg)
    scores = collect_scores(_records(folder), cfg.select.balance, cfg.seed)
    selection = select(scores, cfg.select)
    _claim(*_claims(cfg)[1], True)
    path = out / f"selected.{cfg.format}"
    rows = zip(_examples(cfg), selection.keep.tolist(), rates(scores, cfg.select).tolist(), strict=True)
    write_examples(path, (_with_rate(example, rate) for example, keep, rate in rows if keep))
    if cfg.data.eval_frac:
        write_examples(folder / f"held_out.{cfg.format}", _examples(cfg, held_out=True))  # not beside the selected examples
    report = report_of(scores, selection, cfg.select, _records(folder), str(path))
    write_whole(out / "selection.json", report_json(report))
    print(report_text(report), flush=True)
    return report


# ---- folders and streams -------------------------------------------------------------------------------------------------------


def _with_rate(example: Example, rate: float) -> Example:
    return example if math.isnan(rate) else replace(example, tags={**example.tags, SOLVE_RATE: f"{rate:.4g}"})


def records_dir(cfg: SelectConfig) -> Path:
    """The folder of the records."""
    return Path(cfg.records_dir or Path(cfg.run_dir) / "select")


def out_dir(cfg: SelectConfig) -> Path:
    """The folder of the selected examples."""
    return Path(cfg.out) if cfg.out else records_dir(cfg) / "selected"


def _claims(cfg: SelectConfig) -> tuple[tuple[Path, Any, str], tuple[Path, Any, str]]:
    """(folder, settings that its contents depend on, setting that names it), of the records and of the selected examples."""
    settings = RecordSettings.from_config(cfg, cfg.shard_examples)
    return (
        (records_dir(cfg), settings, "records_dir"),
        (out_dir(cfg), SelectionSettings(cfg.format, cfg.select, settings), "out"),
    )


def _claim(folder: Path, settings: Any, name: str, is_main: bool, inputs: Inputs | None = None) -> None:
    try:
        claim_run_dir(folder, settings, is_main, inputs=inputs)
    except UserError as error:
        raise UserError(str(error).replace("give another run_dir", f"give another {name}")) from error


def _examples(cfg: SelectConfig, check_duplicates: bool = False, held_out: bool = False) -> Iterator[Example]:
    """Examples to choose from, data.train without the part that data.eval_frac holds out; or that part."""
    data = cfg.data
    options = {"columns": data.columns, "eval_frac": data.eval_frac, "held_out": held_out}
    return read_examples(data.train, cfg.schema, check_duplicates=check_duplicates, **options)


def _records(folder: Path) -> Iterator[Record]:
    """All records in the order of the data, with one shard in memory at a time."""
    for number in sorted(finished_shards(folder)):
        yield from read_shard(folder, number)


class _Once:
    """A function without arguments that calls `make` once, on first use, and then returns the same parts."""

    def __init__(self, make: Callable[[], Parts]) -> None:
        self._make = make
        self._parts: Parts | None = None

    def __call__(self) -> Parts:
        self._parts = self._parts or self._make()
        return self._parts


main = distributed(run)


if __name__ == "__main__":
    run_program(main, SelectConfig)
