"""Silver responses for real data, which has only grades: demonstrations for the SFT warm start, with their evidence written out.

Steps 1 to 4 are read off the words of the pair and never chosen from the grade: the brand, color, material and audience that
query and item name, the place of each word of the query in the listing, and how many are found. The verdict is the human grade.
So a model learns to look evidence up and to weigh it. If words mislead, steps and verdict do not fit together.

Paper: 5.1.4 takes its SFT data from the chains of a large model; silver responses need no such model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from srpo.core.errors import UserError
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.world import Constraint, Facts, attribute_relation, check

_MATERIALS = frozenset(
    [
        "leather",
        "suede",
        "cotton",
        "wool",
        "linen",
        "silk",
        "nylon",
        "polyester",
        "spandex",
        "denim",
        "canvas",
        "mesh",
        "silicone",
        "rubber",
        "plastic",
        "acrylic",
        "wood",
        "bamboo",
        "metal",
        "steel",
        "aluminum",
        "brass",
        "copper",
        "ceramic",
        "porcelain",
        "glass",
        "paper",
        "pvc",
    ]
)
_AUDIENCES = {  # word -> audience
    **dict.fromkeys(("women", "womens", "women's", "woman", "ladies"), "women"),
    **dict.fromkeys(("men", "mens", "men's", "man", "mans"), "men"),
    **dict.fromkeys(("kids", "kid", "children", "boys", "girls", "boy", "girl", "toddler", "baby"), "kids"),
}
_NEGATIONS = frozenset(("without", "not", "no", "non"))
_STOP = frozenset(
    ["a", "an", "and", "by", "for", "from", "in", "is", "of", "on", "or", "set", "that", "the", "to", "w", "with", "your"]
)
_MAX_QUERY_WORDS, _MAX_TITLE_WORDS, _MAX_LEAF_WORDS = 10, 5, 4
_MAX_WORD_CHARS = 24
_MAX_CONSTRAINTS = 3
_MAX_ASKED = 6
_KNOWN = {  # steps before the verdict, and their answers; empty: free text
    "query_intent": (),
    "item": (),
    "category_match": ("match", "related", "mismatch"),
    "attribute_match": ("match", "unclear", "conflict"),
}


@dataclass(frozen=True)
class Lexicon:
    """Brands and colors, as found in the data."""

    brands: frozenset[str] = frozenset()  # lower case, words joined by one space
    colors: frozenset[str] = frozenset()  # single lower-case words

    @staticmethod
    def from_examples(examples: Iterable[Example]) -> Lexicon:
        """The lexicon of a training set, in one pass. It reads no grades.

        A color is a word of at least three letters that occurs in at least three color fields and in at most twice as many
        titles ("black" is one, "leather" from "black leather" is not). A brand occurs in at least two brand fields and in at
        most five times as many titles ("blue" is not one).
        """
        in_title, in_color, brands = Counter[str](), Counter[str](), Counter[str]()
        for example in examples:
            in_title.update(set(_words(example.title)))
            in_color.update(set(_words(example.fields.get("color", ""))))
            brands[" ".join(_words(example.fields.get("brand", "")))] += 1
        colors = frozenset(w for w, n in in_color.items() if n >= 3 and len(w) >= 3 and w.isalpha() and 2 * n >= in_title[w])
        return Lexicon(
            brands=frozenset(b for b, n in brands.items() if b and n >= 2 and 5 * n >= in_title[b] and b not in colors),
            colors=colors,
        )


def silver_response(example: Example, lexicon: Lexicon, schema: StepSchema) -> str:
    """The silver response to a graded pair, as `schema` writes it: a pure function of its arguments.

    The last step is the grade. About 30 words, rarely more than 45, in lower case except for names of steps and grade. UserError
    for a pair without a grade, and for a schema with steps or answers of its own.
    """
    _check(schema)
    if example.grade not in schema.grades.names:
        raise UserError(
            f"{example.shown} has the grade {example.grade}: a silver response needs one of {', '.join(schema.grades.names)}"
        )
    answers = _read(example, lexicon)
    return schema.write([*(" -> ".join(filter(None, answers[name])) for name in schema.names[:-1]), example.grade])


def silver_gold(example: Example, lexicon: Lexicon, schema: StepSchema) -> tuple[str | None, ...]:
    """`example.gold` [J] with the readings of its silver response as labels of the category and attribute match.

    They are silver: what the words say, not what a person has judged. A label that the pair has stays. With them a reward for
    reading the evidence is possible. UserError as in `silver_response`, but the pair needs no grade.
    """
    _check(schema)
    answers = _read(example, lexicon)
    silver = [answers[name][1] or None for name in schema.names[:-1]]
    gold = example.gold or (None,) * schema.num_steps
    return tuple(own or label for own, label in zip(gold, [*silver, None], strict=True))


@lru_cache(maxsize=8)
def _check(schema: StepSchema) -> None:
    """Raise UserError for a schema that has other steps than silver responses, or that cannot read them."""
    own = "write demonstrations of your own, as prompt and response, for srpo.sft"
    written, expected = [], []
    for spec in schema.specs[:-1]:
        options = _KNOWN.get(spec.name)
        if options is None:
            raise UserError(f"silver responses have the steps {', '.join(_KNOWN)} and not {spec.name!r}: {own}")
        if options != spec.options:
            raise UserError(f"silver responses answer step {spec.name!r} with {', '.join(options) or 'free text'}: {own}")
        written.append(f"red title; 1 of 1 -> {options[-1]}" if options else "shoe; color red")
        expected.append(options[-1] if options else written[-1])
    worst = schema.grades.names[0]
    read = schema.parse_text(schema.write([*written, worst])).answers
    wrong = [
        (got is not None, name) for name, got, want in zip(schema.names, read, [*expected, worst], strict=True) if got != want
    ]
    if wrong:  # the text of a step that is not found is part of the step before it
        raise UserError(f"step {min(wrong)[1]!r} has a header or an answer that silver responses do not have: {own}")


def _read(example: Example, lexicon: Lexicon) -> dict[str, tuple[str, str]]:
    """The answer of each step before the verdict as (evidence, label); without a label for free text."""
    query, asked = _read_query(example.query, lexicon)
    item = _read_item(example, query, lexicon)
    checks = [check(constraint, item) for constraint in query.constraints]
    details = ", ".join(f"{c.kind} {outcome}" for c, outcome in zip(query.constraints, checks, strict=True))
    return {
        "query_intent": (str(query), ""),
        "item": (str(item), ""),
        "category_match": _found(asked, example),
        "attribute_match": (details or "nothing asked", attribute_relation(checks)),
    }


def _found(asked: list[str], example: Example) -> tuple[str, str]:
    """S3: the place of each word in the listing, the number found, and match (all), related (some) or mismatch (none)."""
    title = {_stem(word) for word in _words(example.title)}
    fields = {_stem(word) for value in example.fields.values() for word in _words(value)}
    places = ["title" if _stem(word) in title else "fields" if _stem(word) in fields else "no" for word in asked]
    if not asked:
        return "nothing asked", "match"
    num_found = len(asked) - places.count("no")
    shown = ", ".join(f"{word} {place}" for word, place in zip(asked, places, strict=True))
    label = "match" if num_found == len(asked) else "related" if num_found else "mismatch"
    return f"{shown}; {num_found} of {len(asked)}", label


def _words(text: str) -> list[str]:
    """Lower-case words. 1.75, 1/2, c-wire and men's are one word each; red/white is two."""
    return [word[:_MAX_WORD_CHARS] for word in re.findall(r"\d+(?:[./]\d+)+|\w+(?:[.'-]\w+)*", text.lower())]


