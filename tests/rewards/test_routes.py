"""configs/hybrid.toml and configs/reward_model_only.toml, the two settings of Table 3, differ in nothing but step sources. Also
configs/verdict_only.toml, for pairs without step labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from srpo.core.batch import Rollout
from srpo.core.config.train import Config
from srpo.core.settings import load
from srpo.core.step_presets import PAPER_STEPS
from srpo.data.examples import Example
from srpo.rewards.hybrid import score

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_the_two_settings_differ_in_who_grades_s3_and_s4() -> None:
    hybrid, judge_only = (load(Config, ["@", str(CONFIGS / f"{name}.toml")]) for name in ("hybrid", "reward_model_only"))
    assert hybrid.schema.specs == PAPER_STEPS
    assert [spec.sources for spec in hybrid.schema.specs] == [("judge",)] * 2 + [("gold", "judge")] * 2 + [("gold",)]
    assert [spec.sources for spec in judge_only.schema.specs] == [("judge",)] * 4 + [("gold",)]
    pairs = zip(judge_only.schema.specs, PAPER_STEPS, strict=True)
    assert [replace(ours, sources=theirs.sources) for ours, theirs in pairs] == list(PAPER_STEPS)
    assert replace(judge_only, steps=hybrid.steps, run_dir=hybrid.run_dir) == hybrid


def test_pairs_with_a_grade_alone_are_rewarded_by_it() -> None:
    cfg = load(Config, ["@", str(CONFIGS / "verdict_only.toml")])
    assert cfg.reward.judge == "none"
    schema = cfg.schema
    answers = ("shoes", "boots", "match", "match")
    graded = Example("e", "q", "query", "title", gold=(None, None, None, None, "L2"), truth=(None,) * 5)
    labelled = replace(graded, gold=(None, None, None, "conflict", "L2"))
    rollouts = [Rollout.from_answers("e", (*answers, verdict)) for verdict in ("L2", "L3")]
    scored = score(rollouts * 2, [graded] * 2 + [labelled] * 2, schema, None)
    assert [r.step_rewards for r in scored] == [(0.0, 0.0, 0.0, 0.0, earned) for earned in (1.0, 0.0)] * 2
    assert [r.reward_sources for r in scored] == [("skip",) * 4 + ("gold",)] * 2 + [("skip",) * 3 + ("gold",) * 2] * 2
