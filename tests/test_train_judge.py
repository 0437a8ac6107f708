from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small

import srpo.train_judge
from srpo.core.batch import Rollout, read_rollouts
from srpo.core.config.judge import JudgeConfig, JudgeGrpoConfig, MineConfig
from srpo.core.config.sft import SftConfig
from srpo.core.config.train import OptimizerConfig, RolloutConfig
from srpo.core.errors import UserError
from srpo.core.metrics import read_metrics
from srpo.core.step_presets import PAPER, PAPER_STEPS
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.pairs import read_pairs
from srpo.data.readers import load_examples
from srpo.data.tokenizer import load_tokenizer
from srpo.judge_training.hard_cases import PROMPT_FIELD, verdict_steps
from srpo.judge_training.human_queue import read_queue
from srpo.judge_training.judgments import Judgment, hold_out, read_judgments, simulate_judgments
from srpo.policy.model import load_policy, make_tiny
from srpo.rewards.build import build_judge, open_judge
from srpo.rewards.judge import GenerativeJudge
from srpo.rewards.verdicts import judge_prompt, parse_verdicts
from srpo.train import train
from srpo.train_judge import train_judge

SCHEMA = PAPER
ROW = {"example_id": "e1", "response": "1. Query intent: x", "verdicts": [True, False, None, True, False]}


def test_judgments_as_written(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "example_id": 7, "reasons": ["because", None, None, None, "no"]}]
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_judgments(path, 5)
    assert first == Judgment("e1", "1. Query intent: x", (True, False, None, True, False), (None,) * 5)
    assert (second.example_id, second.reasons) == ("7", ("because", None, None, None, "no"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON list, not an object"),
        ('{"example_id": "e1", "response": "x"}', "'verdicts' is missing"),
        (json.dumps({**ROW, "response": None}), "response is None: give the text"),
        (json.dumps({**ROW, "verdicts": [True] * 4}), r"give 5 of true, false or null, one per step"),
        (json.dumps({**ROW, "verdicts": [1, 0, 1, 1, 0]}), r"give 5 of true, false or null"),
        (json.dumps({**ROW, "verdicts": "TTFTF"}), r"give 5 of true, false or null"),
        (json.dumps({**ROW, "verdicts": ["correct", "wrong", None, True, False]}), r"'wrong'.*give 5 of true, false or null"),
        (json.dumps({**ROW, "reasons": ["a"]}), "give 5 texts, one per step"),
        (json.dumps({**ROW, "reasons": "abcde"}), "give 5 texts, one per step"),
    ],
)
def test_a_malformed_judgment_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "judged.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(ValueError, match=rf"judged\.jsonl, line 2: .*{message}"):
        list(read_judgments(path, 5))


def test_a_second_judgment_of_a_response_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "judged.jsonl"
    others = [{**ROW, "example_id": 1}, {**ROW, "response": "1. Query intent: y"}]
    for second in (ROW, {**ROW, "verdicts": [None] * 5}, {**others[0], "example_id": "1"}):
        path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, *others, second)))
        name = second["example_id"]
        with pytest.raises(ValueError, match=rf"line 4: a second judgment of the same response to '{name}': keep one"):
            list(read_judgments(path, 5))


def sampled(example_id: str, text: str, answers: Sequence[str | None]) -> Rollout:
    return Rollout(example_id, 0, (1,), (2,), (-1.0,), (1,) * 5, tuple(answers), text, "stop", 0)


def test_the_simulated_annotator_sees_each_response_once() -> None:
    example = Example("e1", "q", "query", "title", truth=("a", "b", "match", "match", "L4"))
    rollouts = [
        sampled("e1", "one", ("a", "b", "match", "match", "L4")),
        sampled("e1", "two", ("a", "x", "match", None, "L3")),
        sampled("e1", "one", ("a", "b", "match", "match", "L4")),
        sampled("of other data", "one", ("a",) * 5),
    ]
    first, second = simulate_judgments(rollouts, {"e1": example}, SCHEMA, error_rate=0.0, seed=0)
    assert (first.response, first.verdicts) == ("one", (True,) * 5)
    assert (second.response, second.verdicts) == ("two", (True, False, True, False, False))
    wrong = simulate_judgments(rollouts, {"e1": example}, SCHEMA, error_rate=1.0, seed=0)[0]
    assert wrong.verdicts == (False,) * 5