def _stem(word: str) -> str:
    """The word without plural or possessive ending and final e, so that "glasses" matches "glass" and "laces" matches "lace"."""
    word = word.removesuffix("'s")
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


def _leaf(example: Example) -> str:
    path = [part for part in re.split(r"[>/|]", example.fields.get("category", "")) if part.strip()]
    return " ".join(_words(path[-1])[:_MAX_LEAF_WORDS]) if path else ""


def _brand_span(words: list[str], lexicon: Lexicon) -> tuple[int, int]:
    """[start, end) of the longest brand among the words, the first one if several are equally long; (0, 0) without a brand."""
    spans = [(i, j) for i in range(len(words)) for j in range(i + 1, min(len(words), i + 4) + 1)]
    brands = [(i, j) for i, j in spans if " ".join(words[i:j]) in lexicon.brands]
    return max(brands, key=lambda span: (span[1] - span[0], -span[0]), default=(0, 0))


def _read_query(text: str, lexicon: Lexicon) -> tuple[Facts, list[str]]:
    """(S1: category and constraints of the query, its content words without what it excludes)."""
    words = _words(text)[:_MAX_QUERY_WORDS]
    start, end = _brand_span(words, lexicon)
    constraints = [Constraint("brand", " ".join(words[start:end]))] if end else []
    rest = words[:start] + words[end:]
    core: list[str] = []
    excluded: set[str] = set(_NEGATIONS)
    negated = False
    for i, word in enumerate(rest):
        if word in _NEGATIONS and i + 1 < len(rest):
            negated = True
        elif negated and word in _STOP:
            continue
        elif word in lexicon.colors:
            constraints.append(Constraint("color", word, negated))
            excluded |= {word} if negated else set()
            negated = False
        elif negated:
            constraints.append(Constraint("feature", word, negated=True))
            excluded.add(word)
            negated = False
        elif word in _MATERIALS:
            constraints.append(Constraint("material", word))
        elif word in _AUDIENCES:
            constraints.append(Constraint("for", _AUDIENCES[word]))
        else:
            core.append(word)
    constraints = list(dict.fromkeys(constraints))[:_MAX_CONSTRAINTS]
    content = [word for word in core if word not in _STOP]
    category = " ".join(content) if constraints and content else f"looking for {' '.join(words)}"
    asked = {_stem(word): word for word in words if word not in _STOP and word not in excluded}
    return Facts(category, tuple(constraints)), list(asked.values())[:_MAX_ASKED]


