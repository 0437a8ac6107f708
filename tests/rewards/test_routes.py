"""configs/hybrid.toml and configs/reward_model_only.toml: Table 3's two settings, one table of sources apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from srpo.config import Config
from srpo.settings import load
from srpo.steps import PAPER_STEPS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_the_two_settings_differ_in_who_grades_s3_and_s4() -> None:
    hybrid, judge_only = (load(Config, ["@", str(CONFIGS / f"{name}.toml")]) for name in ("hybrid", "reward_model_only"))
    assert hybrid.steps == PAPER_STEPS
    assert [spec.sources for spec in hybrid.steps] == [("judge",)] * 2 + [("gold", "judge")] * 2 + [("gold",)]
    assert [spec.sources for spec in judge_only.steps] == [("judge",)] * 4 + [("gold",)]
    pairs = zip(judge_only.steps, PAPER_STEPS, strict=True)
    assert [replace(ours, sources=theirs.sources) for ours, theirs in pairs] == list(PAPER_STEPS)
    assert replace(judge_only, steps=hybrid.steps, run_dir=hybrid.run_dir) == hybrid
