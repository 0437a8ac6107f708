"""srpo.rewards.audit: the judge compared with gold labels during training."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from srpo.core.batch import Rollout
from srpo.core.config.train import RewardConfig
from srpo.core.errors import UserError
from srpo.core.step_presets import PAPER
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.rewards.audit import Audit, asked_counts, audit, audit_counts

SCHEMA = PAPER
GOLD = (None, None, "match", "unclear", "L3")
EXAMPLES = [Example("a", "q", "boots", "Red boots", gold=GOLD), Example("b", "q", "boots", "Hat")]
CFG = RewardConfig(audit="warn", audit_warmup=3, audit_decay=0.5, audit_bound=0.2, audit_min=1)


def rollout(answers: tuple[str | None, ...], verdicts: tuple[bool | float | None, ...] | None, group: int = 0) -> Rollout:
    return replace(Rollout.from_answers("a", answers, text="text", group=group), verdicts=verdicts)


def test_counts_by_hand() -> None:
    right = ("x", "y", "match", "unclear", "L3")
    wrong = ("x", "y", "related", "match", "L1")
    rollouts = [
        rollout(right, (True, True, True, False, None)),  # S4: a correct step is rejected
        rollout(wrong, (True, True, False, True, True)),  # S4, S5: wrong steps pass
        rollout(wrong, (None, None, 0.5, 0.49, 0.0)),  # probabilities: S3 passes
        rollout((None,) * 5, (True,) * 5),  # no answers
        rollout(right, None),  # no verdicts
        rollout(right, (False,) * 5, group=1),  # no labels
    ]
    counts = audit_counts(rollouts, EXAMPLES, SCHEMA)
    #                  num, errors, wrong steps, wrong steps passed
    assert counts[:, 2].tolist() == [3, 1, 2, 1]
    assert counts[:, 3].tolist() == [3, 2, 2, 1]
    assert counts[:, 4].tolist() == [2, 1, 2, 1]
    assert counts[:, :2].sum() == 0
    metrics = audit(None, rollouts, EXAMPLES, SCHEMA, CFG).metrics(SCHEMA)
    assert metrics["judge/error_rate/category_match"] == pytest.approx(1 / 3)
    assert metrics["judge/false_correct_rate/attribute_match"] == 0.5
    assert metrics["judge/num_audited/verdict"] == 2
    assert not [key for key in metrics if "query_intent" in key]


def judged(num: int, num_errors: int) -> list[Rollout]:
    """`num` rollouts with a wrong category; the judge calls `num_errors` of them correct."""
    answers = ("x", "y", "mismatch", None, None)
    return [rollout(answers, (None, None, i < num_errors, None, None)) for i in range(num)]


def run(errors: list[int], cfg: RewardConfig = CFG, num: int = 10) -> list[Audit]:
    audits, state = [], None
    for count in errors:
        audits.append(audit(state, judged(num, count), EXAMPLES, SCHEMA, cfg))
        state = audits[-1].state
    return audits


def test_a_drifting_judge_is_told_once_and_stops_a_run_that_wants_it() -> None:
    errors = [1, 1, 1, 1, 5, 5, 5, 1, 1, 1, 8, 8]
    audits = run(errors)
    # average at step 5, by hand: (5 + 1/2 + 1/4 + 1/8 + 1/16) / (10 * (1 + 1/2 + 1/4 + 1/8 + 1/16)) = 0.306: a rise of 0.206
    assert audits[4].metrics(SCHEMA)["judge/drift/category_match"] == pytest.approx(5.9375 / 19.375 - 0.1)
    assert [bool(a.news) for a in audits].index(True) == 4
    assert "errs on 30.6% of step 'category_match' after 10.0% at the start" in audits[4].news[0]
    assert [a.beyond for a in audits[4:7]] == [("category_match",)] * 3 and not audits[5].news and not audits[6].news
    assert not audits[9].beyond and any(a.news for a in audits[10:])  # recovered, then reported again
    assert not any(a.news for a in run(errors, replace(CFG, audit="log")))
    few = replace(CFG, audit_min=20)  # ten verdicts per step and decay 0.5: the average never holds twenty
    assert not any(a.beyond or a.news for a in run(errors, few))
    assert not any(a.beyond for a in run([5] * 12))  # a judge that is bad from the start does not drift
    assert not any(a.beyond for a in run([1, 1, 9, 3, 3]))  # the bound is relative to the warm-up, which is bad here
    with pytest.raises(ValueError, match=r"the judge errs on 30\.6% of step 'category_match'.*audit_bound = 0\.2.*new run_dir"):
        run(errors, replace(CFG, audit="stop"))
    off = run(errors, replace(CFG, audit="off"))
    assert not any(a.metrics(SCHEMA) or a.num_steps for a in off)


def test_an_optimizer_step_without_labels_changes_no_rate() -> None:
    with_gap = audit(run([1, 1, 1, 5])[-1].state, judged(10, 5)[:0], EXAMPLES, SCHEMA, CFG)
    assert with_gap.num_steps == 4 and not [k for k in with_gap.metrics(SCHEMA) if "rate" in k]
    before, after = (a.metrics(SCHEMA)["judge/drift/category_match"] for a in (run([1, 1, 1, 5])[-1], with_gap))
    assert after == pytest.approx(before)


def test_the_state_survives_json_exactly_and_shares_of_ranks_add_up() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    words = ("match", "related", "mismatch", None)
    straight = resumed = None
    for _ in range(8):
        rollouts = [
            rollout(
                ("x", "y", rng.choice(words), "match", "L1"), (None, True, *(rng.choice((True, False, None)) for _ in range(3)))
            )
            for _ in range(rng.randrange(1, 20))
        ]
        straight = audit(straight and straight.state, rollouts, EXAMPLES, SCHEMA, CFG)
        resumed = audit(resumed and json.loads(json.dumps(resumed.state)), rollouts, EXAMPLES, SCHEMA, CFG)
        cut = rng.randrange(len(rollouts) + 1)
        halves = [audit_counts(half, EXAMPLES, SCHEMA) for half in (rollouts[:cut], rollouts[cut:])]
        assert np.array_equal(sum(halves), straight.counts), seed
    assert straight is not None and resumed is not None and straight.state == resumed.state, seed


def silent(num_asked: int, num_missing: int) -> list[Rollout]:
    """Rollouts with one step for the judge each, of which the last `num_missing` get no verdict."""
    sources = ["judge"] * (num_asked - num_missing) + ["no_verdict"] * num_missing
    spare = ("gold", "gold", "gold", "gold")
    return [replace(rollout(("x", "y", "match", "match", "L1"), (None,) * 5), reward_sources=(s, *spare)) for s in sources]


def test_a_judge_that_never_says_anything_is_told_once_and_stops_a_run_that_wants_it() -> None:
    def steps(cfg: RewardConfig, *counts: tuple[int, int]) -> list[Audit]:
        audits: list[Audit] = []
        for count in counts:
            audits.append(audit(audits[-1].state if audits else None, silent(*count), EXAMPLES, SCHEMA, cfg))
        return audits

    for mode in ("log", "warn"):
        told = steps(replace(CFG, audit=mode), (12, 12), (12, 12), (200, 0), (2000, 2000))
        assert ["gives no verdict on" in " ".join(a.news) for a in told] == [True, False, False, True]
        assert not told[2].beyond
    assert not any(a.news for a in steps(replace(CFG, audit="off"), (12, 12), (12, 12)))
    assert not any(a.news for a in steps(replace(CFG, audit="log", audit_missing=1.0), (12, 12)))
    assert not any(a.news for a in steps(replace(CFG, audit="log"), (9, 9)))  # too few to tell
    assert not any(a.news for a in steps(replace(CFG, audit="log"), (100, 90)))  # no more than the bound
    with pytest.raises(UserError, match=r"no verdict on 100% .*audit_missing = 0\.9: they earn nothing.*num_no_text"):
        steps(replace(CFG, audit="stop"), (12, 12))


def test_a_step_without_a_verdict_counts_as_missing_even_if_it_is_skipped_then() -> None:
    schema = StepSchema([replace(SCHEMA.specs[0], sources=("judge", "skip")), *SCHEMA.specs[1:]])
    mute = replace(
        rollout(("x", "y", "match", "match", "L1"), (None,) * 5), reward_sources=("skip", "judge", "gold", "gold", "gold")
    )
    assert asked_counts([mute], schema).tolist() == [2, 1]
    assert asked_counts([replace(mute, verdicts=None)], schema).tolist() == [1, 0]  # the judge was not asked about it
