"""Hard cases for the judge's second stage (4.3.1): difficulty-aware and diversity-aware mining, and cases as training examples.

A case is a response that the judge after SFT is in two minds about, or that it judges otherwise than the labels. The judge's
verdicts on it become the steps of a response of its own, so that the trainer of the policy trains the judge.

Paper: "difficulty-aware and diversity-aware sampling to generate a subset of challenging examples", and no more. Difficulty: the
sampled verdicts on a step differ, or their majority differs from the label, and the share of right ones lies inside a window.
Diversity: as many cases of each step x verdict x tag as there are, drawn in turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from srpo.core.steps import StepSchema, StepSpec, same_answer
from srpo.data.examples import Example
from srpo.data.strata import stratum
from srpo.rewards.judge import Verdicts
from srpo.rewards.verdicts import WORDS, judge_prompt, verdict_answer, verdict_header

PROMPT_FIELD = "judge_prompt"  # product field of a case that holds all that the judge reads
CASE_PROMPT = f"{{{PROMPT_FIELD}}}"  # data.prompt of the second stage


@dataclass(frozen=True)
class Case:
    """A response with the judge's sampled verdicts and whatever is known to be right; all tuples [J]."""

    example_id: str
    response: str
    labels: tuple[bool | None, ...]  # what an annotator said, else what a gold label says
    shares: tuple[float | None, ...]  # of "correct" among the verdicts that are there; None where there is none
    num_votes: tuple[int, ...]  # verdicts that are there
    solve_rate: float  # share of all sampled verdicts that agree with the label, without any label with the majority
    reason: str = ""  # what the judge wrote in one of its opinions

    @property
    def case_id(self) -> str:
        """A name that depends on the pair and the response alone."""
        digest = hashlib.blake2b(f"{self.example_id}\n{self.response}".encode("utf-8", "backslashreplace"), digest_size=8)
        return f"{self.example_id}-{digest.hexdigest()}"

    def verdict(self, j: int) -> bool | None:
        """The majority on step j; a tie is "incorrect", which a human should see."""
        return _majority(self.shares[j])

    def disagrees(self, j: int) -> bool:
        """Whether the judge's majority on step j is not the label."""
        return self.labels[j] is not None and self.verdict(j) is not self.labels[j]

    def margin(self, j: int) -> float:
        """How clear the majority on step j is, 0 (half and half) to 1 (all the same); 0 where nothing was said."""
        share = self.shares[j]
        return 0.0 if share is None else abs(2 * share - 1)

    @property
    def hard_steps(self) -> tuple[int, ...]:
        """Steps on which the judge contradicts the label or itself, or has said nothing that can be read."""
        return tuple(j for j in range(len(self.labels)) if self.disagrees(j) or self.margin(j) < 1)

    @property
    def rank(self) -> tuple[float, ...]:
        """Smaller is sooner to be looked at: disagreements with a label first, the most of them first, then low margins."""
        margins = [self.margin(j) for j in self.hard_steps]
        return -sum(self.disagrees(j) for j in range(len(self.labels))), min(margins, default=1.0), sum(margins)


def make_case(
    example: Example, response: str, annotated: Verdicts | None, votes: Sequence[Verdicts], schema: StepSchema, reason: str = ""
) -> Case:
    """The case of a response. annotated [J] or None; votes [V][J]: the judge's sampled opinions, V >= 1.

    A step's label is the annotator's verdict, else whether the answer states what the gold label does. A vote that is missing
    solves nothing.
    """
    gold, answers = example.gold or (None,) * schema.num_steps, schema.parse_text(response).answers
    of_gold = [None if true is None else same_answer(answer, true) for answer, true in zip(answers, gold, strict=True)]
    said = annotated or (None,) * schema.num_steps
    labels = tuple(b if a is None else bool(a) for a, b in zip(said, of_gold, strict=True))
    columns = [[bool(v) for v in column if v is not None] for column in zip(*votes, strict=True)]
    shares = tuple(sum(column) / len(column) if column else None for column in columns)
    known = [j for j in range(schema.num_steps) if labels[j] is not None] or range(schema.num_steps)
    goals = [_majority(shares[j]) if labels[j] is None else labels[j] for j in known]
    solved = sum(columns[j].count(goal) for j, goal in zip(known, goals, strict=True) if goal is not None)
    solve_rate = solved / (len(votes) * len(known))
    return Case(example.example_id, response, labels, shares, tuple(map(len, columns)), solve_rate, reason)


