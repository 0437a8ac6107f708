"""Shared by tests of the judge service: settings with short pauses, an example, and calls of the judge."""

from __future__ import annotations

from typing import Any

from srpo.core.batch import Rollout
from srpo.core.config.train import RewardConfig
from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.rewards.judge import GenerativeJudge

SCHEMA = PAPER
EXAMPLE = Example("a", "q", "boots", "Red boots")
KEY = "sk-2f9e-secret"
SETTINGS = RewardConfig(
    judge="generative",
    judge_engine="url",
    judge_model="r_phi",
    judge_timeout_s=5.0,
    judge_retries=2,
    judge_backoff_s=0.01,
    judge_fallback="stop",
    judge_cache=0,
    judge_max_new_tokens=40,
)
SILENT = (None,) * 5
GOOD = (True, None, None, None, None)


def make_rollout(text: str) -> Rollout:
    return Rollout.from_answers("a", ("x",) * 5, text=text)


def ask(judge: GenerativeJudge, *texts: str) -> list[Any]:
    return judge.judge([make_rollout(text) for text in texts], [EXAMPLE] * len(texts))


def counts(judge: GenerativeJudge) -> dict[str, float]:
    return {name: number for name, number in judge.take_counts().items() if number and name != "busy_s"}
