"""Example responses of `make demo-real`: hits and misses of the policy after SRPO, each of another query."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo_real.plan import Part, Sizes, name_of
from srpo.core.files import write_whole
from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.data.readers import load_examples

RESPONSES = "srpo.rollouts.jsonl"
NUM = 20  # responses in all, as many hits as misses where there are


def chosen(pairs: Sequence[Example], responses: dict[str, dict[str, Any]], num: int) -> list[tuple[Example, dict[str, Any]]]:
    """Up to `num` pairs with their responses: hits, then misses, each the first of its query in the order of the pairs."""
    found: list[tuple[Example, dict[str, Any]]] = []
    for hit in (True, False):
        seen: set[str] = set()
        for pair in pairs:
            response = responses[pair.example_id]
            if (response["answers"][-1] == pair.grade) == hit and pair.query_id not in seen and len(seen) < num // 2:
                seen.add(pair.query_id)
                found.append((pair, response))
    return found


def write_examples_of(files: Sequence[str], sizes: Sizes, runs: Path, out: Path) -> bool:
    """Write the Markdown page with the examples of all files: of the adapter, or else of all weights.

    Returns whether responses to the first split of each are there; if not, nothing is written.
    """
    parts = [[Part(data, 0, all_weights=all_weights) for all_weights in (False, True)] for data in files]
    there = [[part for part in some if (runs / part.name / RESPONSES).is_file()] for some in parts]
    if not all(there):
        return False
    lines = ["# Example responses of `make demo-real`", ""]
    lines += [
        "Responses of the policy after SRPO to held-out pairs of the first split, as they came. For each file the first hits,"
    ]
    lines += ["then the first misses, in the random order of the held-out pairs, each of another query.", ""]
    for part, *_ in there:
        folder = runs / part.name
        rows = map(json.loads, (folder / RESPONSES).read_text(encoding="utf-8").splitlines())
        responses = {row["example_id"]: row for row in rows}
        pairs = load_examples(folder / "data" / "eval.jsonl", PAPER, sizes.num_eval)
        lines += [f"## {name_of(part.data)}{', all weights' if part.all_weights else ''}", ""]
        for pair, response in chosen(pairs, responses, NUM // len(files)):
            hit = response["answers"][-1] == pair.grade
            fields = "".join(f" | {name}: {value}" for name, value in pair.fields.items())
            lines += [f"**{pair.query}** / {pair.title}{fields}", "", "```", response["text"].strip(), "```"]
            lines += [f"People: {pair.grade}. {'Hit' if hit else 'Miss'}.", ""]
    write_whole(out, "\n".join(lines))
    return True
