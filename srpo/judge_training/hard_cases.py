"""Hard cases for the judge's second stage (4.3.1): difficulty-aware and diversity-aware mining, and cases as training examples.

A case is hard if the sampled verdicts of the judge after SFT contradict each other or the labels. For the GRPO stage the judge's
output becomes a response whose steps are verdicts, so that the policy's trainer can train the judge.

Paper: 4.3.1 says only "difficulty-aware and diversity-aware sampling to generate a subset of challenging examples". Difficulty
here: the sampled verdicts on a step differ, or their majority differs from the label, and the share of right verdicts lies inside
a window. Diversity: the strata step x verdict x tags take turns, the one with the fewest chosen cases first.
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

PROMPT_FIELD = "judge_prompt"  # product field of a case with the judge's prompt
CASE_PROMPT = f"{{{PROMPT_FIELD}:lines}}"  # data.prompt of the second stage


@dataclass(frozen=True)
class Case:
    """A response with the judge's sampled verdicts and the known right ones; all tuples [J]."""

    example_id: str
    response: str
    labels: tuple[bool | None, ...]  # right verdict: the annotator's, else by the gold label; None if neither exists
    shares: tuple[float | None, ...]  # share of "correct" among the sampled verdicts; None without any
    num_votes: tuple[int, ...]  # sampled verdicts, without missing ones
    solve_rate: float  # share of sampled verdicts that agree with the labels; without any label, with the majorities
    reason: str = ""  # text of one of the judge's sampled outputs

    @property
    def case_id(self) -> str:
        """An id that depends only on the pair and the response."""
        digest = hashlib.blake2b(f"{self.example_id}\n{self.response}".encode("utf-8", "backslashreplace"), digest_size=8)
        return f"{self.example_id}-{digest.hexdigest()}"

    def verdict(self, j: int) -> bool | None:
        """Majority of the sampled verdicts on step j; a tie is "incorrect", for a human to check. None without verdicts."""
        return _majority(self.shares[j])

    def disagrees(self, j: int) -> bool:
        """Whether step j has a label and the judge's majority differs from it."""
        return self.labels[j] is not None and self.verdict(j) is not self.labels[j]

    def margin(self, j: int) -> float:
        """Clarity of the majority on step j, from 0 (half and half, or no verdicts) to 1 (unanimous)."""
        share = self.shares[j]
        return 0.0 if share is None else abs(2 * share - 1)

    @property
    def hard_steps(self) -> tuple[int, ...]:
        """Steps on which the judge contradicts the label or itself, or gave no readable verdict."""
        return tuple(j for j in range(len(self.labels)) if self.disagrees(j) or self.margin(j) < 1)

    @property
    def rank(self) -> tuple[float, ...]:
        """Sort key, hardest first: most disagreements with labels, then the smallest margin, then the smallest sum of margins."""
        margins = [self.margin(j) for j in self.hard_steps]
        return -sum(self.disagrees(j) for j in range(len(self.labels))), min(margins, default=1.0), sum(margins)


def make_case(
    example: Example, response: str, annotated: Verdicts | None, votes: Sequence[Verdicts], schema: StepSchema, reason: str = ""
) -> Case:
    """The case of a response. annotated [J] or None: an annotator's verdicts; votes [V][J]: the judge's sampled ones, V >= 1.

    The label of a step is the annotator's verdict, else whether the answer equals the gold label. A missing vote counts as wrong
    in the solve rate.
    """
    gold, answers = example.gold or (None,) * schema.num_steps, schema.parse_text(response).answers
    of_gold = [None if true is None else same_answer(answer, true) for answer, true in zip(answers, gold, strict=True)]
    verdicts = annotated or (None,) * schema.num_steps
    labels = tuple(b if a is None else bool(a) for a, b in zip(verdicts, of_gold, strict=True))
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
    """(chosen cases, hardest first; numbers of responses, hard cases, cases in the window, chosen cases, and of each stratum).

    Candidates have a hard step and a solve rate strictly between low and high. Up to `num_cases` are chosen so that the strata
    (step, verdict, values of `tags`) are even: the next case is always the hardest of the stratum with the fewest chosen cases.
    UserError if an example lacks a tag.
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
    """(step name, verdict, *values of `tags`) of each hard step; the verdict is the label, else the judge's majority."""
    values, names = stratum(example, tags), []
    for j in case.hard_steps:
        label, verdict = case.labels[j], case.verdict(j)
        right = verdict if label is None else label
        names.append((schema.specs[j].name, "unreadable" if right is None else WORDS[right], *values))
    return tuple(names)


def verdict_steps(schema: StepSchema) -> tuple[StepSpec, ...]:
    """Step schema of the judge's response: step k is the verdict on step k of the judged response, and earns 1/J if right.

    The sum of step rewards is therefore the share of right verdicts. Of two contradicting verdicts on a step the first counts.
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


def case_example(case_id: str, example: Example, response: str, labels: Sequence[bool | None], guidelines: str = "") -> Example:
    """A case as an example of the second stage: its prompt is the judge's, its gold the right verdicts `labels` [J]."""
    gold = tuple(None if label is None else WORDS[label].capitalize() for label in labels)
    return Example(
        example_id=case_id,
        query_id=example.query_id,
        query=example.query,
        title=example.title,
        fields={"response": response, PROMPT_FIELD: judge_prompt(example, response, guidelines)},
        gold=gold,
        truth=gold,
        tags={key: value for key, value in example.tags.items() if key != "grade"},  # the verdict of a case is not a grade
    )
