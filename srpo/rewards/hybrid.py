"""The stepwise hybrid reward (Eq. 5, Appendix B): each step is graded by the first of its sources that can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from srpo.core.batch import Rollout
from srpo.core.errors import UserError
from srpo.core.steps import StepSchema, StepSpec, same_answer
from srpo.data.examples import Example
from srpo.rewards.judge import Judge, Verdicts

# Values of `Rollout.reward_sources` for steps that no source of `StepSpec` graded:
MISSING = "missing"  # the response has no answer to the step: earns 0
NO_VERDICT = "no_verdict"  # the judge gave no verdict: earns missing_verdict * reward


def score(
    rollouts: Sequence[Rollout],
    examples: Sequence[Example],
    schema: StepSchema,
    judge: Judge | None,
    missing_verdict: float = 0.0,
) -> list[Rollout]:
    """Return the rollouts with `step_rewards` and `reward_sources`, [J] each (Eq. 5); rollouts[i] answers the pair examples[i].

    The first source of a step that can grade it does: "gold" if the example has a label (correct if the answer states the same
    facts), "judge" if it gives a verdict (a probability earns that fraction of the reward), "rule" (correct if the answer is one
    of the options), "skip" (earns 0, and the step is not counted).
    A step without answer earns 0, source "missing". A step whose judge gives no verdict, with no source left, earns a fraction of
    its reward, source "no_verdict": `StepSpec.missing_verdict` if set, else `missing_verdict`.
    The judge is called at most once, for the rollouts that need it. They keep its `verdicts` [J] on all steps, also on those that
    another source graded, for `srpo.rewards.audit`.

    Raises UserError for a step that no source can grade (no label and no judge), ValueError if lengths or ids do not match.
    Paper: Eq. 5 fixes the sources (judge for S1, S2; labels for S3, S4) and does not say what an unreadable verdict earns.
    """
    if len(rollouts) != len(examples):
        raise ValueError(
            f"{len(rollouts)} rollouts and {len(examples)} examples: pass one example per rollout, in the same order"
        )
    if not 0 <= missing_verdict <= 1:
        raise ValueError(f"reward.missing_verdict is {missing_verdict}: set it to a number from 0 to 1")
    golds = [_gold(rollout, example, schema) for rollout, example in zip(rollouts, examples, strict=True)]
    sources = [
        [_sources(spec, label, judge, example) for spec, label in zip(schema.specs, gold, strict=True)]
        for example, gold in zip(examples, golds, strict=True)
    ]
    verdicts = _ask(judge, rollouts, examples, sources)
    scored = []
    for rollout, gold, able, judged in zip(rollouts, golds, sources, verdicts, strict=True):
        steps = zip(schema.specs, rollout.answers, gold, able, judged or (None,) * schema.num_steps, strict=True)
        rewards, graders = zip(*(_grade(*step, missing_verdict) for step in steps), strict=True)
        scored.append(replace(rollout, step_rewards=rewards, reward_sources=graders, verdicts=judged))
    return scored


def _gold(rollout: Rollout, example: Example, schema: StepSchema) -> tuple[str | None, ...]:
    if rollout.example_id != example.example_id:
        raise ValueError(f"a rollout of {rollout.example_id} is paired with example {example.example_id}: pass its own")
    gold = example.gold or (None,) * schema.num_steps
    if not len(gold) == len(rollout.answers) == schema.num_steps:
        raise UserError(
            f"{example.example_id}: {len(gold)} gold labels and {len(rollout.answers)} answers for {schema.num_steps} steps; "
            "use data and rollouts with the steps of the config"
        )
    return gold


def _sources(spec: StepSpec, label: str | None, judge: Judge | None, example: Example) -> list[str]:
    """Sources that can grade the step of this example, in order."""
    can = {"gold": label is not None, "judge": judge is not None, "rule": True, "skip": True}
    able = [source for source in spec.sources if can[source]]
    if not able:
        raise UserError(
            f"nothing can grade step {spec.name!r} of {example.shown}: its sources are {list(spec.sources)}, there is "
            f"{'no' if label is None else 'a'} gold label and {'no' if judge is None else 'a'} judge; "
            "set reward.judge, or steps.sources to 'labels' (a step without a label then earns nothing)"
        )
    return able


def _ask(
    judge: Judge | None, rollouts: Sequence[Rollout], examples: Sequence[Example], sources: Sequence[Sequence[Sequence[str]]]
) -> list[Verdicts | None]:
    """Verdicts [N][J]; None for a rollout that has no step for the judge."""
    verdicts: list[Verdicts | None] = [None] * len(rollouts)
    needed = [
        i
        for i, (rollout, able) in enumerate(zip(rollouts, sources, strict=True))
        if any(answer is not None and step[0] == "judge" for answer, step in zip(rollout.answers, able, strict=True))
    ]
    if judge is not None and needed:
        judged = judge.judge([rollouts[i] for i in needed], [examples[i] for i in needed])
        for i, row in zip(needed, judged, strict=True):
            verdicts[i] = row
    return verdicts


def _grade(
    spec: StepSpec,
    answer: str | None,
    label: str | None,
    able: Sequence[str],
    verdict: bool | float | None,
    missing_verdict: float,
) -> tuple[float, str]:
    """Return (reward, source) of one step: the cases of Eq. 5, times the step's coefficient `spec.reward` (Appendix B)."""
    if answer is None and able[0] != "skip":
        return 0.0, MISSING  # pi_Sj finds no answer
    for source in able:
        if source == "gold":  # Eq. 5, j in {3, 4}: I[pi_Sj(o) = gt_j], and alike for the verdict S5
            return spec.reward * same_answer(answer, label), source
        if source == "judge" and verdict is not None:  # Eq. 5, j in {1, 2}: R_phi(q, p, pi_Sj(o))
            return spec.reward * verdict, source
        if source == "rule":  # not in the paper: any of the options is correct
            return spec.reward * (answer is not None and spec.canonical(answer) is not None), source
        if source == "skip":  # not in the paper: the step is not graded
            return 0.0, source
    share = missing_verdict if spec.missing_verdict is None else spec.missing_verdict
    return share * spec.reward, NO_VERDICT
