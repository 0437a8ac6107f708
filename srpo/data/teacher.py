"""Imperfect teachers: five-step responses for the SFT warm start, with systematic errors that reinforcement learning corrects."""

from __future__ import annotations

import random
from dataclasses import replace

from srpo.core.config.demo import TeacherBias
from srpo.core.errors import UserError
from srpo.data.catalogue import ATTRIBUTES, CATALOGUE
from srpo.data.examples import Example
from srpo.data.world import GRADE_TABLE, MENTION, Constraint, Facts, attribute_relation, category_relation, check


def format_response(query: str, item: str, category: str, attributes: str, verdict: str) -> str:
    """The five steps as text, in the format that `srpo.core.steps.PAPER_STEPS` parses."""
    return (
        f"1. Query intent: {query}\n2. Item: {item}\n3. Category match: {category}\n"
        f"4. Attribute match: {attributes}\n5. Verdict: {verdict}"
    )


def teach(example: Example, bias: TeacherBias, seed: int = 0) -> str:
    """The teacher's response to a pair of the catalogue world: a pure function of (example, bias, seed).

    UserError if the pair has no truth for steps 1 and 2.
    """
    query_text, item_text = (*example.truth, None, None)[:2]
    if query_text is None or item_text is None:
        raise UserError(f"{example.example_id} has no truth for steps 1 and 2: use examples of the catalogue world")
    rng = random.Random(f"teacher|{seed}|{example.example_id}")
    words = random.Random(f"words|{seed}|{example.example_id}")
    query, item = _misread(Facts.parse(query_text), example.query, bias.misread_word, words), Facts.parse(item_text)
    if rng.random() < bias.misread_negation:
        query = Facts(query.category, tuple(replace(c, negated=c.negated and c.kind == "brand") for c in query.constraints))
    _, _, mentioned = example.title.partition(MENTION)
    if mentioned and rng.random() < bias.mistake_mention:
        item = Facts(CATALOGUE.leaf_of_surface[mentioned].path, item.constraints)
    category = category_relation(query, item)
    seen = {"match": "ok", "related": "conflict", "mismatch": "unknown"}[category]  # the group is checked like an attribute
    if category == "related" and rng.random() < bias.related_as_match:
        category = "match"
    checks = [check(c, item) for c in query.constraints]
    details = ", ".join(f"{c.kind} {outcome}" for c, outcome in zip(query.constraints, checks, strict=True))
    attributes = attribute_relation(checks)
    if attributes == "unclear" and rng.random() < bias.overlook_missing:
        attributes = "match"
    verdict = int(GRADE_TABLE[category, attributes][1])
    if rng.random() < bias.verdict_off_by_one:
        verdict = rng.choice([g for g in (verdict - 1, verdict + 1) if 1 <= g <= 4])
    return format_response(
        str(query), str(item), f"{query.group} {seen} -> {category}", f"{details} -> {attributes}", f"L{verdict}"
    )


def _misread(facts: Facts, text: str, rate: float, rng: random.Random) -> Facts:
    """The facts with misread words: the last surface of a leaf or value in `text` is taken, with probability `rate`, for a fixed
    other leaf of the group or value of the type."""

    def wrong(surfaces: tuple[str, ...]) -> bool:
        return f" {surfaces[-1]} " in f" {text} " and rng.random() < rate

    def read(constraint: Constraint) -> Constraint:
        values = list(ATTRIBUTES.get(constraint.kind, ()))  # empty for a brand: brands are never misread
        if not values or not wrong(ATTRIBUTES[constraint.kind][constraint.value]):
            return constraint
        return replace(constraint, value=values[(values.index(constraint.value) + 1) % len(values)])

    leaf = CATALOGUE.leaf[facts.leaf]
    category = CATALOGUE.siblings[leaf.name][0].path if wrong(leaf.surfaces) else facts.category
    return Facts(category, tuple(map(read, facts.constraints)))
