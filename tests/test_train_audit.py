"""The audit of the judge in the loop of srpo.train: it is logged, warns, stops the run, and resumes exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small_world as small

import srpo.training.run
from srpo.core.batch import Rollout, read_rollouts
from srpo.core.step_presets import PAPER, PAPER_STEPS
from srpo.core.steps import same_answer
from srpo.data.examples import Example
from srpo.rewards.judge import OracleJudge, Verdicts
from srpo.train import train

SCHEMA = PAPER


class Drifts:
    """A perfect judge that accepts every step from call `turns_at` on, and raises at call `breaks_at`."""

    def __init__(self, turns_at: int = 99, breaks_at: int = 99) -> None:
        self.turns_at, self.breaks_at, self.num_calls = turns_at, breaks_at, 0
        self.oracle = OracleJudge(0.0, 0, SCHEMA)

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        self.num_calls += 1
        if self.num_calls == self.breaks_at:
            raise ValueError("the judge has gone")
        return [(True,) * 5] * len(rollouts) if self.num_calls >= self.turns_at else self.oracle.judge(rollouts, examples)


def test_the_log_is_what_the_rollouts_say(world: Any, tmp_path: Path) -> None:
    train(world.config(tmp_path, num_steps=2, reward={"judge_error_rate": 0.3}), small.ONE)
    gold = {e.example_id: e.gold for e in world.examples()}
    audited = 0
    for line in small.metrics_of(tmp_path):
        sampled = [r for step, r in read_rollouts(tmp_path / "rollouts.jsonl") if step == line["step"]]
        for j, spec in enumerate(PAPER_STEPS):
            pairs = [
                (r.verdicts[j], same_answer(r.answers[j], gold[r.example_id][j]))
                for r in sampled
                if r.verdicts and r.answers[j] is not None and gold[r.example_id][j] is not None
            ]
            audited += len(pairs)
            assert line.get(f"judge/num_audited/{spec.name}", 0) == len(pairs)
            if pairs:
                assert line[f"judge/error_rate/{spec.name}"] == pytest.approx(sum(a != b for a, b in pairs) / len(pairs))
            wrong = [verdict for verdict, right in pairs if not right]
            if wrong:
                assert line[f"judge/false_correct_rate/{spec.name}"] == pytest.approx(sum(map(bool, wrong)) / len(wrong))
    assert audited > 30


@pytest.mark.parametrize("audit", ["off", "log", "warn", "stop"])
def test_a_judge_that_begins_to_pass_everything(
    world: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    audit: str,
) -> None:
    judge = Drifts(turns_at=3)
    monkeypatch.setattr(srpo.training.run, "build_judge", lambda *_: judge)
    cfg = world.config(tmp_path, num_steps=4, reward={"audit": audit, "audit_warmup": 2, "audit_bound": 0.02, "audit_min": 1})
    if audit == "stop":
        with pytest.raises(ValueError, match=r"the judge errs on .* after 0\.0% at the start .*audit_bound = 0\.02"):
            train(cfg, small.ONE)
        assert [line["step"] for line in small.metrics_of(tmp_path)] == [1, 2] and judge.num_calls == 3
        return
    train(cfg, small.ONE)
    lines, printed = small.metrics_of(tmp_path), capsys.readouterr().out
    assert judge.num_calls == 4  # one call per optimizer step, audited or not
    assert ("optimizer step 3: the judge errs on" in printed) == (audit == "warn") and "optimizer step 1:" not in printed
    drifts = [max((v for k, v in line.items() if k.startswith("judge/drift/")), default=None) for line in lines]
    assert drifts == [None] * 4 if audit == "off" else drifts[:2] == [0, 0] and (drifts[2] or 0) > 0.02


def test_the_average_survives_a_broken_run(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(name: str, *judges: Drifts) -> list[dict[str, float]]:
        cfg = world.config(tmp_path / name, num_steps=5, reward={"audit_warmup": 2}, train={"checkpoint_every": 1})
        for judge in judges:
            monkeypatch.setattr(srpo.training.run, "build_judge", lambda *_, judge=judge: judge)
            if judge.breaks_at < 99:
                with pytest.raises(ValueError, match="the judge has gone"):
                    train(cfg, small.ONE)
            else:
                train(cfg, small.ONE)
        return small.metrics_of(tmp_path / name)

    straight = runs("straight", Drifts(turns_at=2))
    broken = runs("broken", Drifts(turns_at=2, breaks_at=4), Drifts(turns_at=1))
    assert broken == straight and straight[-1]["judge/drift/category_match"] != 0
