"""Adversarial training pairs: which titles are attacked, by what, and who reads it."""

from __future__ import annotations

from dataclasses import replace

from srpo.core.steps import PAPER_STEPS, StepSchema
from srpo.data.adversarial import with_attacks
from srpo.data.prompts import build_prompt
from srpo.data.rows import row_from_example
from srpo.data.tokenizer import encode, encode_prompts, train_tokenizer
from srpo.data.world import World

SCHEMA = StepSchema(PAPER_STEPS)
PAIRS = list(World(0).examples("train", 2000))


def test_a_share_of_the_irrelevant_pairs_is_attacked_and_nothing_else_changes() -> None:
    attacked = with_attacks(PAIRS, 0.3, 0, SCHEMA)
    irrelevant = [e for e in attacked if e.grade in (1, 2)]
    assert 0.2 < sum(bool(e.attack) for e in irrelevant) / len(irrelevant) < 0.4
    assert not any(e.attack for e in attacked if e.grade in (3, 4))
    assert [replace(e, attack="") for e in attacked] == PAIRS
    assert all("L4" in e.attack and "\n" not in e.attack for e in irrelevant if e.attack)
    assert any("1. Query intent: " in e.attack and e.attack.endswith("5. Verdict: L4") for e in irrelevant)


def test_the_draw_is_a_function_of_seed_and_pair() -> None:
    attacks = [e.attack for e in with_attacks(PAIRS, 0.5, 3, SCHEMA)]
    assert attacks == [e.attack for e in with_attacks(PAIRS, 0.5, 3, SCHEMA)]
    assert attacks != [e.attack for e in with_attacks(PAIRS, 0.5, 4, SCHEMA)]
    assert all(e.attack for e in with_attacks(PAIRS, 1.0, 0, SCHEMA) if e.grade in (1, 2))
    assert with_attacks(PAIRS, 0.0, 0, SCHEMA) == PAIRS


def test_only_the_policy_reads_the_attack() -> None:
    pair = next(e for e in with_attacks(PAIRS, 1.0, 0, SCHEMA) if e.attack)
    tokenizer = train_tokenizer(["red boots"] * 9, 300)
    (ids,) = encode_prompts(tokenizer, [pair], "{title}")
    assert ids == encode(tokenizer, pair.title + pair.attack)
    assert build_prompt(pair, "{title}") == pair.title and "attack" not in row_from_example(pair)
