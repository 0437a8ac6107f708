"""Audit of the judge during training: its verdicts on steps with a gold label are compared with that label.

The judge reads a whole response, so one call judges S3, S4 and S5 along with S1 and S2. Where labels exist, they measure its
error rate on the current policy's responses. Reward hacking, a policy that learns to please the judge, shows as wrong steps
that the judge calls correct. The audit needs no further call of the judge. It reads the rollouts of all ranks, so that every rank
takes the same decision.

Paper: the paper evaluates the judge before the policy trains (Table 2), not during training; the audit is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from srpo.core.batch import Rollout
from srpo.core.config.train import RewardConfig
from srpo.core.errors import UserError
from srpo.core.steps import StepSchema, same_answer
from srpo.data.examples import Example
from srpo.rewards.hybrid import NO_VERDICT

NUM, ERRORS, WRONG, FALSE_CORRECT = range(4)  # row numbers of the counts
SILENT = ""  # stands for a silent judge among names of reasoning steps, which are never empty
_MIN_ASKED = 10  # least number of steps left to the judge before it can count as silent


def audit_counts(rollouts: Sequence[Rollout], examples: Sequence[Example], schema: StepSchema) -> np.ndarray:
    """Return counts [4, J]: audited verdicts, wrong verdicts, wrong steps, wrong steps that the judge calls correct.

    rollouts[i].group indexes `examples`. A step is audited if it has a verdict, a gold label and an answer. A probability of 0.5
    or more is the verdict "correct".
    """
    counts = np.zeros((4, schema.num_steps))
    for rollout in rollouts:
        gold = examples[rollout.group].gold
        if rollout.verdicts is None or not gold:
            continue
        for j, (verdict, answer, label) in enumerate(zip(rollout.verdicts, rollout.answers, gold, strict=True)):
            if verdict is None or answer is None or label is None:
                continue
            correct, right = verdict >= 0.5, same_answer(answer, label)
            counts[:, j] += (1, correct != right, not right, correct and not right)
    return counts


def asked_counts(rollouts: Sequence[Rollout], schema: StepSchema) -> np.ndarray:
    """Return counts [2] of scored rollouts: steps left to the judge, and those of them without a verdict.

    A step without a verdict counts as missing even if a later source, "rule" or "skip", graded it.
    """
    counts = np.zeros(2)
    for rollout in rollouts:
        sources = rollout.reward_sources or ("missing",) * schema.num_steps
        for spec, answer, source in zip(schema.specs, rollout.answers, sources, strict=True):
            asked = rollout.verdicts is not None and answer is not None and "judge" in spec.sources
            missing = source == NO_VERDICT or (asked and source in ("rule", "skip"))
            counts += (missing or source == "judge", missing)
    return counts


@dataclass(frozen=True)
class Audit:
    """The judge's errors up to one optimizer step; a checkpoint stores its `state`.

    `average` is a decaying sum of the counts: factor `reward.audit_decay` per optimizer step, so that optimizer steps with few
    labels weigh little. `baseline` is the sum over the first `reward.audit_warmup` optimizer steps with an audited verdict.
    """

    counts: np.ndarray  # [4, J] of this optimizer step
    average: np.ndarray  # [4, J]
    baseline: np.ndarray  # [4, J]
    num_steps: int  # optimizer steps with at least one audited verdict
    beyond: tuple[str, ...]  # names of the reasoning steps whose error rate exceeds the bound; SILENT for a silent judge
    news: tuple[str, ...]  # one line of text for each name in `beyond` that is new in this optimizer step
    asked: tuple[float, float] = (0.0, 0.0)  # decaying sums like `average`: steps left to the judge; those without a verdict

    @property
    def state(self) -> dict[str, Any]:
        """JSON-able values from which `audit` continues exactly."""
        return {
            "average": self.average.tolist(),
            "baseline": self.baseline.tolist(),
            "num_steps": self.num_steps,
            "beyond": list(self.beyond),
            "asked": list(self.asked),
        }

    def metrics(self, schema: StepSchema) -> dict[str, float]:
        """Return the `judge/*` metrics of this optimizer step; a rate with denominator 0 has no key."""
        metrics: dict[str, float] = {}
        for j, spec in enumerate(schema.specs):
            num, errors, wrong, false_correct = self.counts[:, j].tolist()
            if num:
                metrics[f"judge/error_rate/{spec.name}"] = errors / num
                metrics[f"judge/num_audited/{spec.name}"] = int(num)
            if wrong:
                metrics[f"judge/false_correct_rate/{spec.name}"] = false_correct / wrong
            if self.average[NUM, j] and self.baseline[NUM, j]:
                metrics[f"judge/drift/{spec.name}"] = float(drift(self.average, self.baseline)[j])
        return metrics


def drift(average: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Return [J], the averaged error rate minus that of the warm-up; NaN without audited verdicts. Arguments: [4, J] counts."""
    with np.errstate(invalid="ignore"):
        return average[ERRORS] / average[NUM] - baseline[ERRORS] / baseline[NUM]


