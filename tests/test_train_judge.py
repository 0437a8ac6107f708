from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import srpo.train_judge
from srpo.batch import Rollout, read_rollouts
from srpo.data.examples import Example
from srpo.policy.model import load_policy
from srpo.rewards.judge import Verdicts
from srpo.rewards.verdicts import judge_prompt, parse_verdicts
from srpo.rollout.judging import open_judge
from srpo.sft import read_pairs
from srpo.steps import PAPER_STEPS, StepSchema
from srpo.train import train
from srpo.train_judge import JudgeConfig, Judgment, read_judgments, simulate_judgments, step_agreement, train_judge

SCHEMA = StepSchema(PAPER_STEPS)
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
        ("{", "want"),
        ("[]", "want"),
        ('{"example_id": "e1", "response": "x"}', "want"),
        (json.dumps({**ROW, "response": None}), "response is None: give the text"),
        (json.dumps({**ROW, "verdicts": [True] * 4}), r"give 5 of true, false or null, one per step"),
        (json.dumps({**ROW, "verdicts": [1, 0, 1, 1, 0]}), r"give 5 of true, false or null"),
        (json.dumps({**ROW, "verdicts": "TTFTF"}), r"give 5 of true, false or null"),
        (json.dumps({**ROW, "reasons": ["a"]}), "give 5 texts, one per step"),
        (json.dumps({**ROW, "reasons": "abcde"}), "give 5 texts, one per step"),
    ],
)
def test_a_malformed_judgment_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "judged.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(ValueError, match=rf"judged\.jsonl, line 2: .*{message}"):
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


class Told:
    """A judge that says what it is told to."""

    def __init__(self, verdicts: dict[str, Verdicts]) -> None:
        self.verdicts = verdicts

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        assert [r.example_id for r in rollouts] == [e.example_id for e in examples]
        return [self.verdicts[r.text] for r in rollouts]


def test_agreement_is_the_share_of_repeated_verdicts() -> None:
    examples = {"e": Example("e", "q", "query", "title")}
    judgments = [
        Judgment("e", "one", (True, True, False, None, True), (None,) * 5),
        Judgment("e", "two", (True, False, False, None, False), (None,) * 5),
    ]
    judge: Any = Told({"one": (True, None, False, True, False), "two": (True, False, True, False, True)})
    assert step_agreement(judge, judgments, examples) == [1.0, 0.5, 0.5, None, 0.0]


@pytest.fixture(scope="module")
def rollouts(small: ModuleType, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rollouts.jsonl of a short run."""
    folder = tmp_path_factory.mktemp("sampled")
    train(world.config(folder, num_steps=2, rollout={"num_prompts": 16}), small.ONE)
    return folder / "rollouts.jsonl"


def settings(world: Any, run_dir: Path, sampled: Path, **changes: Any) -> JudgeConfig:
    sft = world.sft_config(run_dir, num_steps=60, batch_size=12)
    cfg = JudgeConfig(
        run_dir=str(run_dir), data=str(world.train), rollouts=str(sampled), held_out=20, max_new_tokens=100, sft=sft
    )
    return replace(cfg, **changes)


def test_a_judge_is_trained_measured_and_used(small: ModuleType, world: Any, tmp_path: Path, rollouts: Path) -> None:
    cfg = settings(world, tmp_path / "judge", rollouts)
    report = train_judge(cfg, small.ONE)
    assert json.loads((tmp_path / "judge" / "judge.json").read_text()) == report
    assert report["steps"] == [spec.name for spec in PAPER_STEPS] and report["num_held_out"] == 20
    responses = {(r.example_id, r.text) for _, r in read_rollouts(rollouts)}
    assert report["num_judgments"] == len(responses) - 20
    assert all(share is not None and 0 <= share <= 1 for share in report["agreement"])
    assert report["num_missing"] < 0.2 * report["num_verdicts"]  # it has learned how to write verdicts

    pairs = list(read_pairs(tmp_path / "judge" / "judge_sft.jsonl"))
    examples = {e.example_id: e for e in world.examples()}
    assert pairs[0][0] in {judge_prompt(examples[example_id], text) for example_id, text in responses}
    assert all(None not in parse_verdicts(target, 5) for _, target in pairs)

    reward = {"judge": "generative", "judge_path": str(tmp_path / "judge" / "policy"), "judge_max_new_tokens": 100}
    train(world.config(tmp_path / "run", num_steps=1, reward=reward), small.ONE)
    sources = [r.reward_sources for _, r in read_rollouts(tmp_path / "run" / "rollouts.jsonl") if None not in r.answers]
    assert sources and {s[4] for s in sources if s} == {"gold"} and "judge" in {s[0] for s in sources if s}


def test_a_judge_without_room_for_prompts_is_refused(small: ModuleType, world: Any) -> None:
    with pytest.raises(ValueError, match=r"320 new tokens leave no room .* lower reward\.judge_max_new_tokens"):
        open_judge(load_policy(world.policy), None, SCHEMA, 320)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "data is not set: name the examples"),
        ({"rollouts": ""}, "set one of judgments .* and rollouts"),
        ({"judgments": "also.jsonl"}, "set one of judgments .* and rollouts"),
        ({"rollouts": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"held_out": 5000}, r"\d+ judgments have a verdict and held_out is 5000, .*: lower held_out"),
    ],
)
def test_what_cannot_work_is_one_line(
    small: ModuleType,
    world: Any,
    tmp_path: Path,
    rollouts: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    cfg = settings(world, tmp_path / "judge", rollouts, **changes)
    line = small.complaint(srpo.train_judge.main, cfg, tmp_path, capsys)
    assert re.search(message, line), line
    assert not (tmp_path / "judge").exists()


def test_other_files_than_rollouts_and_judgments_of_other_data(
    small: ModuleType, world: Any, tmp_path: Path, rollouts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(world, tmp_path / "judge", world.train)
    assert "is not a rollouts.jsonl" in small.complaint(srpo.train_judge.main, cfg, tmp_path, capsys)
    judged = tmp_path / "judged.jsonl"
    judged.write_text(json.dumps({**ROW, "example_id": "unheard of"}) + "\n")
    cfg = settings(world, tmp_path / "judge", Path(), rollouts="", judgments=str(judged))
    line = small.complaint(srpo.train_judge.main, cfg, tmp_path, capsys)
    assert "1 judgments speak of examples that are not in" in line and "unheard of" in line
