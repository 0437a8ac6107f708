"""`python -m srpo.select`: killed and resumed, on several ranks, each stage alone, and its output in training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_world as small
import torch
from select_cases import (
    EXAMPLES,
    NUM,
    ONE,
    SCHEMA,
    TEMPLATE,
    TOKENIZER,
    Fresh,
    Killed,
    Ranks,
    Scripted,
    config,
    example,
    parts_with,
    results,
)

from srpo.core.batch import Rollout
from srpo.core.config.selection import Criteria, SelectConfig
from srpo.core.config.train import Config, DataConfig, LossConfig, StageConfig
from srpo.core.run_dir import claim_run_dir
from srpo.core.settings import load
from srpo.core.step_presets import PAPER
from srpo.data.curriculum import SOLVE_RATE
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm
from srpo.data.readers import load_examples, write_examples
from srpo.data.tokenizer import encode_prompts
from srpo.experiments.start import PROMPT
from srpo.rewards.hybrid import score
from srpo.rewards.judge import OracleJudge, Verdicts
from srpo.rollout.engine import Sample, SamplingParams
from srpo.rollout.rollouts import to_rollouts
from srpo.select import choose, open_parts, out_dir, records_dir, run, sample
from srpo.selection.records import RecordSettings
from srpo.selection.shards import finished_shards, read_shard, shards_of
from srpo.train import train
from srpo.training.credit import group_scores


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> SelectConfig:
    cfg = config(tmp_path_factory.mktemp("whole"))
    engine = Scripted()
    report = run(cfg, ONE, parts_with(engine))
    assert report is not None and 0 < report["num_selected"] < NUM
    assert engine.sampled == Counter({e.example_id: 1 for e in EXAMPLES}) and engine.calls == 6
    return cfg


def test_records_say_what_the_group_did(never_killed: SelectConfig) -> None:
    """Recomputes one shard with the functions of training and plain sums."""
    number, shard = next(s for s in shards_of(EXAMPLES, 8) if s[0] == 2)
    records = read_shard(records_dir(never_killed), number)
    assert [r.example_id for r in records] == [e.example_id for e in shard]
    prompts = encode_prompts(TOKENIZER, shard, PromptForm(TEMPLATE))
    # the seed of a shard is not stored: sample again and keep the seeds that the engine gets
    seeds: list[int] = []
    engine = Scripted()
    generate = engine.generate
    engine.generate = lambda prompts, params, seed: (seeds.append(seed), generate(prompts, params, seed))[1]  # type: ignore[method-assign]
    again = replace(never_killed, run_dir=never_killed.run_dir + "_again")
    sample(again, ONE, parts_with(engine))
    samples = Scripted().generate(prompts, SamplingParams(group_size=6), seeds[number])
    rollouts = to_rollouts(shard, samples, prompts, SCHEMA, TOKENIZER, 0)
    scored = score(rollouts, [shard[r.group] for r in rollouts], SCHEMA, OracleJudge(0.1, 0, SCHEMA))
    total, final = group_scores(scored, SCHEMA, "total"), group_scores(scored, SCHEMA, "final")
    for i, record in enumerate(records):
        group = [r for r in scored if r.group == i]
        rewards = np.array([r.step_rewards for r in group])
        assert record.solve_rate == total[i] == pytest.approx(rewards.sum(1).mean() / 1.8)
        assert record.verdict_accuracy == final[i]
        assert record.step_rewards == pytest.approx(rewards.mean(0))
        assert record.num_reward_patterns == len(np.unique(rewards, axis=0))
        assert record.num_different == len({r.text for r in group}) and record.num_responses == 6
        assert record.tags == {"query_type": shard[i].tags["query_type"], "grade": shard[i].grade}
        verdicts = np.array([r.verdicts for r in group], dtype=float)
        assert record.judge_scores == pytest.approx(verdicts.mean(0)) and record.judge_score == pytest.approx(verdicts.mean())
        verdict, steps = rewards[:, 4] > 0, (rewards[:, :4] > 0).all(1)
        assert record.right_verdict_wrong_steps_frac == pytest.approx((verdict & ~steps).mean())
        assert record.wrong_verdict_right_steps_frac == pytest.approx((~verdict & steps).mean())
        assert record.num_verdicts == 18 and record.num_no_verdict == 0  # steps 1, 2 and 4 have no gold


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_killed_and_resumed_equals_never_killed(never_killed: SelectConfig, tmp_path: Path, k: int) -> None:
    cfg = config(tmp_path)
    first, second = Scripted(dies_after=k), Scripted()
    with pytest.raises(Killed):
        run(cfg, ONE, parts_with(first))
    assert len(finished_shards(records_dir(cfg))) == k
    run(cfg, ONE, parts_with(second))
    assert first.sampled + second.sampled == Counter({e.example_id: 1 for e in EXAMPLES})
    assert results(cfg) == results(never_killed)


def test_killed_while_a_shard_is_written(never_killed: SelectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, num_calls = config(tmp_path), 0

    def write_half(table: Any, file: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        write(table, file)
        if num_calls == 3:
            file.truncate(file.tell() // 2)
            raise Killed

    write = pq.write_table
    monkeypatch.setattr("srpo.selection.shards.pq.write_table", write_half)
    with pytest.raises(Killed):
        run(cfg, ONE, parts_with(Scripted()))
    assert finished_shards(records_dir(cfg)) == {0, 1}
    monkeypatch.undo()
    run(cfg, ONE, parts_with(Scripted()))
    assert results(cfg) == results(never_killed)


def test_killed_while_the_examples_are_written(
    never_killed: SelectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path)

    def dies(path: Path, examples: Iterator[Example]) -> None:
        next(examples)
        raise Killed

    monkeypatch.setattr("srpo.select.write_examples", dies)
    with pytest.raises(Killed):
        run(cfg, ONE, parts_with(Scripted()))
    monkeypatch.undo()
    run(cfg, ONE, parts_with(Scripted(dies_after=0)))
    assert results(cfg) == results(never_killed)


class Asked:
    """An annotator that counts the responses it judges and raises Killed after `goes_after` shards."""

    def __init__(self, goes_after: int = 10**9) -> None:
        self.left, self.seen = goes_after, Counter[tuple[str, str]]()

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        if not self.left:
            raise Killed
        self.left -= 1
        self.seen.update((rollout.example_id, rollout.text) for rollout in rollouts)
        return OracleJudge(0.1, 0, SCHEMA).judge(rollouts, examples)


@pytest.mark.parametrize("k", [0, 2, 5])
def test_nothing_is_judged_twice(never_killed: SelectConfig, tmp_path: Path, k: int) -> None:
    """A run that is killed inside the judge samples the shard again, and yet judges each response once."""

    def judged(cfg: SelectConfig, *judges: Asked) -> Counter[tuple[str, str]]:
        for judge in judges:
            parts = replace(parts_with(Scripted())(), judge=judge)
            if judge.left < 6:
                with pytest.raises(Killed):
                    run(cfg, ONE, lambda *_, parts=parts: parts)
            else:
                run(cfg, ONE, lambda *_, parts=parts: parts)
        return sum((judge.seen for judge in judges), Counter())

    counts = judged(config(tmp_path / "whole"), Asked())
    assert counts.total() == 6 * NUM
    cfg = config(tmp_path / "killed")
    assert judged(cfg, Asked(goes_after=k), Asked()) == counts
    assert results(cfg) == results(never_killed)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_equal_one(never_killed: SelectConfig, tmp_path: Path, world_size: int) -> None:
    """Ranks 1 and higher run one after the other, then rank 0, which need not wait and selects."""
    cfg, engines = config(tmp_path), [Scripted() for _ in range(world_size)]
    claim_run_dir(
        records_dir(cfg), RecordSettings.from_config(cfg, cfg.shard_examples), is_main=True
    )  # rank 0 claims the folder, but runs last here
    for rank in range(1, world_size):
        assert run(cfg, Fresh(rank, world_size, rank, torch.device("cpu")), parts_with(engines[rank])) is None
    run(cfg, Fresh(0, world_size, 0, torch.device("cpu")), parts_with(engines[0]))
    assert sum((e.sampled for e in engines), Counter()) == Counter({e.example_id: 1 for e in EXAMPLES})
    assert max(e.calls for e in engines) == 6 // world_size
    assert results(cfg) == results(never_killed)


def test_one_rank_goes_on_where_three_were_killed(never_killed: SelectConfig, tmp_path: Path) -> None:
    cfg, first, second = config(tmp_path), Scripted(dies_after=1), Scripted()
    claim_run_dir(records_dir(cfg), RecordSettings.from_config(cfg, cfg.shard_examples), is_main=True)
    with pytest.raises(Killed):
        run(cfg, Ranks(2, 3, 2, torch.device("cpu")), parts_with(first))
    assert finished_shards(records_dir(cfg)) == {2}
    run(cfg, ONE, parts_with(second))
    assert first.sampled + second.sampled == Counter({e.example_id: 1 for e in EXAMPLES})
    assert results(cfg) == results(never_killed)


def test_a_second_selection_samples_nothing(never_killed: SelectConfig, tmp_path: Path) -> None:
    """5.5 on existing records: half of what rejection sampling leaves, by three readings of "valuable"."""
    half: dict[str, set[str]] = {}
    everything = {e.example_id for e in load_examples(out_dir(never_killed) / "selected.parquet", PAPER)}
    for score_by in ("best", "uncertain", "disagree"):
        cfg = replace(never_killed, out=str(tmp_path / score_by), format="jsonl", select=Criteria(score=score_by, keep_frac=0.5))
        report = run(cfg, ONE, parts_with(Scripted(dies_after=0)))
        assert report is not None
        half[score_by] = {e.example_id for e in load_examples(tmp_path / score_by / "selected.jsonl", PAPER)}
        assert half[score_by] < everything and len(half[score_by]) == report["num_selected"] == (len(everything) + 1) // 2
        assert report["reasons"]["not_chosen_by_score"] == len(everything) - len(half[score_by])
        assert json.loads((tmp_path / score_by / "selection.json").read_text()) == report
        means = report["mean"]
        if score_by != "uncertain":
            key = {"best": "judge_score", "disagree": "disagreement"}[score_by]
            assert means[key]["after"] > means[key]["before"]
    assert len({frozenset(ids) for ids in half.values()}) == 3


def test_the_report_counts_everything(never_killed: SelectConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    criteria = Criteria(balance=("query_type", "grade"), num_examples=8, short="take_all")
    report = choose(replace(never_killed, out=str(tmp_path / "out"), select=criteria))
    assert sum(report["reasons"].values()) == report["num_examples"] == NUM
    assert (
        report["reasons"]["selected"]
        == report["num_selected"]
        == len(load_examples(tmp_path / "out" / "selected.parquet", PAPER))
    )
    # odd examples have grades 2 and 4: four of the eight combinations do not occur
    assert {name: row["before"] for name, row in report["strata"].items() if row["before"]} == {
        "even/L1": 11,
        "even/L3": 10,
        "odd/L2": 10,
        "odd/L4": 10,
    }
    assert all(row["quota"] == 1 and row["after"] + row["short"] == 1 for row in report["strata"].values())
    assert sum(row["short"] for row in report["strata"].values()) == 4 and report["num_selected"] == 4
    assert sum(report["solve_rate"]["before"]) == NUM and sum(report["solve_rate"]["after"]) == 4
    printed = capsys.readouterr().out
    assert "4 fewer than the quotas ask for" in printed and "query_type x grade" in printed and "over quota" in printed


def test_examples_that_nothing_can_grade_are_counted_and_not_sampled(tmp_path: Path) -> None:
    bare = [replace(e, gold=(*e.gold[:4], None)) for e in EXAMPLES[:5]]
    write_examples(tmp_path / "some.jsonl", [*bare, *EXAMPLES[5:]])
    cfg, engine = config(tmp_path, tmp_path / "some.jsonl"), Scripted()
    report = run(cfg, ONE, parts_with(engine))
    assert report is not None and report["reasons"]["ungradable"] == 5 and engine.sampled.total() == NUM - 5
    assert not {e.example_id for e in load_examples(out_dir(cfg) / "selected.parquet", PAPER)} & {f"e{i}" for i in range(5)}


def test_a_run_that_is_stopped_before_a_shard_that_nothing_can_grade_goes_on(tmp_path: Path) -> None:
    bare = [replace(e, gold=(*e.gold[:4], None)) for e in EXAMPLES[-1:]]
    write_examples(tmp_path / "last.jsonl", [*EXAMPLES[:-1], *bare])
    cfg = config(tmp_path, tmp_path / "last.jsonl")
    sample(cfg, ONE, parts_with(Scripted()))
    (records_dir(cfg) / "records-000005.parquet").unlink()  # it holds only the last example
    report = run(cfg, ONE, parts_with(Scripted(dies_after=0)))
    assert report is not None and report["reasons"]["ungradable"] == 1


def test_an_output_of_this_program_is_data_for_training(world: Any, tmp_path: Path) -> None:
    """The real policy, engine and judge on a folder of shards in two formats, then `srpo.train` on the selected examples."""
    base: Config = world.config(tmp_path / "run", num_steps=1, rollout={"num_prompts": 2})
    (tmp_path / "shards").mkdir()
    write_examples(tmp_path / "shards" / "a.jsonl", world.examples()[:20])
    write_examples(tmp_path / "shards" / "b.parquet", world.examples()[20:32])
    cfg = SelectConfig(**{**vars(base), "data": DataConfig(train=str(tmp_path / "shards"), prompt=PROMPT)}, shard_examples=10)
    report = run(cfg, small.ONE)
    assert report is not None and report["num_examples"] == 32 and report["num_selected"] >= 2
    selected = out_dir(cfg) / "selected.parquet"
    chosen = {e.example_id: e for e in world.examples()}
    rates = {record.example_id: record.solve_rate for n in range(4) for record in read_shard(records_dir(cfg), n)}
    for pair in load_examples(selected, PAPER):
        assert float(pair.tags[SOLVE_RATE]) == pytest.approx(rates[pair.example_id], rel=1e-3)
        tags = {tag: value for tag, value in pair.tags.items() if tag != SOLVE_RATE}
        assert chosen[pair.example_id] == replace(pair, tags=tags)
    known = [rate for rate in rates.values() if rate is not None]
    stage = StageConfig("all of it", solve_rate=(min(known), max(known)))
    train(replace(base, data=DataConfig(train=str(selected), prompt=PROMPT), curriculum=(stage,)), small.ONE)
    assert len(small.metrics_of(tmp_path / "run")) == 1


def test_what_only_training_does_while_it_samples_is_named_and_changes_nothing(
    never_killed: SelectConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollout = replace(never_killed.rollout, oversample=0.5, off_policy_steps=1, support="replay", routing="replay")
    policy = replace(never_killed.policy, attention="flash_attention_2", activation_checkpointing=True)
    cfg = config(tmp_path, rollout=rollout, policy=policy, loss=LossConfig(importance="mask"))
    run(cfg, ONE, parts_with(Scripted()))
    names = "rollout.oversample, rollout.off_policy_steps, rollout.support, rollout.routing"
    names += ", policy.attention, policy.activation_checkpointing"
    assert f"only training uses them: {names}\n" in capsys.readouterr().out
    assert results(cfg) == results(never_killed)
    run(config(tmp_path), ONE, parts_with(Scripted(dies_after=0)))  # the same records
    assert "only training" not in capsys.readouterr().out


def test_engines_are_not_asked_for_reports_that_nobody_reads(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A top_k as large as the vocabulary leaves nothing to replay, and vLLM's CPU build cannot report experts."""
    rollout = {"top_k": 100_000, "support": "replay", "routing": "replay"}
    cfg = SelectConfig(**vars(world.config(world.folder / "unused", rollout=rollout)))
    parts = open_parts(cfg, SCHEMA, small.ONE)
    (first, *others) = parts.engine.generate([(5, 6)], parts.params, 0)
    assert len(others) == cfg.rollout.group_size - 1 and first.response_ids
    assert first.support is None and first.routed is None
    given: dict[str, Any] = {}

    class Recorder(Scripted):
        max_context = 99

        def __init__(self, path: str, **options: Any) -> None:
            super().__init__()
            given.update(options, path=path)

    monkeypatch.setattr("srpo.rollout.build.VllmEngine", Recorder)
    parts = open_parts(replace(cfg, rollout=replace(cfg.rollout, engine="vllm")), SCHEMA, small.ONE)
    assert (given["path"], given["routing"], parts.max_context) == (cfg.policy.path, False, 99)