def audit(
    state: Mapping[str, Any] | None,
    rollouts: Sequence[Rollout],
    examples: Sequence[Example],
    schema: StepSchema,
    cfg: RewardConfig,
) -> Audit:
    """Audit one optimizer step: the scored rollouts of *all* ranks, and the `state` of the optimizer step before (None: new run).

    A reasoning step is beyond the bound if, after the warm-up, its averaged error rate exceeds that of the warm-up by more than
    `reward.audit_bound`, with at least `reward.audit_min` verdicts in the average. With `reward.audit` "warn" the loop prints
    `news`; with "off" nothing is counted. Raises UserError with "stop" and a step beyond the bound.

    A judge is silent if it gives no verdict on more than `reward.audit_missing` of the steps left to it, averaged alike: those
    steps then earn nothing, whatever the policy writes. This is printed with "log", too.
    """
    shape = (4, schema.num_steps)
    counts = audit_counts(rollouts, examples, schema) if cfg.audit != "off" else np.zeros(shape)
    state = state or {"average": np.zeros(shape), "baseline": np.zeros(shape), "num_steps": 0, "beyond": []}
    asked = cfg.audit_decay * np.asarray(state.get("asked", (0.0, 0.0)))
    if cfg.audit != "off":
        asked += asked_counts(rollouts, schema)
    num_steps = state["num_steps"] + bool(counts[NUM].any())
    average = cfg.audit_decay * np.asarray(state["average"], dtype=np.float64) + counts
    baseline = np.asarray(state["baseline"], dtype=np.float64) + counts * (num_steps <= cfg.audit_warmup)
    alarms: dict[str, str] = {}
    if num_steps > cfg.audit_warmup and cfg.audit in ("warn", "stop"):
        rise = drift(average, baseline)
        for j, spec in enumerate(schema.specs):
            if rise[j] > cfg.audit_bound and average[NUM, j] >= cfg.audit_min:  # False if the rise is NaN
                alarms[spec.name] = _alarm(spec.name, average[:, j], baseline[:, j], cfg)
    if alarm := silence(asked, cfg):
        alarms[SILENT] = alarm
        if cfg.audit == "stop":
            raise UserError(alarm)
    if alarms and cfg.audit == "stop":
        raise UserError(
            f"{next(iter(alarms.values()))}. The policy may have learned to please the judge: read the verdicts in "
            "rollouts.jsonl, train the judge on such responses (srpo.train_judge) and start a new run_dir with it; to continue "
            "instead, set reward.audit = 'warn'"
        )
    news = tuple(text for name, text in alarms.items() if name not in state["beyond"])
    return Audit(counts, average, baseline, num_steps, tuple(alarms), news, (float(asked[0]), float(asked[1])))


def silence(asked: np.ndarray, cfg: RewardConfig) -> str:
    """A sentence if a judge gives too few verdicts, from counts [2] of `asked_counts`; "" if it gives enough."""
    if asked[0] < _MIN_ASKED or asked[1] <= cfg.audit_missing * asked[0]:
        return ""
    return (
        f"the judge gives no verdict on {asked[1] / asked[0]:.0%} of the steps left to it, more than reward.audit_missing = "
        f"{cfg.audit_missing}: they earn nothing. Look at what it writes (a model that thinks first needs a larger "
        "reward.judge_max_new_tokens, or a server that returns its answer as content), and at service/num_no_text"
    )


def _alarm(name: str, average: np.ndarray, baseline: np.ndarray, cfg: RewardConfig) -> str:
    rates = f"errs on {average[ERRORS] / average[NUM]:.1%} of step {name!r} after {baseline[ERRORS] / baseline[NUM]:.1%}"
    passed = f"{average[FALSE_CORRECT] / average[WRONG]:.0%} of the wrong steps pass" if average[WRONG] else "no step is wrong"
    return f"the judge {rates} at the start ({passed}), a rise of more than reward.audit_bound = {cfg.audit_bound}"
