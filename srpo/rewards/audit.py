"""A live audit of the judge: what it says of steps that have a gold label, held against that label while the policy trains.

The judge reads a response as a whole, so it judges S3, S4 and S5 in the same call as S1 and S2. Where labels exist they tell how
often it errs now, on what the present policy writes: a policy that learns to please the judge (reward hacking) shows as wrong
steps that the judge calls correct. The audit costs no call of the judge and reads the rollouts of all ranks, so that every rank
comes to the same decision.

Paper: it evaluates the judge before the policy trains (Table 2) and not during; the audit is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from srpo.core.batch import Rollout
from srpo.core.config.train import RewardConfig
from srpo.core.steps import StepSchema, same_answer
from srpo.data.examples import Example

NUM, ERRORS, WRONG, FALSE_CORRECT = range(4)  # rows of the counts


def audit_counts(rollouts: Sequence[Rollout], examples: Sequence[Example], schema: StepSchema) -> np.ndarray:
    """[4, J]: verdicts on steps with a label, those that are wrong, the steps that are wrong, those of them called correct.

    rollouts[i].group indexes `examples`. A step counts where the judge was asked and said something, the example has a label, and
    the response an answer. A probability of 0.5 or more is "correct".
    """
    counts = np.zeros((4, schema.num_steps))
    for rollout in rollouts:
        gold = examples[rollout.group].gold
        if rollout.verdicts is None or not gold:
            continue
        for j, (said, answer, label) in enumerate(zip(rollout.verdicts, rollout.answers, gold, strict=True)):
            if said is None or answer is None or label is None:
                continue
            correct, right = said >= 0.5, same_answer(answer, label)
            counts[:, j] += (1, correct != right, not right, correct and not right)
    return counts


@dataclass(frozen=True)
class Audit:
    """The judge's errors up to some optimizer step; what a checkpoint keeps of it is `state`.

    `average` decays by `reward.audit_decay` with each optimizer step, counts and errors alike, so that a step with few labels
    weighs little; `baseline` is the sum over the first `reward.audit_warmup` steps that had any.
    """

    counts: np.ndarray  # [4, J] of this optimizer step
    average: np.ndarray  # [4, J]
    baseline: np.ndarray  # [4, J]
    num_steps: int  # optimizer steps with at least one audited verdict
    beyond: tuple[str, ...]  # names of the reasoning steps whose error rate is beyond the bound now
    news: tuple[str, ...]  # one line for each of them that was not, one optimizer step before

    @property
    def state(self) -> dict[str, Any]:
        """As plain values; `audit` continues from it exactly."""
        return {
            "average": self.average.tolist(),
            "baseline": self.baseline.tolist(),
            "num_steps": self.num_steps,
            "beyond": list(self.beyond),
        }

    def metrics(self, schema: StepSchema) -> dict[str, float]:
        """The `judge/*` metrics of this optimizer step; a rate of nothing has no key."""
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
    """[J] rise of the averaged error rate over that of the warm-up; NaN where nothing was audited. Both [4, J]."""
    with np.errstate(invalid="ignore"):
        return average[ERRORS] / average[NUM] - baseline[ERRORS] / baseline[NUM]


def audit(
    state: Mapping[str, Any] | None,
    rollouts: Sequence[Rollout],
    examples: Sequence[Example],
    schema: StepSchema,
    cfg: RewardConfig,
) -> Audit:
    """The audit after the scored rollouts of *all* ranks of one optimizer step, from the `state` of the one before (None: new).

    Raises ValueError where `reward.audit` is "stop" and, after the warm-up, a step's averaged error rate has risen by more than
    `reward.audit_bound` over that of the warm-up, with at least `reward.audit_min` verdicts in the average. With "warn" the loop
    prints `news`; with "off" nothing is counted.
    """
    shape = (4, schema.num_steps)
    counts = audit_counts(rollouts, examples, schema) if cfg.audit != "off" else np.zeros(shape)
    state = state or {"average": np.zeros(shape), "baseline": np.zeros(shape), "num_steps": 0, "beyond": []}
    num_steps = state["num_steps"] + bool(counts[NUM].any())
    average = cfg.audit_decay * np.asarray(state["average"], dtype=np.float64) + counts
    baseline = np.asarray(state["baseline"], dtype=np.float64) + counts * (num_steps <= cfg.audit_warmup)
    alarms: dict[str, str] = {}
    if num_steps > cfg.audit_warmup and cfg.audit in ("warn", "stop"):
        rise = drift(average, baseline)
        for j, spec in enumerate(schema.specs):
            if rise[j] > cfg.audit_bound and average[NUM, j] >= cfg.audit_min:  # False for NaN
                alarms[spec.name] = _alarm(spec.name, average[:, j], baseline[:, j], cfg)
    if alarms and cfg.audit == "stop":
        raise ValueError(
            f"{next(iter(alarms.values()))}. The policy may have learned to please the judge: read the verdicts in "
            "rollouts.jsonl, train the judge again on such responses (srpo.train_judge) and start a new run_dir with it; "
            "reward.audit = 'warn' does not stop"
        )
    news = tuple(text for name, text in alarms.items() if name not in state["beyond"])
    return Audit(counts, average, baseline, num_steps, tuple(alarms), news)


def _alarm(name: str, average: np.ndarray, baseline: np.ndarray, cfg: RewardConfig) -> str:
    rates = f"errs on {average[ERRORS] / average[NUM]:.1%} of step {name!r} after {baseline[ERRORS] / baseline[NUM]:.1%}"
    passed = f"{average[FALSE_CORRECT] / average[WRONG]:.0%} of the wrong ones pass" if average[WRONG] else "no step is wrong"
    return f"the judge {rates} at the start ({passed}), a rise of more than reward.audit_bound = {cfg.audit_bound}"