def test_the_simulated_annotator_says_why() -> None:
    example = Example("e1", "q", "query", "title", truth=("a", "b", "match", "match", "L4"))
    (judgment,) = simulate_judgments([sampled("e1", "one", ("x",) * 5)], {"e1": example}, SCHEMA, 0.0, 0)
    assert judgment.reasons[:3] == ("the query wants a", "the item shows b", "the categories are a match")
    (silent,) = simulate_judgments([sampled("e1", "one", ("x",) * 5)], {"e1": example}, SCHEMA, 0.0, 0, with_reasons=False)
    assert silent.reasons == (None,) * 5 and silent.verdicts == judgment.verdicts


def test_what_is_held_out_is_of_queries_that_train_nothing() -> None:
    examples = {str(i): Example(str(i), f"q{i // 2}", "query", "title") for i in range(8)}
    judgments = [Judgment(str(i), text, (True,), (None,)) for text in "xy" for i in range(8)]
    shown, held_out, num_left_out = hold_out(judgments, examples, 3)  # y5, y6, y7: queries 2 and 3
    assert [(j.example_id, j.response) for j in held_out] == [("5", "y"), ("6", "y"), ("7", "y")]
    assert [(j.example_id, j.response) for j in shown] == [(str(i), text) for text in "xy" for i in range(4)]
    assert num_left_out == 16 - 3 - 8