def test_the_command_line(tmp_path: Path) -> None:
    argv = ["--select.balance", "query_type", "grade", "--select.quotas", "odd/L2", "0.25", "even/L1", "0.75"]
    cfg = load(SelectConfig, [*argv, "--select.num-examples", "8"])
    assert cfg.select == Criteria(num_examples=8, balance=("query_type", "grade"), quotas={"odd/L2": 0.25, "even/L1": 0.75})
    (tmp_path / "x.toml").write_text('[select]\nbalance = ["grade"]\nquotas = { L1 = 3, L4 = 5 }\nshort = "take_all"\n')
    assert load(SelectConfig, ["@", str(tmp_path / "x.toml")]).select.quotas == {"L1": 3.0, "L4": 5.0}
    (tmp_path / "x.toml").write_text("[select]\nquotas = { L1 = 3 }\n")
    with pytest.raises(ValueError, match=r"x.toml: select: select.quotas needs the tags of its strata"):
        load(SelectConfig, ["@", str(tmp_path / "x.toml")])


def test_shards_are_read_as_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading stays at most one shard ahead of the engine, and neither stage holds all examples in memory."""
    alive, most, num_read = 0, 0, 0

    class Counted(Example):
        def __new__(cls, *_: Any, **__: Any) -> Example:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream(*_: Any, **__: Any) -> Iterator[Example]:
        nonlocal num_read
        for i in range(400):
            num_read += 1
            values: dict[str, Any] = {**vars(example(i % NUM)), "example_id": f"n{i}"}
            yield Counted(**values)

    monkeypatch.setattr("srpo.select.read_examples", stream)
    sampled: list[int] = []

    class Reads(Scripted):
        def generate(self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, _: Any = None) -> list[Sample]:
            sampled.append(num_read)
            return super().generate(prompts, params, seed)

    cfg = config(tmp_path)
    sample(cfg, ONE, parts_with(Reads()))
    assert sampled == [400 + 8 * (k + 1) for k in range(50)]  # all are read once for the checks, then shard by shard
    assert 8 <= most <= 3 * 8
    most = 0
    assert choose(cfg)["num_selected"] > 24 and most <= 4
