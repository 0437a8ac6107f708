"""Queries that are held out: the same ones in every run and in any order of the examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from srpo.core.errors import UserError
from srpo.core.text import fold
from srpo.data.examples import Example


class QuerySplit:
    """About `eval_frac` of the queries of some examples, held out so that no query is on both sides.

    A hash of (seed, query text) decides, so adding data moves no old query. Examples that share a query_id or a query text (up to
    case and spaces) are always on the same side, in any order of the examples. Memory grows with the queries, not with the
    examples, which may be a stream. UserError if a side would be empty.
    """

    def __init__(self, examples: Iterable[Example], eval_frac: float, seed: int) -> None:
        if not 0.0 < eval_frac < 1.0:
            raise ValueError(f"eval_frac is {eval_frac}: give a fraction between 0 and 1")
        self._parent: dict[tuple[str, str], tuple[str, str]] = {}  # union-find over ("1", query text) and ("2", query_id)
        counts: dict[str, int] = {}
        for example in examples:
            # the smaller node becomes the root: always a query text, and the same one for any order of the examples
            low, high = sorted((self._find(("1", fold(example.query))), self._find(("2", example.query_id))))
            self._parent[high] = low
            counts[example.query_id] = counts.get(example.query_id, 0) + 1
        roots = {query_id: self._find(("2", query_id)) for query_id in counts}
        held_out = {root: _hash(f"{seed}|{root[1]}") < eval_frac * 2**64 for root in {*roots.values()}}
        self._held_out = {query_id for query_id, root in roots.items() if held_out[root]}
        num_eval = sum(counts[query_id] for query_id in self._held_out)
        num_train = sum(counts.values()) - num_eval
        self._parent.clear()
        if not num_train or not num_eval:
            raise UserError(
                f"eval_frac {eval_frac} with seed {seed} puts {num_train} examples in train and {num_eval} in eval "
                f"({len(held_out)} queries): give more queries, another eval_frac or another seed"
            )

    def holds_out(self, example: Example) -> bool:
        """Whether an example, one of those that the split was made from, is held out."""
        return example.query_id in self._held_out

    def _find(self, node: tuple[str, str]) -> tuple[str, str]:
        parent = self._parent
        while (above := parent.setdefault(node, node)) != node:
            parent[node] = parent[above]
            node = parent[node]
        return node


def split_by_query(examples: Iterable[Example], eval_frac: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, eval) of a `QuerySplit` of the examples; both keep their order."""
    examples = list(examples)
    split = QuerySplit(examples, eval_frac, seed)
    train, evaluation = [], []
    for example in examples:
        (evaluation if split.holds_out(example) else train).append(example)
    return train, evaluation


def spread_over_queries(examples: Iterable[Example], seed: int = 0) -> list[Example]:
    """The examples in rounds of the queries: one pair of each query, then a second one of each query that has more, and so on.

    A hash of (seed, query text) orders the queries, one of (seed, example_id) the pairs of a query, whatever the order of the
    file. The first N are then a sample of as many queries as N allows.
    """
    pairs = sorted(examples, key=lambda example: (_hash(f"{seed}|pair|{example.example_id}"), example.example_id))
    taken: dict[str, int] = {}
    keyed: list[tuple[int, int, str, Example]] = []
    for example in pairs:
        query = fold(example.query)
        keyed.append((taken.get(query, 0), _hash(f"{seed}|order|{query}"), query, example))
        taken[query] = taken.get(query, 0) + 1
    return [example for *_, example in sorted(keyed, key=lambda entry: entry[:3])]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