@pytest.fixture(scope="module")
def rollouts(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rollouts.jsonl of a short run."""
    folder = tmp_path_factory.mktemp("sampled")
    train(world.config(folder, num_steps=2, rollout={"num_prompts": 16}), small.ONE)
    return folder / "rollouts.jsonl"


@pytest.fixture(scope="module")
def base(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained policy whose context has room for verdicts with reasons."""
    folder = tmp_path_factory.mktemp("roomy")
    tokenizer = load_tokenizer(world.base)
    make_tiny(tokenizer, replace(small.TINY, max_context=640), 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(world: Any, base: Path, run_dir: Path, sampled: Path, **changes: Any) -> JudgeConfig:
    cfg = JudgeConfig(
        run_dir=str(run_dir),
        data=str(world.train),
        rollouts=str(sampled),
        held_out=12,
        num_votes=3,
        max_new_tokens=100,
        annotator_reasons=False,
        sft=world.sft_config(run_dir, num_steps=80, batch_size=12, policy={"path": str(base)}),
        mine=MineConfig(num_votes=4, num_cases=16),
        grpo=JudgeGrpoConfig(num_steps=2, rollout=RolloutConfig(num_prompts=6, group_size=4), optimizer=OptimizerConfig(lr=1e-4)),
    )
    return replace(cfg, **changes)


@pytest.fixture(scope="module")
def judged(
    world: Any, base: Path, rollouts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JudgeConfig, dict[str, Any]]:
    """Settings and report of a judge whose stages all ran without human verification."""
    cfg = settings(world, base, tmp_path_factory.mktemp("judges") / "judge", rollouts, human_error_rate=0.2)
    return cfg, train_judge(cfg, small.ONE)


def test_a_judge_is_trained_twice_and_measured(judged: tuple[JudgeConfig, dict[str, Any]], world: Any, rollouts: Path) -> None:
    cfg, report = judged
    run_dir = Path(cfg.run_dir)
    assert json.loads((run_dir / "judge.json").read_text()) == report
    names = [spec.name for spec in PAPER_STEPS]
    assert report["steps"] == names and report["num_held_out"] == 12
    responses = {(r.example_id, r.text) for _, r in read_rollouts(rollouts)}
    assert report["num_judgments"] + report["num_left_out"] == len(responses) - 12
    for stage in ("sft", "grpo"):
        steps = report[stage]["steps"]
        assert list(steps) == names and all(0 <= s["agreement"] <= 1 and s["num"] == 12 for s in steps.values())
        assert sum(s["num_missing"] for s in steps.values()) < 0.2 * 60  # the judge has learned the format of verdicts

    pairs = list(read_pairs(run_dir / "judge_sft.jsonl"))
    examples = {e.example_id: e for e in world.examples()}
    assert len(pairs) == report["num_judgments"]
    assert pairs[0][0] in {judge_prompt(examples[example_id], text) for example_id, text in responses}
    assert all(None not in parse_verdicts(target, 5) for _, target in pairs)

    queue = read_queue(run_dir / "judge_queue.jsonl", SCHEMA)
    rows = [json.loads(line) for line in (run_dir / "judge_queue.jsonl").read_text().split("\n") if line]
    disagreements = [len(row["disagrees"]) for row in rows]
    assert disagreements == sorted(disagreements, reverse=True) and disagreements[0] > 0  # the most disputed cases come first
    verified = {case_id: line.human for case_id, line in read_queue(run_dir / "judge_verified.jsonl", SCHEMA).items()}
    assert 6 <= len(queue) == report["mine"]["num_chosen"] <= 16
    assert verified.keys() == queue.keys() and None not in verified.values()
    assert report["verified"]["num_verified"] == len(queue)
    assert report["verified"]["num_corrected"] == sum(verified[k] != queue[k].labels for k in queue) > 0  # the annotator errs
    cases = {e.example_id: e for e in load_examples(run_dir / "grpo_cases.jsonl", StepSchema(verdict_steps(SCHEMA)))}
    for case_id, human in verified.items():
        assert human is not None
        assert cases[case_id].gold == tuple("Correct" if v else "Incorrect" for v in human)
    metrics = read_metrics(run_dir / "grpo" / "metrics.jsonl")
    assert len(metrics) == 2 and all(0 < line["reward/total"] <= 1 for line in metrics)
    seen = {r.example_id for _, r in read_rollouts(run_dir / "grpo" / "rollouts.jsonl")}
    assert len(seen) >= 6 and seen <= cases.keys() and PROMPT_FIELD in cases[next(iter(seen))].fields


def test_the_judge_of_the_last_stage_is_the_judge(judged: tuple[JudgeConfig, dict[str, Any]], world: Any, tmp_path: Path) -> None:
    run_dir = Path(judged[0].run_dir)
    last, sft, grpo = (small.parameters_of(run_dir / name) for name in ("policy", "sft/policy", "grpo/policy"))
    assert small.same_bits(last, grpo) and not small.same_bits(last, sft)
    reward = {"judge": "generative", "judge_path": str(run_dir / "policy"), "judge_max_new_tokens": 100}
    train(world.config(tmp_path / "run", num_steps=1, reward=reward), small.ONE)
    rollouts = [r for _, r in read_rollouts(tmp_path / "run" / "rollouts.jsonl") if None not in r.answers]
    sources = [r.reward_sources for r in rollouts]
    assert sources and {s[4] for s in sources if s} == {"gold"} and "judge" in {s[0] for s in sources if s}
    assert any(r.verdicts and r.verdicts[2] is not None for r in rollouts)
    (line,) = small.metrics_of(tmp_path / "run")
    assert 0 <= line["judge/error_rate/category_match"] <= 1 and line["judge/num_audited/category_match"] > 0


def test_a_judge_is_asked_with_the_guidelines_of_its_training(world: Any, base: Path, rollouts: Path, tmp_path: Path) -> None:
    """In both stages, also where the folder is copied to."""
    (tmp_path / "guidelines.txt").write_text("A knife is no fork.\n")
    cfg = settings(world, base, tmp_path / "judge", rollouts, guidelines=str(tmp_path / "guidelines.txt"))
    short = {"max_new_tokens": 8, "num_votes": 1, "sft": replace(cfg.sft, num_steps=1, batch_size=2)}
    hard = MineConfig(num_responses=4, num_votes=2, num_cases=4, solve_low=-1.0, solve_high=2.0, balance=())
    grpo = JudgeGrpoConfig(num_steps=1, rollout=RolloutConfig(num_prompts=2, group_size=2))
    train_judge(replace(cfg, **short, mine=hard, grpo=grpo), small.ONE)
    shutil.copytree(tmp_path / "judge" / "grpo" / "policy", tmp_path / "copy")
    for path in (tmp_path / "judge" / "sft" / "policy", tmp_path / "judge" / "policy", tmp_path / "copy"):
        reward = {"judge": "generative", "judge_path": str(path)}
        judge = build_judge(world.config(tmp_path / "run", reward=reward), SCHEMA, small.ONE)
        assert isinstance(judge, GenerativeJudge) and judge.guidelines == "A knife is no fork."


def files_of(run_dir: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.name != "judge.json"}


def test_what_is_done_is_not_done_again_and_what_is_lost_comes_out_the_same(
    judged: tuple[JudgeConfig, dict[str, Any]], tmp_path: Path
) -> None:
    cfg, report = judged
    before = files_of(Path(cfg.run_dir))
    assert train_judge(cfg, small.ONE) == report and files_of(Path(cfg.run_dir)) == before
    copy = replace(cfg, run_dir=str(tmp_path / "copy"))
    shutil.copytree(cfg.run_dir, copy.run_dir, symlinks=True)
    sft_files = files_of(tmp_path / "copy" / "sft")
    for lost in ("judge_queue.jsonl", "mine.json", "verified.json", "grpo.json", "judge.json"):
        (tmp_path / "copy" / lost).unlink()
    shutil.rmtree(tmp_path / "copy" / "grpo")
    assert train_judge(copy, small.ONE) == report
    assert files_of(tmp_path / "copy" / "sft") == sft_files and (tmp_path / "copy" / "grpo" / "policy").is_dir()
    with pytest.raises(ValueError, match=r"holds a run with sft\.num_steps = 80"):
        train_judge(replace(cfg, sft=replace(cfg.sft, num_steps=81)), small.ONE)
    with pytest.raises(ValueError, match=r"judge_queue\.jsonl was made with other mine\.\* settings"):
        train_judge(replace(cfg, mine=replace(cfg.mine, num_cases=5)), small.ONE)
    with pytest.raises(ValueError, match=r"grpo holds a run with num_steps = "):
        train_judge(replace(cfg, grpo=replace(cfg.grpo, num_steps=cfg.grpo.num_steps + 1)), small.ONE)


def test_humans_verify_between_the_stages(
    judged: tuple[JudgeConfig, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "judge"
    shutil.copytree(judged[0].run_dir, run_dir, symlinks=True)
    for lost in ("grpo.json", "verified.json", "judge_verified.jsonl", "grpo_cases.jsonl"):
        (run_dir / lost).unlink()
    shutil.rmtree(run_dir / "grpo")
    cfg = replace(judged[0], run_dir=str(run_dir), simulate_human=False)
    report = train_judge(cfg, small.ONE)
    assert "grpo" not in report and "--stage grpo --verified FILE" in capsys.readouterr().out
    line = small.complaint(srpo.train_judge.main, replace(cfg, stage="grpo"), tmp_path, capsys)
    assert "stage is grpo and verified is not set" in line

    rows = [json.loads(line) for line in (run_dir / "judge_queue.jsonl").read_text().split("\n") if line]
    for i, row in enumerate(rows):
        row["human"] = ["incorrect", None, "correct", None, None] if i < 6 else []
    verified = tmp_path / "verified.jsonl"
    verified.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = replace(cfg, stage="grpo", verified=str(verified))
    report = train_judge(cfg, small.ONE)
    assert report["verified"]["num_dropped"] == len(rows) - 6 and "steps" in report["grpo"]
    cases = load_examples(run_dir / "grpo_cases.jsonl", StepSchema(verdict_steps(SCHEMA)))
    assert {case.gold for case in cases} == {("Incorrect", None, "Correct", None, None)} and len(cases) == 6

    (run_dir / "grpo.json").unlink()  # the stage is not done, and verdicts change
    line = small.complaint(srpo.train_judge.main, replace(cfg, unverified="use"), tmp_path, capsys)
    assert "has begun with other verdicts" in line
    small.rewrite_line(verified, verified, 2, lambda row: row | {"human": ["yes"] * 5})
    line = small.complaint(srpo.train_judge.main, cfg, tmp_path, capsys)
    assert "verified.jsonl, line 2: human has 'yes'" in line
    verified.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small.rewrite_line(run_dir / "judge_queue.jsonl", run_dir / "judge_queue.jsonl", 1, lambda row: row | {"example_id": "x"})
    line = small.complaint(srpo.train_judge.main, cfg, tmp_path, capsys)
    assert "judge_queue.jsonl, line 1: example_id 'x' is not in" in line


def test_a_pool_of_further_responses_is_mined(judged: tuple[JudgeConfig, dict[str, Any]], tmp_path: Path, rollouts: Path) -> None:
    run_dir = tmp_path / "judge"
    shutil.copytree(judged[0].run_dir, run_dir, symlinks=True)
    for lost in ("judge_queue.jsonl", "grpo.json"):
        (run_dir / lost).unlink()
    pool = tmp_path / "pool.jsonl"
    shutil.copy(rollouts, pool)
    cfg = replace(judged[0], run_dir=str(run_dir), stage="mine", mine=MineConfig(pool=str(pool), num_votes=2, num_responses=9))
    report = train_judge(cfg, small.ONE)
    assert report["mine"]["num_responses"] == 9
    for line in read_queue(run_dir / "judge_queue.jsonl", SCHEMA).values():
        assert line.labels[:2] == (None, None) and None not in line.labels[2:]  # no judgments, only gold labels
    before = files_of(run_dir)
    pool.write_text("".join(pool.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=f"made of other responses than {pool} has now"):
        train_judge(cfg, small.ONE)
    assert files_of(run_dir) == before


def test_a_scalar_judge_is_trained_measured_and_used(
    world: Any, base: Path, rollouts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(world, base, tmp_path / "scalar", rollouts, kind="scalar")
    report = train_judge(cfg, small.ONE)
    assert "mine" not in report and "grpo" not in report
    for scores in report["sft"]["steps"].values():
        assert scores["num_missing"] == 0 and scores["calibration"]["num"] == scores["num"] == 12
    first, *_, last = read_metrics(tmp_path / "scalar" / "sft" / "metrics.jsonl")
    assert first["train/loss"] == pytest.approx(0.6931, abs=1e-3) and last["train/loss"] < 0.5
    assert last["train/verdict_accuracy"] > 0.75
    for reading, rewards in (("threshold", {0.0, 0.2}), ("probability", None)):
        reward = {"judge": "scalar", "judge_path": str(tmp_path / "scalar" / "policy"), "scalar": reading}
        train(world.config(tmp_path / reading, num_steps=1, reward=reward), small.ONE)
        done = [r for _, r in read_rollouts(tmp_path / reading / "rollouts.jsonl")]
        earned = {r.step_rewards[0] for r in done if r.step_rewards and r.reward_sources and r.reward_sources[0] == "judge"}
        assert earned and (earned <= rewards if rewards else any(0 < x < 0.2 for x in earned))
        assert 0 <= small.metrics_of(tmp_path / reading)[0]["judge/error_rate/category_match"] <= 1
    line = small.complaint(srpo.train_judge.main, replace(cfg, stage="mine"), tmp_path, capsys)
    assert "stage is mine and kind scalar" in line


def test_a_judge_without_room_for_prompts_is_refused(world: Any) -> None:
    with pytest.raises(ValueError, match=r"320 new tokens leave no room .* lower reward\.judge_max_new_tokens"):
        open_judge(load_policy(world.policy), None, SCHEMA, 320)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "data is not set: name the file of the examples"),
        ({"rollouts": ""}, "set either judgments .* or rollouts"),
        ({"judgments": "also.jsonl"}, "set either judgments .* or rollouts"),
        ({"rollouts": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"held_out": 5000}, r"held_out is 5000 and \d+ judgments have a verdict: .* lower held_out"),
        ({"held_out": 0}, "held_out is 0: set it to 1 or more"),
        ({"stage": "mine"}, r"stage mine needs .*sft\.json, which does not exist"),
        ({"stage": "grpo"}, r"stage grpo needs .*judge_queue\.jsonl, which does not exist"),
        ({"verified": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"mine": MineConfig(balance=("flavour",))}, "mine.balance: .* no tag 'flavour' .*`--mine.balance` without a value"),
        ({"mine": MineConfig(num_votes=1)}, "mine.num_votes is 1: set it to 2 or more"),
        ({"mine": MineConfig(num_responses=-1)}, "mine.num_responses is -1: set it to 0 or more"),
        ({"kind": "scalar", "sft": SftConfig(inputs="hidden")}, "sft.inputs is 'hidden' and kind scalar"),
        ({"sft": SftConfig(verdict_weight=4)}, r"sft.verdict_weight is set: .* leave it out"),
        ({"mine": MineConfig(solve_low=0.9, solve_high=0.1)}, "mine.solve_low is 0.9 and mine.solve_high 0.1: set"),
    ],
)
def test_what_cannot_work_is_one_line(
    world: Any,
    base: Path,
    tmp_path: Path,
    rollouts: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    cfg = settings(world, base, tmp_path / "judge", rollouts, **changes)
    line = small.complaint(srpo.train_judge.main, cfg, tmp_path, capsys)
    assert re.search(message, line), line
    assert not (tmp_path / "judge").exists()


def test_other_files_than_rollouts_and_judgments_of_other_data(
    world: Any, base: Path, tmp_path: Path, rollouts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(world, base, tmp_path / "judge", world.train)
    assert "give a line of a rollouts.jsonl" in small.complaint(srpo.train_judge.main, cfg, tmp_path, capsys)
    judged = tmp_path / "judged.jsonl"
    judged.write_text(json.dumps({**ROW, "example_id": "unheard of"}) + "\n")
    cfg = settings(world, base, tmp_path / "judge", Path(), rollouts="", judgments=str(judged))
    line = small.complaint(srpo.train_judge.main, cfg, tmp_path, capsys)
    assert "1 judgments are of examples that are not in" in line and "unheard of" in line