def _majority(share: float | None) -> bool | None:
    return None if share is None else share > 0.5


def mine(
    cases: Iterable[Case],
    examples: dict[str, Example],
    schema: StepSchema,
    num_cases: int,
    low: float,
    high: float,
    tags: Sequence[str],
) -> tuple[list[Case], dict[str, Any]]:
    """(the chosen cases, those to be looked at first at the head; how many of what were seen, hard, chosen, and of each stratum).

    A case is hard where some step of it is, and its solve rate lies strictly between low and high. Of the hard ones up to
    `num_cases` are chosen so that strata (step, verdict, values of `tags`) come out even: the next one is always the hardest of
    the stratum with the fewest. ValueError where an example lacks a tag.
    """
    cases = list(cases)
    hard = [case for case in cases if case.hard_steps]
    within = sorted((c for c in hard if low < c.solve_rate < high), key=lambda c: (*c.rank, c.case_id))
    members: dict[tuple[str, ...], list[int]] = {}
    strata = [case_strata(case, examples[case.example_id], schema, tags) for case in within]
    for i, names in enumerate(strata):
        for name in names:
            members.setdefault(name, []).append(i)
    counts = dict.fromkeys(sorted(members), 0)
    chosen: set[int] = set()
    queues = {name: iter(indices) for name, indices in members.items()}
    while queues and len(chosen) < num_cases:
        name = min(queues, key=lambda n: (counts[n], n))
        index = next((i for i in queues[name] if i not in chosen), None)
        if index is None:
            del queues[name]
            continue
        chosen.add(index)
        for other in strata[index]:
            counts[other] += 1
    numbers = {"num_responses": len(cases), "num_hard": len(hard), "num_in_window": len(within), "num_chosen": len(chosen)}
    return [within[i] for i in sorted(chosen)], {**numbers, "strata": {" x ".join(name): counts[name] for name in counts}}


def case_strata(case: Case, example: Example, schema: StepSchema, tags: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """(step, verdict, values of `tags`) of each hard step; the verdict is the label, else the judge's majority."""
    values, names = stratum(example, tags), []
    for j in case.hard_steps:
        label, verdict = case.labels[j], case.verdict(j)
        right = verdict if label is None else label
        names.append((schema.specs[j].name, "unreadable" if right is None else WORDS[right], *values))
    return tuple(names)


def verdict_steps(schema: StepSchema) -> tuple[StepSpec, ...]:
    """The judge's response as a schema: step k is the verdict on step k, its gold the right verdict; a right one earns 1/J.

    So the sum of step rewards is the share of right verdicts. Two contradicting verdicts on a step: the first counts.
    """
    return tuple(
        StepSpec(
            spec.name,
            verdict_header(k),
            answer=verdict_answer(),
            options=tuple(word.capitalize() for word in WORDS),
            sources=("gold", "skip"),
            reward=1 / schema.num_steps,
        )
        for k, spec in enumerate(schema.specs, start=1)
    )


def case_example(case_id: str, example: Example, response: str, labels: Sequence[bool | None]) -> Example:
    """A case as an example of the second stage: the prompt of the judge, its gold the right verdicts [J]."""
    gold = tuple(None if label is None else WORDS[label].capitalize() for label in labels)
    return Example(
        example_id=case_id,
        query_id=example.query_id,
        query=example.query,
        title=example.title,
        fields={"response": response, PROMPT_FIELD: judge_prompt(example, response)},
        gold=gold,
        truth=gold,
        tags={key: value for key, value in example.tags.items() if key != "grade"},  # the grade of a case is none of L1 to L4
    )
