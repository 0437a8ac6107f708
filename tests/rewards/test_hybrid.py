"""srpo.rewards.hybrid: Eq. 5, its sources and their order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from srpo.core.batch import Rollout
from srpo.core.step_presets import PAPER, PAPER_STEPS
from srpo.core.steps import StepSchema, StepSpec
from srpo.data.examples import Example
from srpo.rewards.hybrid import score
from srpo.rewards.judge import Verdicts

SCHEMA = PAPER
RIGHT = ("shoes; color red", "shoes; color red", "match", "match", "L4")


def make_rollout(answers: tuple[str | None, ...] = RIGHT, example_id: str = "a") -> Rollout:
    return Rollout.from_answers(example_id, answers, text="text")


def make_example(gold: tuple[str | None, ...] = (None, None, "match", "match", "L4"), example_id: str = "a") -> Example:
    return Example(example_id, "q", "red shoes", "Red shoes", gold=gold)


class Says:
    """A judge that always gives the same verdicts and records the example ids of each call."""

    def __init__(self, *verdicts: bool | float | None) -> None:
        self.verdicts, self.calls = verdicts, []

    def judge(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Verdicts]:
        self.calls.append([e.example_id for e in examples])
        return [self.verdicts for _ in rollouts]


def test_a_response_that_is_right_everywhere_earns_the_coefficients_of_appendix_b() -> None:
    (scored,) = score([make_rollout()], [make_example()], SCHEMA, Says(True, True, None, None, None))
    assert scored.step_rewards == (0.2, 0.2, 0.2, 0.2, 1.0)
    assert scored.reward_sources == ("judge", "judge", "gold", "gold", "gold")
    assert sum(scored.step_rewards or ()) == pytest.approx(SCHEMA.max_reward)
    assert replace(scored, step_rewards=None, reward_sources=None, verdicts=None) == make_rollout()


@pytest.mark.parametrize("j", range(5))
def test_a_wrong_step_loses_its_own_reward_and_no_other(j: int) -> None:
    verdicts = [True, True, None, None, None]
    answers: list[str | None] = list(RIGHT)
    if j < 2:
        verdicts[j] = False
    else:
        answers[j] = "L1" if j == 4 else "mismatch"
    (scored,) = score([make_rollout(tuple(answers))], [make_example()], SCHEMA, Says(*verdicts))
    assert scored.step_rewards == tuple(0.0 if k == j else reward for k, reward in enumerate((0.2, 0.2, 0.2, 0.2, 1.0)))
    assert scored.reward_sources == ("judge", "judge", "gold", "gold", "gold")


@pytest.mark.parametrize("j", range(5))
def test_a_missing_step_earns_nothing_whatever_the_judge_says(j: int) -> None:
    answers = tuple(None if k == j else answer for k, answer in enumerate(RIGHT))
    (scored,) = score([make_rollout(answers)], [make_example()], SCHEMA, Says(*(True,) * 5), missing_verdict=1.0)
    assert scored.step_rewards is not None and scored.reward_sources is not None
    assert (scored.step_rewards[j], scored.reward_sources[j]) == (0.0, "missing")
    assert sum(scored.step_rewards) == pytest.approx(1.8 - PAPER_STEPS[j].reward)


def test_the_judge_stands_in_where_there_is_no_label() -> None:
    example = make_example((None, None, None, "conflict", "L4"))
    (scored,) = score([make_rollout()], [example], SCHEMA, Says(True, False, True, True, False))
    assert scored.step_rewards == (0.2, 0.0, 0.2, 0.0, 1.0)
    assert scored.reward_sources == ("judge", "judge", "judge", "gold", "gold")


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_judge_that_does_not_say_earns_the_fraction_for_missing_verdicts(fraction: float) -> None:
    (scored,) = score([make_rollout()], [make_example()], SCHEMA, Says(None, False, None, None, None), fraction)
    assert scored.step_rewards == (pytest.approx(0.2 * fraction), 0.0, 0.2, 0.2, 1.0)
    assert scored.reward_sources == ("no_verdict", "judge", "gold", "gold", "gold")


def test_a_step_may_say_itself_what_a_missing_verdict_earns() -> None:
    first, second, *others = PAPER_STEPS
    schema = StepSchema([replace(first, missing_verdict=0.25), replace(second, missing_verdict=0.0), *others])
    example = make_example((None, None, None, "match", "L4"))
    (scored,) = score([make_rollout()], [example], schema, Says(None, None, None, None, None), missing_verdict=0.5)
    assert scored.step_rewards == (pytest.approx(0.05), 0.0, pytest.approx(0.1), 0.2, 1.0)
    assert scored.reward_sources == ("no_verdict",) * 3 + ("gold",) * 2
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"step 'query_intent': missing_verdict .* from 0 to 1"):
            replace(first, missing_verdict=share)


# Reward of one step with coefficient 2, for all combinations of sources, label, verdict and answer.
GOLD, VERDICT = [None, "yes", "no"], [None, True, False]


def expected(sources: tuple[str, ...], gold: str | None, verdict: bool | None, answer: str | None) -> tuple[float, str]:
    for source in sources:
        if source == "skip":
            return 0.0, "skip"
        if answer is None and (source != "gold" or gold is not None):
            return 0.0, "missing"
        if source == "gold" and gold is not None:
            return 2.0 * (gold == answer), "gold"
        if source == "judge" and verdict is not None:
            return 2.0 * verdict, "judge"
        if source == "rule":
            return 2.0, "rule"
    return 0.5, "no_verdict"


@pytest.mark.parametrize("tail", [(), ("rule",), ("skip",)])
@pytest.mark.parametrize("head", [(), ("gold",), ("judge",), ("gold", "judge"), ("judge", "gold")])
def test_the_first_source_that_can_grade_does(head: tuple[str, ...], tail: tuple[str, ...]) -> None:
    sources = (*head, *tail)
    if sources in ((), ("skip",)):
        return
    other = StepSpec("other", "^B:", sources=("judge",), reward=1.0)
    schema = StepSchema([StepSpec("a", "^A:", options=("yes", "no"), sources=sources, reward=2.0), other])
    for gold, verdict, answer in itertools.product(GOLD, VERDICT, ["yes", None]):
        if sources == ("gold",) and gold is None:
            continue
        (scored,) = score(
            [make_rollout((answer, "x"))], [make_example((gold, None))], schema, Says(verdict, True), missing_verdict=0.25
        )
        assert scored.step_rewards is not None and scored.reward_sources is not None
        assert (scored.step_rewards[0], scored.reward_sources[0]) == expected(sources, gold, verdict, answer), (
            gold,
            verdict,
            answer,
        )


def test_a_rule_rewards_an_answer_that_is_an_option() -> None:
    schema = StepSchema([StepSpec("a", "^A:", options=("yes", "no"), sources=("rule",), reward=1.0)])
    scored = score([make_rollout((a,)) for a in ("no", "perhaps", None)], [make_example(())] * 3, schema, None)
    assert [(s.step_rewards, s.reward_sources) for s in scored] == [
        ((1.0,), ("rule",)),
        ((0.0,), ("rule",)),
        ((0.0,), ("missing",)),
    ]


def test_the_judge_is_asked_once_and_only_about_rollouts_that_need_it() -> None:
    schema = StepSchema([StepSpec("a", "^A:", sources=("gold", "judge"))])
    rollouts = [make_rollout((answer,), name) for answer, name in zip(["x", "x", None, "x"], "abcd", strict=True)]
    examples = [make_example((gold,), name) for gold, name in zip(["x", None, None, None], "abcd", strict=True)]
    judge = Says(False)
    assert [s.reward_sources for s in score(rollouts, examples, schema, judge)] == [
        ("gold",),
        ("judge",),
        ("missing",),
        ("judge",),
    ]
    assert judge.calls == [["b", "d"]]
    score(rollouts[:1], examples[:1], schema, judge)
    assert judge.calls == [["b", "d"]]
    assert score([], [], schema, judge) == []


def test_labels_are_compared_as_sets_of_facts() -> None:
    schema = StepSchema([StepSpec("a", "^A:", sources=("gold",), reward=1.0)])
    (scored,) = score([make_rollout(("b; A",))], [make_example(("a; B",))], schema, None)
    assert scored.step_rewards == (1.0,)


def test_what_cannot_be_scored_is_refused() -> None:
    one, example = [make_rollout()], [make_example()]
    with pytest.raises(ValueError, match="1 rollouts and 2 examples"):
        score(one, example * 2, SCHEMA, Says())
    with pytest.raises(ValueError, match="paired with example b"):
        score(one, [make_example(example_id="b")], SCHEMA, Says())
    with pytest.raises(ValueError, match="4 gold labels and 5 answers for 5 steps"):
        score(one, [make_example(("x",) * 4)], SCHEMA, Says())
    with pytest.raises(ValueError, match="5 gold labels and 2 answers for 5 steps"):
        score([make_rollout(("x", "y"))], example, SCHEMA, Says())
    with pytest.raises(ValueError, match=r"nothing can grade step 'query_intent' of example a.*no judge; set reward\.judge"):
        score(one, example, SCHEMA, None)
    with pytest.raises(ValueError, match=r"nothing can grade step 'verdict' of example a.*no gold label"):
        score(one, [make_example((None,) * 5)], SCHEMA, Says(*(True,) * 5))
    with pytest.raises(ValueError, match=r"reward\.missing_verdict is 2"):
        score(one, example, SCHEMA, Says(), 2.0)


def test_everything_the_judge_says_is_kept_whoever_grades() -> None:
    verdicts = (True, False, False, None, True)
    judged, other = make_rollout(), make_rollout(example_id="b")
    labelled = make_example(RIGHT, "b")
    steps = StepSchema(replace(spec, sources=("gold", "judge")) for spec in PAPER_STEPS)
    first, second = score([judged, other], [make_example(), labelled], steps, Says(*verdicts))
    assert first.verdicts == verdicts and first.reward_sources == ("judge", "judge", "gold", "gold", "gold")
    assert second.verdicts is None and set(second.reward_sources or ()) == {"gold"}  # no step was left for the judge


def test_a_probability_earns_its_share() -> None:
    (scored,) = score([make_rollout()], [make_example()], SCHEMA, Says(0.75, 0.0, None, None, None), missing_verdict=1.0)
    assert scored.step_rewards == pytest.approx((0.15, 0.0, 0.2, 0.2, 1.0))
    assert scored.reward_sources == ("judge", "judge", "gold", "gold", "gold")
