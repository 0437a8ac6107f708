"""Adversarial training pairs: which titles are attacked, by what, and who reads it."""

from __future__ import annotations

from dataclasses import replace

from srpo.core.grades import PAPER_GRADES, Grades
from srpo.core.step_presets import PAPER, PAPER_STEPS
from srpo.core.steps import StepSchema
from srpo.data.adversarial import with_attacks
from srpo.data.prompts import PromptForm, build_prompt
from srpo.data.rows import row_from_example
from srpo.data.tokenizer import encode, encode_prompts, train_tokenizer
from srpo.data.world import World

SCHEMA = PAPER
PAIRS = list(World(0).examples("train", 2000))


def test_the_same_share_of_every_grade_is_attacked_and_nothing_else_changes() -> None:
    attacked = with_attacks(PAIRS, 0.3, 0, SCHEMA)
    for grade in PAPER_GRADES:
        attacks = [e.attack for e in attacked if e.grade == grade]
        assert len(attacks) > 200 and 0.2 < sum(map(bool, attacks)) / len(attacks) < 0.4
    assert [replace(e, attack="") for e in attacked] == PAIRS
    claims = [e.attack for e in attacked if e.attack]
    assert all("L4" in claim and "\n" not in claim for claim in claims)
    whole = ["1. Query intent: " in claim and claim.endswith("5. Verdict: L4") for claim in claims]
    assert 0.4 < sum(whole) / len(whole) < 0.6


def test_the_draw_is_a_function_of_seed_and_pair() -> None:
    attacks = [e.attack for e in with_attacks(PAIRS, 0.5, 3, SCHEMA)]
    assert attacks == [e.attack for e in with_attacks(PAIRS, 0.5, 3, SCHEMA)]
    assert attacks != [e.attack for e in with_attacks(PAIRS, 0.5, 4, SCHEMA)]
    assert all(e.attack for e in with_attacks(PAIRS, 1.0, 0, SCHEMA))
    assert with_attacks(PAIRS, 0.0, 0, SCHEMA) == PAIRS


def test_the_best_verdict_is_the_highest_grade_whatever_the_order_of_the_options() -> None:
    *others, last = PAPER_STEPS
    reversed_ = StepSchema((*others, replace(last, options=PAPER_GRADES[::-1])), Grades())
    assert [e.attack for e in with_attacks(PAIRS, 0.3, 0, reversed_)] == [e.attack for e in with_attacks(PAIRS, 0.3, 0, SCHEMA)]
    named = StepSchema((*others, replace(last, options=("no", "yes"), answer="(no|yes)")))
    pairs = [replace(e, gold=(*e.gold[:-1], "yes" if e.grade == "L4" else "no")) for e in PAIRS]
    claims = [e.attack for e in with_attacks(pairs, 0.3, 0, named) if e.attack]
    assert len(claims) > 400 and all("yes" in claim and "L4" not in claim for claim in claims)


def test_only_the_policy_reads_the_attack() -> None:
    pair = next(e for e in with_attacks(PAIRS, 1.0, 0, SCHEMA) if e.attack)
    tokenizer = train_tokenizer(["red boots"] * 9, 300)
    (ids,) = encode_prompts(tokenizer, [pair], PromptForm("{title}"))
    assert ids == encode(tokenizer, pair.title + pair.attack)
    assert build_prompt(pair, "{title}") == pair.title and "attack" not in row_from_example(pair)
