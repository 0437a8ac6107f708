"""The catalogue world: an endless stream of query-item pairs with exact ground truth for every reasoning step.

A query is a category and one to three constraints (`color not red`); an item is a category and the facts that its listing
*shows*. All gold labels follow from these by the rule table `GRADE_TABLE`. Pair i of a split is a pure function of (seed, split,
i): streams are reproducible bit for bit, may start anywhere, and are never held in memory. The hash of a query text decides
whether it is held out, so no held-out query occurs in training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from srpo.data.catalogue import ATTRIBUTES, BRANDS, CATALOGUE, MARKETING, Leaf
from srpo.data.examples import Example

QUERY_TYPES = ("plain", "question", "alternative", "negation", "knowledge")
NATURAL_MIX = {"plain": 0.30, "question": 0.15, "alternative": 0.15, "negation": 0.20, "knowledge": 0.20}
MENTION = "goes with "  # in a title, precedes a category that is not the item's
SPLITS = ("train", "wild", "balanced")  # wild: the natural mix; balanced: by query type (5.1.1); both held out

# The rule table: (category relation, attribute relation) -> grade. Category: same leaf, same group, any other. Attributes: all
# constraints are met; none is contradicted but at least one is not stated; at least one is contradicted.
GRADE_TABLE: dict[tuple[str, str], str] = {
    ("match", "match"): "L4",
    ("match", "unclear"): "L3",
    ("match", "conflict"): "L2",
    ("related", "match"): "L3",
    ("related", "unclear"): "L2",
    ("related", "conflict"): "L1",
    ("mismatch", "match"): "L1",
    ("mismatch", "unclear"): "L1",
    ("mismatch", "conflict"): "L1",
}


@dataclass(frozen=True)
class Constraint:
    """A query's constraint on one attribute, to be or (negated) not to be a value; or an attribute value that an item shows."""

    kind: str
    value: str
    negated: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {'not ' if self.negated else ''}{self.value}"


@dataclass(frozen=True)
class Facts:
    """A category path and statements about attributes: the content of S1 (the constraints) or S2 (the values shown)."""

    category: str  # "group leaf"
    constraints: tuple[Constraint, ...]

    @property
    def group(self) -> str:
        return self.category.split(" ")[0]

    @property
    def leaf(self) -> str:
        return self.category.split(" ")[1]

    def __str__(self) -> str:
        return "; ".join([self.category, *map(str, self.constraints)])

    @staticmethod
    def parse(text: str) -> Facts:
        """The inverse of str()."""
        category, *rest = text.split("; ")
        parts = [statement.split(" ") for statement in rest]
        return Facts(category, tuple(Constraint(p[0], p[-1], len(p) == 3) for p in parts))


def category_relation(query: Facts, item: Facts) -> str:
    """S3: match (same leaf), related (same group) or mismatch."""
    if query.category == item.category:
        return "match"
    return "related" if query.group == item.group else "mismatch"


def check(constraint: Constraint, item: Facts) -> str:
    """ok, conflict or unknown: one constraint of the query against the values that the item shows."""
    shown = [fact.value for fact in item.constraints if fact.kind == constraint.kind]
    if not shown:
        return "unknown"
    return "ok" if (constraint.value in shown) != constraint.negated else "conflict"


def attribute_relation(checks: tuple[str, ...] | list[str]) -> str:
    """S4: conflict if a constraint is contradicted, else unclear if one is not stated, else match."""
    return "conflict" if "conflict" in checks else "unclear" if "unknown" in checks else "match"


def reason(query: Facts, item: Facts) -> tuple[str, str, str]:
    """The rule-based oracle: (S3, S4, S5) that follow from S1 and S2."""
    category = category_relation(query, item)
    attributes = attribute_relation([check(c, item) for c in query.constraints])
    return category, attributes, GRADE_TABLE[category, attributes]


