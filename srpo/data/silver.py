"""Silver five-step responses for real data, which has only grades: the SFT warm start learns the response format from them.

Silver is weak. Steps 1 and 2 come from the words of the query and of the product fields, matched against the brands and colors
seen in the data. Steps 3 and 4 are the row of the rule table (`srpo.data.world.GRADE_TABLE`) that leads to the human grade and is
nearest to the lexical evidence. The chain therefore always agrees with its verdict, and may contradict the words.

Paper: 5.1.4 takes its SFT data from the chains of a large model; silver responses need no such model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from srpo.core.errors import UserError
from srpo.data.examples import Example
from srpo.data.teacher import format_response
from srpo.data.world import GRADE_TABLE, Constraint, Facts, attribute_relation, check

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
BEST = "L4"
_NEGATIONS = frozenset(("without", "not", "no", "non"))
_STOP = frozenset(
    ["a", "an", "and", "by", "for", "from", "in", "is", "of", "on", "or", "set", "that", "the", "to", "w", "with", "your"]
)
_MAX_QUERY_WORDS, _MAX_TITLE_WORDS, _MAX_LEAF_WORDS = 10, 5, 4
_MAX_WORD_CHARS = 24
_MAX_CONSTRAINTS = 3
_SPREAD = (
    {"match": 0, "related": 1, "mismatch": 2},
    {"match": 0, "unclear": 1, "conflict": 2},
)  # positions of the answers of S3 and of S4; their difference is the distance between two answers
_PREFERENCE = ("unclear", "match", "conflict")  # order of S4 answers among equally near rows of the table


@dataclass(frozen=True)
class Lexicon:
    """Brands, colors, and the category of each query, as found in the data."""

    brands: frozenset[str] = frozenset()  # lower case, words joined by one space
    colors: frozenset[str] = frozenset()  # single lower-case words
    categories: Mapping[str, str] = field(default_factory=dict)  # query_id -> most common leaf category of its L4 items

    @staticmethod
    def from_examples(examples: Iterable[Example]) -> Lexicon:
        """The lexicon of a training set, in one pass. Pass no held-out examples: `categories` reads their grades.

        A color is a word of at least three letters that occurs in at least three color fields and in at most twice as many
        titles ("black" is one, "leather" from "black leather" is not). A brand occurs in at least two brand fields and in at
        most five times as many titles ("blue" is not one).
        """
        in_title, in_color, brands = Counter[str](), Counter[str](), Counter[str]()
        leaves: dict[str, Counter[str]] = {}
        for example in examples:
            in_title.update(set(_words(example.title)))
            in_color.update(set(_words(example.fields.get("color", ""))))
            brands[" ".join(_words(example.fields.get("brand", "")))] += 1
            if example.grade == BEST and (leaf := _leaf(example)):
                leaves.setdefault(example.query_id, Counter())[leaf] += 1
        colors = frozenset(w for w, n in in_color.items() if n >= 3 and len(w) >= 3 and w.isalpha() and 2 * n >= in_title[w])
        return Lexicon(
            brands=frozenset(b for b, n in brands.items() if b and n >= 2 and 5 * n >= in_title[b] and b not in colors),
            colors=colors,
            categories={query_id: min(c, key=lambda leaf: (-c[leaf], leaf)) for query_id, c in leaves.items()},
        )


def silver_response(example: Example, lexicon: Lexicon) -> str:
    """The silver response to a graded pair, in the format that `PAPER_STEPS` parses: a pure function of its arguments.

    About 30 words, rarely more than 45, in lower case except for the verdict. UserError if the pair has no grade or not five
    steps.
    """
    grade = example.gold[-1] if example.gold else None
    if grade is None or len(example.gold) != 5 or grade not in GRADE_TABLE.values():
        raise UserError(
            f"{example.example_id} has gold {example.gold}: a silver response needs five steps and a verdict L1 to L4"
        )
    query, core = _read_query(example.query, lexicon)
    item = _read_item(example, query, lexicon)
    checks = [check(constraint, item) for constraint in query.constraints]
    category, relation = _chain(grade, _category_evidence(example, core, lexicon), checks)
    details = [f"{c.kind} {outcome}" for c, outcome in zip(query.constraints, checks, strict=True) if _fits(outcome, relation)]
    needed = {"match": "ok", "unclear": "unknown", "conflict": "conflict"}[relation]
    if not any(detail.endswith(needed) for detail in details):
        details.append(f"details {needed}")
    return format_response(str(query), str(item), category, f"{', '.join(details)} -> {relation}", grade)


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
    """(S1: category and constraints of the query, words of the query that name the category)."""
    words = _words(text)[:_MAX_QUERY_WORDS]
    start, end = _brand_span(words, lexicon)
    constraints = [Constraint("brand", " ".join(words[start:end]))] if end else []
    rest = words[:start] + words[end:]
    core: list[str] = []
    negated = False
    for i, word in enumerate(rest):
        if word in _NEGATIONS and i + 1 < len(rest):
            negated = True
        elif negated and word in _STOP:
            continue
        elif word in lexicon.colors:
            constraints.append(Constraint("color", word, negated))
            negated = False
        elif negated:
            constraints.append(Constraint("feature", word, negated=True))
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
    return Facts(category, tuple(constraints)), content


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


def _category_evidence(example: Example, core: list[str], lexicon: Lexicon) -> str:
    """S3 from lexical evidence.

    match: the item has the most common leaf category of the query's L4 items, or at least half of the `core` words of the query;
    related: at least one of them; mismatch: none.
    """
    leaf = _leaf(example)
    if leaf and lexicon.categories.get(example.query_id) == leaf:
        return "match"
    known = {_stem(word) for word in _words(f"{example.title} {example.fields.get('category', '')}")}
    num_found = sum(_stem(word) in known for word in core)
    return "match" if core and 2 * num_found >= len(core) else "related" if num_found else "mismatch"


def _chain(grade: str, category: str, checks: list[str]) -> tuple[str, str]:
    """(S3, S4): the row of the rule table with this grade that is nearest to the evidence. Without checks S4 has no evidence."""
    relation = attribute_relation(checks) if checks else None

    def distance(row: tuple[str, str]) -> tuple[int, int]:
        off = abs(_SPREAD[0][row[0]] - _SPREAD[0][category])
        if relation is not None:
            off += abs(_SPREAD[1][row[1]] - _SPREAD[1][relation])
        return off, _PREFERENCE.index(row[1])

    return min((row for row, result in GRADE_TABLE.items() if result == grade), key=distance)


def _fits(outcome: str, relation: str) -> bool:
    """Whether the outcome of one check is consistent with the chosen S4 answer."""
    return outcome == "ok" or (outcome == "unknown" and relation != "match") or (outcome == "conflict" and relation == "conflict")