def _read_item(example: Example, query: Facts, lexicon: Lexicon) -> Facts:
    """S2: the leaf category (else the first words of the title), and the brand, colors, material, audience and features shown."""
    title, text = _words(example.title), _words(example.fields.get("text", ""))
    brand = " ".join(_words(example.fields.get("brand", ""))[:3])
    shown = [Constraint("brand", brand)] if brand else []
    colors = [word for word in _words(example.fields.get("color", "")) or title if word in lexicon.colors]
    shown += [Constraint("color", word) for word in dict.fromkeys(colors)][:2]
    wanted = [c.value for c in query.constraints if c.kind == "material"]
    materials = [word for word in (*title, *text) if word in _MATERIALS]
    shown += [Constraint("material", word) for word in sorted(dict.fromkeys(materials), key=lambda word: word not in wanted)[:1]]
    shown += [Constraint("for", who) for who in dict.fromkeys(_AUDIENCES[word] for word in title if word in _AUDIENCES)][:1]
    for constraint in query.constraints:
        if constraint.kind == "feature":
            shown += _feature(constraint.value, [*title, *text])
    own = [word for word in title if word not in brand.split()][:_MAX_TITLE_WORDS]
    return Facts(_leaf(example) or " ".join(own) or "item", tuple(_as_in_query(c, query) for c in shown))


def _feature(value: str, words: list[str]) -> list[Constraint]:
    """How the listing's words state a feature that the query excludes: present, absent ("no ..."), or [] if not mentioned."""
    stem = _stem(value)
    at = [i for i, word in enumerate(words) if _stem(word) == stem]
    free = any(word.endswith(end) and _stem(word.removesuffix(end)) == stem for word in words for end in ("less", "-free"))
    if free or any((i and words[i - 1] in _NEGATIONS) or words[i + 1 : i + 2] == ["free"] for i in at):
        return [Constraint("feature", f"no {value}")]
    return [Constraint("feature", value)] if at else []


def _as_in_query(shown: Constraint, query: Facts) -> Constraint:
    """A shown brand that contains the query's brand, spelled as in the query ("nike" for "nike golf"), for `check` to match."""
    for constraint in query.constraints:
        if constraint.kind == shown.kind == "brand" and f" {constraint.value} " in f" {shown.value} ":
            return constraint
    return shown