class World:
    """Streams of examples. `seed` changes every pair, not the catalogue or the rules."""

    def __init__(self, seed: int = 0, items_per_query: int = 4, held_out_frac: float = 0.1):
        self.seed = seed
        self.items_per_query = items_per_query
        self.held_out_frac = held_out_frac

    def examples(self, split: str, num_examples: int, start: int = 0) -> Iterator[Example]:
        """Pairs start to start + num_examples - 1 of a split ("train", "wild" or "balanced"). ValueError for another split."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
        for index in range(start, start + num_examples):
            yield self.example(split, index)

    def example(self, split: str, index: int) -> Example:
        """Pair number `index` of a split."""
        query_index, item_index = divmod(index, self.items_per_query)
        query_type, wanted, text = self._query(split, query_index)
        rng = self._rng(split, query_index, f"item {item_index}")
        item, title, brand, num_decoys = _item(rng, wanted)
        category, attributes, grade = reason(wanted, item)
        leaf = CATALOGUE.leaf[wanted.leaf]
        hard = (query_type != "plain") + (len(wanted.constraints) > 1) + num_decoys + (category == "related")
        return Example(
            example_id=f"world-{self.seed}-{split}-{index}",
            query_id=f"world-{self.seed}-{split}-q{query_index}",
            query=text,
            title=title,
            fields={"brand": brand},
            gold=(None, None, category, attributes, grade),
            truth=(str(wanted), str(item), category, attributes, grade),
            tags={
                "query_type": query_type,
                "domain": leaf.domain,
                "grade": grade,
                "difficulty": ("easy", "medium", "hard")[min(hard, 2)],
            },
        )

    def _rng(self, *key: object) -> random.Random:
        return random.Random(f"{self.seed}|{'|'.join(map(str, key))}")

    def _query(self, split: str, query_index: int) -> tuple[str, Facts, str]:
        rng = self._rng(split, query_index, "query")
        balanced = split == "balanced"
        while True:
            if balanced:
                query_type = QUERY_TYPES[query_index % len(QUERY_TYPES)]
            else:
                query_type = rng.choices(list(NATURAL_MIX), list(NATURAL_MIX.values()))[0]
            wanted, text = _QUERIES[query_type](rng)
            if self.is_held_out(text) == (split != "train"):
                return query_type, wanted, text

    def is_held_out(self, query: str) -> bool:
        """Whether a query text belongs to the held-out splits, "wild" and "balanced"."""
        digest = hashlib.blake2b(query.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.held_out_frac * 2**64


def _say(rng: random.Random, kind: str, value: str) -> str:
    return rng.choice(ATTRIBUTES[kind][value])


def _pick_constraints(rng: random.Random, leaf: Leaf, num: int) -> list[Constraint]:
    return [Constraint(kind, rng.choice(list(ATTRIBUTES[kind]))) for kind in rng.sample(leaf.attributes, num)]


def _plain(rng: random.Random) -> tuple[Facts, str]:
    leaf = rng.choice(CATALOGUE.leaves)
    constraints = _pick_constraints(rng, leaf, rng.choice((1, 2, 2)))
    words = " ".join(_say(rng, c.kind, c.value) for c in constraints)
    return Facts(leaf.path, tuple(constraints)), f"{words} {rng.choice(leaf.surfaces)}"


def _negation(rng: random.Random) -> tuple[Facts, str]:
    leaf = rng.choice(CATALOGUE.leaves)
    first, *rest = _pick_constraints(rng, leaf, rng.choice((1, 2)))
    negated = Constraint(first.kind, first.value, negated=True)
    noun, word = rng.choice(leaf.surfaces), _say(rng, first.kind, first.value)
    wish = "".join(f"{_say(rng, c.kind, c.value)} " for c in rest)
    text = rng.choice((f"{wish}non {word} {noun}", f"{wish}{noun} without {word}", f"{wish}{noun} not {word}"))
    return Facts(leaf.path, (*rest, negated)), text


def _knowing(rng: random.Random) -> tuple[Leaf, Constraint, str]:
    """A leaf, the constraint that a use implies, and the use."""
    while True:
        leaf = rng.choice(CATALOGUE.leaves)
        known = [(kind, use, value) for kind in leaf.attributes for use, value in CATALOGUE.knowledge_of_type[kind]]
        if known:
            kind, use, value = rng.choice(known)
            return leaf, Constraint(kind, value), use


def _knowledge(rng: random.Random) -> tuple[Facts, str]:
    leaf, implied, use = _knowing(rng)
    others = [c for c in _pick_constraints(rng, leaf, 2) if c.kind != implied.kind][: rng.choice((0, 1))]
    words = "".join(f"{_say(rng, c.kind, c.value)} " for c in others)
    return Facts(leaf.path, (*others, implied)), f"{words}{rng.choice(leaf.surfaces)} for {use}"


def _question(rng: random.Random) -> tuple[Facts, str]:
    leaf, implied, use = _knowing(rng)
    noun = rng.choice(leaf.surfaces)
    text = rng.choice(
        (f"what {noun} is best for {use} ?", f"which {noun} should i buy for {use} ?", f"what {noun} helps with {use} ?")
    )
    return Facts(leaf.path, (implied,)), text


def _alternative(rng: random.Random) -> tuple[Facts, str]:
    brand = rng.choice(list(BRANDS))
    leaf = CATALOGUE.leaf[BRANDS[brand]]
    others = _pick_constraints(rng, leaf, rng.choice((0, 1, 2)))
    words = "".join(f"{_say(rng, c.kind, c.value)} " for c in others)
    text = rng.choice((f"{words}{brand} alternative", f"{words}alternative to {brand}", f"{words}{brand} replacement"))
    return Facts(leaf.path, (*others, Constraint("brand", brand, negated=True))), text


_QUERIES = {"plain": _plain, "question": _question, "alternative": _alternative, "negation": _negation, "knowledge": _knowledge}


def _item(rng: random.Random, wanted: Facts) -> tuple[Facts, str, str, int]:
    """(facts shown, title, brand, number of misleading category mentions) of an item retrieved for a query."""
    target = CATALOGUE.leaf[wanted.leaf]
    relation = rng.choices(("match", "related", "mismatch"), (0.52, 0.30, 0.18))[0]
    if relation == "match":
        leaf = target
    elif relation == "related":
        leaf = rng.choice(CATALOGUE.siblings[target.name])
    else:  # leaves of the same domain, where words overlap, and about a tenth of the others
        others = [x for x in CATALOGUE.leaves if x.group != target.group]
        strangers = [x for x in others if x.domain == target.domain or rng.random() < 0.1] or others
        leaf = rng.choice(strangers)
    brand = _brand(rng, leaf, wanted)
    shown = [_shown(rng, kind, wanted) for kind in leaf.attributes]
    facts = Facts(leaf.path, (Constraint("brand", brand), *[c for c in shown if c is not None]))
    title, num_decoys = _title(rng, leaf, facts, wanted)
    return facts, title, brand, num_decoys


def _brand(rng: random.Random, leaf: Leaf, wanted: Facts) -> str:
    unwanted = [c.value for c in wanted.constraints if c.kind == "brand"]
    if unwanted and rng.random() < 0.35:
        return unwanted[0]
    return rng.choice(CATALOGUE.brands_of_domain[leaf.domain])


def _shown(rng: random.Random, kind: str, wanted: Facts) -> Constraint | None:
    """The value of one attribute that the listing shows, or None if it shows none."""
    values = list(ATTRIBUTES[kind])
    constraints = [c for c in wanted.constraints if c.kind == kind]
    if not constraints:
        return Constraint(kind, rng.choice(values)) if rng.random() < 0.35 else None
    outcome = rng.choices(("same", "other", "hidden"), (0.5, 0.25, 0.25) if not constraints[0].negated else (0.3, 0.45, 0.25))[0]
    if outcome == "hidden":
        return None
    if outcome == "same":
        return Constraint(kind, constraints[0].value)
    return Constraint(kind, rng.choice([v for v in values if v != constraints[0].value]))


def _title(rng: random.Random, leaf: Leaf, facts: Facts, wanted: Facts) -> tuple[str, int]:
    words = [_say(rng, c.kind, c.value) for c in facts.constraints if c.kind != "brand"]
    rng.shuffle(words)
    cut = rng.randint(0, len(words))
    parts = [*words[:cut], rng.choice(leaf.surfaces), *words[cut:]]
    for _ in range(rng.choice((0, 1, 1, 2))):
        parts.insert(rng.randint(0, len(parts)), rng.choice(MARKETING))
    num_decoys = 0
    if rng.random() < 0.2:  # a decoy: a category that is only mentioned
        other = CATALOGUE.leaf[wanted.leaf] if rng.random() < 0.5 else rng.choice(CATALOGUE.leaves)
        if other.name != leaf.name:
            parts.append(f"{MENTION}{rng.choice(other.surfaces)}")
            num_decoys = 1
    return " ".join(parts), num_decoys
