"""The catalogue world: exact, reproducible, streamed, held out by query, and without lexical shortcuts."""

from __future__ import annotations

import itertools
import random
import secrets
import tracemalloc

import pytest

from srpo.data.catalogue import ATTRIBUTES, BRANDS, CATALOGUE, KNOWLEDGE
from srpo.data.world import GRADE_TABLE, QUERY_TYPES, SPLITS, Constraint, Facts, World, _item, attribute_relation, check, reason


def test_catalogue_is_as_large_as_promised_and_consistent():
    leaves = CATALOGUE.leaves
    assert len({leaf.domain for leaf in leaves}) >= 12
    assert len(leaves) >= 60
    assert len({leaf.name for leaf in leaves}) == len(leaves)
    surfaces = [surface for leaf in leaves for surface in leaf.surfaces]
    assert len(set(surfaces)) == len(surfaces), "two categories share a name"
    assert all(set(leaf.attributes) <= ATTRIBUTES.keys() for leaf in leaves)
    assert set(BRANDS.values()) <= CATALOGUE.leaf.keys()
    assert all(value in ATTRIBUTES[kind] for _, kind, value in KNOWLEDGE)
    assert all(CATALOGUE.brands_of_domain[leaf.domain] for leaf in leaves)


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_a_pure_function_of_seed_split_and_index(split):
    seed = secrets.randbelow(10_000)
    stream = list(World(seed).examples(split, 60))
    parts = [*World(seed).examples(split, 25), *World(seed).examples(split, 35, start=25)]
    assert stream == parts
    assert stream != list(World(seed + 1).examples(split, 60))


def test_held_out_queries_never_appear_in_training():
    seed = secrets.randbelow(10_000)
    train = {e.query for e in World(seed).examples("train", 3000)}
    held_out = {e.query for split in ("wild", "balanced") for e in World(seed).examples(split, 1500)}
    assert len(held_out) > 300
    assert not train & held_out


def test_gold_follows_from_the_contents_of_the_first_two_steps():
    for example in World(secrets.randbelow(10_000)).examples("train", 500):
        query, item = (Facts.parse(text or "") for text in example.truth[:2])
        assert str(query) == example.truth[0]
        assert str(item) == example.truth[1]
        assert reason(query, item) == example.gold[2:]
        assert example.gold[:2] == (None, None), "no reward may read the contents of S1 and S2"


def test_a_constraint_is_checked_against_what_is_shown():
    item = Facts("shoes boots", (Constraint("brand", "tamsin"), Constraint("color", "red")))
    cases = {("color", "red", False): "ok", ("color", "blue", False): "conflict", ("weather", "waterproof", False): "unknown"}
    cases |= {("color", "red", True): "conflict", ("color", "blue", True): "ok", ("brand", "tamsin", True): "conflict"}
    assert {case: check(Constraint(*case), item) for case in cases} == cases
    assert attribute_relation(["ok", "unknown"]) == "unclear"
    assert attribute_relation(["ok", "unknown", "conflict"]) == "conflict"
    assert attribute_relation(["ok"]) == "match"


def test_the_rule_table_is_complete_and_monotone():
    categories, attributes = ("mismatch", "related", "match"), ("conflict", "unclear", "match")
    assert set(GRADE_TABLE) == set(itertools.product(categories, attributes))
    for better, worse in itertools.product(itertools.product(range(3), range(3)), repeat=2):
        if better[0] >= worse[0] and better[1] >= worse[1]:
            grades = [GRADE_TABLE[categories[c], attributes[a]] for c, a in (better, worse)]
            assert grades[0] >= grades[1]


def test_shown_attributes_stand_in_the_title():
    for example in World(secrets.randbelow(10_000)).examples("wild", 300):
        for fact in Facts.parse(example.truth[1] or "").constraints:
            surfaces = [fact.value] if fact.kind == "brand" else ATTRIBUTES[fact.kind][fact.value]
            text = f"{example.title} {example.fields['brand']}"
            assert any(surface in text for surface in surfaces), (example.title, fact)


def test_mix_of_query_types_and_grades():
    world = World(secrets.randbelow(10_000))
    balanced = [e.tags["query_type"] for e in world.examples("balanced", 1000)]
    assert {kind: balanced.count(kind) for kind in QUERY_TYPES} == dict.fromkeys(QUERY_TYPES, 200)
    grades = [e.gold[-1] for e in world.examples("wild", 2000)]
    assert min(grades.count(f"L{g}") for g in (1, 2, 3, 4)) > 200


def test_streaming_holds_no_pairs():
    stream = World(random.randrange(1000)).examples("train", 1_000_000)
    for _ in itertools.islice(stream, 200):
        pass
    tracemalloc.start()
    for _ in itertools.islice(stream, 1500):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300_000, "memory grows with the stream"


def test_unknown_split_says_which_exist():
    with pytest.raises(ValueError, match="train, wild, balanced"):
        next(World().examples("test", 1))


def test_a_domain_of_one_group_still_gets_strangers():
    garden = tuple(leaf for leaf in CATALOGUE.leaves if leaf.domain == "garden")
    assert len({leaf.group for leaf in garden}) == 1

    class NeverFar(random.Random):
        def random(self) -> float:
            return 0.99

        def choices(self, population, weights=None, **kwargs):  # always a mismatch
            return [population[-1]]

    item, *_ = _item(NeverFar(0), Facts(garden[0].path, (Constraint("fuel", "gas"),)))
    assert item.group != garden[0].group
