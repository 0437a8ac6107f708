"""A look at judged pairs before anything is trained: how many, of which grades, how long, and what is odd about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from srpo.core.grades import Grades
from srpo.core.tables import percent
from srpo.data.examples import Example


@dataclass(frozen=True)
class Survey:
    """Facts about a list of pairs."""

    num_pairs: int
    num_queries: int  # different query texts, without case and spaces
    grades: dict[str, int]  # number of pairs of each grade, from the worst
    num_ungraded: int
    pairs_per_query: tuple[int, float, int]  # least, median, most
    fields: dict[str, int]  # number of pairs with a text in each product field
    num_repeated: int  # pairs beyond the first with the same query and item
    num_conflicting: int  # pairs (query, item) that have two grades
    steps: dict[str, int]  # number of pairs with a label of each step before the verdict
    prompt_tokens: tuple[int, int, int] | None = None  # median, 99th percentile, most

    def lines(self) -> list[str]:
        """The facts in words, one per line, the odd ones last."""
        least, middle, most = self.pairs_per_query
        total = max(1, sum(self.grades.values()))
        shares = ", ".join(f"{name} {count:,} ({percent(count / total)} %)" for name, count in self.grades.items())
        fields = ", ".join(f"{name} {percent(count / self.num_pairs)} %" for name, count in self.fields.items()) or "none"
        lines = [
            f"{self.num_pairs:,} pairs of {self.num_queries:,} queries ({least:,} to {most:,} per query, median {middle:g})",
            f"grades from the worst: {shares}",
            f"product fields besides the title: {fields}",
        ]
        if self.prompt_tokens is not None:
            middle_tokens, many, longest = self.prompt_tokens
            lines.append(f"tokens of a prompt: median {middle_tokens:,}, 99 % up to {many:,}, longest {longest:,}")
        if self.steps:
            lines.append("labels of steps: " + ", ".join(f"{name} {count:,}" for name, count in self.steps.items()))
        if self.num_ungraded:
            lines.append(f"note: {self.num_ungraded:,} pairs have no grade")
        if rare := [name for name, count in self.grades.items() if count < 0.02 * total]:
            lines.append(f"note: fewer than 2 % of the pairs are {' or '.join(rare)}; a judge learns little about such a grade")
        if self.num_repeated:
            lines.append(f"note: {self.num_repeated:,} pairs repeat the query and item of another")
        if self.num_conflicting:
            lines.append(f"note: {self.num_conflicting:,} of them have two grades, so no judge can be right on all")
        if self.num_queries < 200:
            lines.append(
                f"note: {self.num_queries:,} queries are few: results on other queries will depend on which ones are held out"
            )
        return lines


def survey(examples: Sequence[Example], grades: Grades, step_names: Sequence[str], prompts: Sequence[Any] = ()) -> Survey:
    """The survey of pairs. `prompts`: token ids of their prompts, if they are known. There must be at least one pair."""
    per_query = Counter(_plain(example.query) for example in examples)
    items: dict[tuple[str, ...], set[str | None]] = {}
    for example in examples:
        key = (_plain(example.query), _plain(example.title), *(f"{k}={v}" for k, v in sorted(example.fields.items())))
        items.setdefault(key, set()).add(example.grade)
    counts = Counter(example.grade for example in examples)
    fields = Counter(name for example in examples for name, value in example.fields.items() if value)
    labelled = Counter(
        name for e in examples for name, label in zip(step_names[:-1], e.gold[:-1], strict=False) if label is not None
    )
    lengths = sorted(map(len, prompts))
    return Survey(
        num_pairs=len(examples),
        num_queries=len(per_query),
        grades={name: counts[name] for name in grades.names},
        num_ungraded=counts[None],
        pairs_per_query=(min(per_query.values()), median(per_query.values()), max(per_query.values())),
        fields=dict(sorted(fields.items())),
        num_repeated=len(examples) - len(items),
        num_conflicting=sum(len(given - {None}) > 1 for given in items.values()),
        steps={name: labelled[name] for name in step_names[:-1] if labelled[name]},
        prompt_tokens=(lengths[len(lengths) // 2], lengths[(99 * len(lengths)) // 100], lengths[-1]) if lengths else None,
    )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
