"""Hard cases for the judge, and the judge's verdicts as steps."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from srpo.core.batch import Rollout
from srpo.core.step_presets import PAPER
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.prompts import build_prompt
from srpo.judge_training.hard_cases import CASE_PROMPT, Case, case_example, make_case, mine, verdict_steps
from srpo.rewards.hybrid import score
from srpo.rewards.verdicts import judge_prompt, parse_verdicts, render_verdicts
from srpo.training.credit import group_scores

SCHEMA = PAPER
RESPONSE = "1. Query intent: boots\n2. Item: boots\n3. Category match: match\n4. Attribute match: conflict\n5. Verdict: L2"
EXAMPLE = Example("e", "q", "boots", "Boots", gold=(None, None, "match", "match", None), tags={"query_type": "plain"})
T, F = True, False


def test_a_case_by_hand() -> None:
    votes = [(T, T, T, T, None), (T, F, T, T, None), (T, F, T, None, None), (T, T, T, T, T)]
    case = make_case(EXAMPLE, RESPONSE, (T, None, None, None, F), votes, SCHEMA)
    assert case.labels == (T, None, T, F, F)  # the annotator's, else by the gold labels "match" and "conflict"
    assert case.shares == (1.0, 0.5, 1.0, 1.0, 1.0) and case.num_votes == (4, 4, 4, 3, 1)
    assert [case.verdict(j) for j in range(5)] == [T, F, T, T, T]  # a tie is incorrect
    assert case.hard_steps == (1, 3, 4)  # votes differ; against the label; against the label
    assert case.solve_rate == (4 + 4 + 0 + 0) / 16  # steps with a label; a missing vote solves nothing
    assert case.rank == (-2, 0.0, 2.0)

    unlabelled = make_case(Example("e", "q", "boots", "Boots"), RESPONSE, None, votes, SCHEMA)
    assert unlabelled.labels == (None,) * 5 and unlabelled.solve_rate == (4 + 2 + 4 + 3 + 1) / 20
    silent = make_case(EXAMPLE, RESPONSE, None, [(None,) * 5] * 2, SCHEMA)
    assert silent.solve_rate == 0 and silent.hard_steps == (0, 1, 2, 3, 4)
    assert case.case_id == unlabelled.case_id != make_case(EXAMPLE, RESPONSE + " ", None, votes, SCHEMA).case_id


def case(name: str, label: bool, share: float, solve_rate: float) -> Case:
    """A case whose steps after the first are easy."""
    return Case(name, name, (label, T, T, T, T), (share, 1.0, 1.0, 1.0, 1.0), (4,) * 5, solve_rate)


def test_mining_keeps_what_is_hard_and_solvable_in_the_order_of_need() -> None:
    examples = {n: Example(n, n, "q", "t", tags={"query_type": "plain"}) for n in "abcdef"}
    cases = [
        case("a", T, 0.75, 0.9),  # unsure
        case("b", T, 0.25, 0.8),  # against the label, votes differ
        case("c", F, 1.0, 0.7),  # against the label, unanimous
        case("d", T, 1.0, 1.0),  # easy
        case("e", T, 0.5, 0.99),  # outside the window
        case("f", F, 0.0, 0.5),  # right and unanimous
    ]
    chosen, numbers = mine(cases, examples, SCHEMA, 10, 0.01, 0.99, ("query_type",))
    assert [c.example_id for c in chosen] == ["b", "c", "a"]
    assert {k: numbers[k] for k in ("num_responses", "num_hard", "num_in_window", "num_chosen")} == {
        "num_responses": 6,
        "num_hard": 4,
        "num_in_window": 3,
        "num_chosen": 3,
    }
    assert numbers["strata"] == {"query_intent x correct x plain": 2, "query_intent x incorrect x plain": 1}
    with pytest.raises(ValueError, match="no tag 'domain'"):
        mine(cases, examples, SCHEMA, 10, 0.01, 0.99, ("domain",))


def test_a_rare_stratum_is_not_drowned() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    kinds = ["plain"] * 80 + ["negation"] * 15 + ["question"] * 5
    rng.shuffle(kinds)
    examples = {f"e{i}": Example(f"e{i}", "q", "q", "t", tags={"query_type": kind}) for i, kind in enumerate(kinds)}
    cases = [case(name, rng.random() < 0.5, rng.choice((0.25, 0.5, 0.75)), 0.5) for name in examples]
    chosen, numbers = mine(cases, examples, SCHEMA, 24, 0.0, 1.0, ("query_type",))
    got = Counter((examples[c.example_id].tags["query_type"], c.labels[0]) for c in chosen)
    there = Counter((examples[c.example_id].tags["query_type"], c.labels[0]) for c in cases)
    assert len(chosen) == 24 == sum(numbers["strata"].values())
    # as if 24 were dealt one at a time to the stratum that has fewest and is not exhausted
    fair: Counter = Counter()
    for _ in range(24):
        fair[min((k for k in there if fair[k] < there[k]), key=lambda k: (fair[k], "in" * (not k[1]) + "correct", k[0]))] += 1
    assert sorted(got.values()) == sorted(fair.values()), seed
    shuffled = rng.sample(cases, len(cases))
    assert mine(shuffled, examples, SCHEMA, 24, 0.0, 1.0, ("query_type",)) == (chosen, numbers), seed


# ---- the judge as policy -------------------------------------------------------------------------------------------------------


def judged(text: str) -> Rollout:
    answers = StepSchema(verdict_steps(SCHEMA)).parse_text(text).answers
    return Rollout("c", 0, (1,), (1,), (0.0,), (1,) * 5, answers, text, "stop", 0)


def test_the_schema_reads_what_the_reader_of_verdicts_reads() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    schema = StepSchema(verdict_steps(SCHEMA))
    for _ in range(300):
        verdicts = tuple(rng.choice((T, F, None)) for _ in range(5))
        reasons = tuple(rng.choice((None, "so it is", "Step 3 would be wrong", "the query wants x; y")) for _ in range(5))
        text = render_verdicts(verdicts, reasons)
        for _ in range(rng.randrange(3)):  # noise that is not a second verdict
            i = rng.randrange(len(text) + 1)
            text = text[:i] + rng.choice(("\n", "*", " ", "[", "x", "correct")) + text[i:]
        read = tuple(None if a is None else a == "Correct" for a in schema.parse_text(text).answers)
        assert read == parse_verdicts(text, 5), (seed, text)


def test_the_reward_is_the_share_of_right_verdicts() -> None:
    schema = StepSchema(verdict_steps(SCHEMA))
    example = case_example("c", EXAMPLE, RESPONSE, (T, F, T, T, F))
    text = render_verdicts((T, T, T, None, F), ("a", "b", None, "d", "e"))
    (scored,) = score([judged(text)], [example], schema, None)
    assert scored.step_rewards == pytest.approx((0.2, 0, 0.2, 0, 0.2))
    assert group_scores([scored], schema, "total")[0] == pytest.approx(3 / 5)
    partly = case_example("c", EXAMPLE, RESPONSE, (T, F, None, None, None))  # the others have no label
    (scored,) = score([judged(text)], [partly], schema, None)
    assert scored.reward_sources == ("gold", "gold", "skip", "skip", "skip")
    assert group_scores([scored], schema, "total")[0] == pytest.approx(1 / 2)


def test_a_case_is_prompted_as_the_judge_is() -> None:
    pair = Example(
        "e", "q", "boots", "Boots", fields={"brand": "x"}, gold=EXAMPLE.gold, tags={"grade": "L2", "query_type": "plain"}
    )
    odd = RESPONSE + " {braces} {item}"
    turned = case_example("c", pair, odd, (T, F, None, None, None))
    assert build_prompt(turned, CASE_PROMPT) == judge_prompt(pair, odd)
    assert turned.gold == ("Correct", "Incorrect", None, None, None) and turned.tags == {"query_type": "plain"}
