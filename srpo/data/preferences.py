"""Preference pairs for DPO, a better and a worse response to one prompt: drawn from sampled responses, or read from a file."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srpo.core.batch import Rollout
from srpo.core.config.dpo import PairRules
from srpo.core.errors import UserError
from srpo.core.jsonl import json_lines
from srpo.core.ranges import check_ranges
from srpo.core.steps import same_answer
from srpo.data.pairs import text_of

_ROUNDING = 1e-9  # tolerance when sums of step rewards are compared: 0.1 + 0.2 is not 0.3

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Preference:
    """One preference pair as token ids."""

    prompt_ids: Tokens
    chosen_ids: Tokens
    rejected_ids: Tokens
    example_id: str = ""
    grade: str = ""  # label of the verdict; empty if unknown


def pairs_from_rollouts(
    rollouts: Iterable[Rollout], labels: Mapping[str, str | None] | None, rules: PairRules
) -> tuple[list[Preference], dict[str, Any]]:
    """(pairs, counts of responses, prompts and pairs) of responses to the same prompt of the same example (5.1.4).

    labels: example_id -> label of the verdict; a verdict equal to it is right. None: a verdict is right if the last step earned a
    reward. A response without a verdict is not right. "total" prefers the larger sum of the rollout's step rewards.
    A response that was sampled several times counts once, with the mean of its scores. A response cut at the maximum length can
    be rejected but never chosen, since the policy would not learn to end it. Aborted responses are left out. Draws depend on
    the seed, the example and the set of its responses, not on their order.

    Paper: 5.1.4 says "pairwise preference labels", not how they were obtained; here from the verdict by default.
    Raises UserError if labels or rewards are needed and missing, if no example has a pair, or if `balance` is set and the
    examples of a grade have no pair.
    """
    _check(rules, labels)
    sampled: dict[tuple[str, Tokens], dict[Tokens, list[float]]] = {}
    ended: set[tuple[str, Tokens, Tokens]] = set()  # responses with finish "stop"
    num = Counter({"responses": 0, "aborted": 0, "repeated": 0})
    for rollout in rollouts:
        num["responses"] += 1
        if rollout.finish == "abort":
            num["aborted"] += 1
            continue
        responses = sampled.setdefault((rollout.example_id, rollout.prompt_ids), {})
        num["repeated"] += rollout.response_ids in responses
        responses.setdefault(rollout.response_ids, []).append(_score(rollout, labels, rules.prefer))
        if rollout.finish == "stop":
            ended.add((rollout.example_id, rollout.prompt_ids, rollout.response_ids))
    margin = rules.margin if rules.prefer == "total" else 0.0
    pairs: list[Preference] = []
    for (example_id, prompt), responses in sampled.items():
        ranked = sorted((-sum(s) / len(s), ids) for ids, s in responses.items())
        choosable = [(example_id, prompt, ids) in ended for _, ids in ranked]
        rng = random.Random(f"dpo|{rules.seed}|{example_id}|{prompt}")
        grade = str((labels or {}).get(example_id) or "")
        for i, j in _draw([-score for score, _ in ranked], choosable, margin, rules.per_example, rng):
            pairs.append(Preference(prompt, ranked[i][1], ranked[j][1], example_id, grade))
    counts: dict[str, Any] = {f"num_{name}": number for name, number in num.items()}
    paired = len({(pair.example_id, pair.prompt_ids) for pair in pairs})
    counts |= {"num_prompts": len(sampled), "num_prompts_without_pair": len(sampled) - paired, "num_pairs_drawn": len(pairs)}
    if not pairs:
        raise UserError(
            f"{counts['num_responses']} responses to {len(sampled)} prompts make no pair: a pair needs a better and a worse "
            "response to one prompt. Sample several to each (rollout.group_size), lower rules.margin, or take prompts that are "
            "neither always answered right nor always wrong"
        )
    if rules.balance:
        _check_grades(pairs, Counter(str((labels or {}).get(example_id) or "") for example_id, _ in sampled))
        counts["by_grade_drawn"] = dict(sorted(Counter(pair.grade for pair in pairs).items()))
        pairs = _balanced(pairs, rules.seed)
    return pairs, counts | {"num_pairs": len(pairs), "by_grade": dict(sorted(Counter(pair.grade for pair in pairs).items()))}


def _check(rules: PairRules, labels: Mapping[str, str | None] | None) -> None:
    check_ranges(rules, prefix="rules.")
    if rules.balance and labels is None:
        raise UserError("rules.balance needs the grades of the examples: set data, or set rules.balance to false")


def _score(rollout: Rollout, labels: Mapping[str, str | None] | None, prefer: str) -> float:
    if prefer == "verdict" and labels is not None:
        label = labels.get(rollout.example_id)
        if label is None:
            raise UserError(
                f"example {rollout.example_id} of the rollouts has no grade in data: give data with every example, graded"
            )
        return float(same_answer(rollout.answers[-1], label))
    if rollout.step_rewards is None:
        raise UserError(
            f"the rollouts of {rollout.example_id} have no rewards: use a rollouts.jsonl of srpo.train, or set rules.prefer to "
            "verdict and data to the graded examples"
        )
    return sum(rollout.step_rewards) if prefer == "total" else float(rollout.step_rewards[-1] > 0)


def _draw(
    scores: Sequence[float], choosable: Sequence[bool], margin: float, limit: int, rng: random.Random
) -> list[tuple[int, int]]:
    """At most `limit` (0: all) pairs of indices (chosen, rejected), drawn without repetition. `scores` are descending."""
    least = max(margin - _ROUNDING, _ROUNDING)
    rising = [-score for score in scores]
    firsts = [bisect_left(rising, least - score) for score in scores]  # index of the first score lower by `least` or more
    counts = [(len(scores) - first) if able else 0 for first, able in zip(firsts, choosable, strict=True)]
    total = sum(counts)
    drawn = sorted(rng.sample(range(total), limit)) if limit and limit < total else range(total)
    pairs, before, i = [], 0, 0
    for number in drawn:
        while number >= before + counts[i]:
            before, i = before + counts[i], i + 1
        pairs.append((i, firsts[i] + number - before))
    return pairs


def _check_grades(pairs: Sequence[Preference], num_prompts: Mapping[str, int]) -> None:
    """Raise UserError if a grade that has prompts (`num_prompts`: grade -> how many) has no pair to balance with."""
    num_pairs = Counter(pair.grade for pair in pairs)
    if without := sorted(grade for grade in num_prompts if not num_pairs[grade]):
        named = {grade: grade or "no grade" for grade in sorted(num_prompts)}
        counts = ", ".join(f"{name}: {num_pairs[grade]} / {num_prompts[grade]}" for grade, name in named.items())
        raise UserError(
            f"rules.balance needs pairs of every grade, but {' and '.join(named[grade] for grade in without)} "
            f"{'has' if len(without) == 1 else 'have'} none (pairs / prompts of {counts}): sample more responses "
            "(rollout.group_size) or more such prompts, leave such prompts out, or set rules.balance to false"
        )


def _balanced(pairs: Sequence[Preference], seed: int) -> list[Preference]:
    """Equally many pairs of each grade, as many as the rarest has: drawn at random, kept in the given order."""
    by_grade: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        by_grade.setdefault(pair.grade, []).append(i)
    least = min(map(len, by_grade.values()))
    kept = [i for grade, indices in by_grade.items() for i in random.Random(f"dpo|{seed}|{grade}").sample(indices, least)]
    return [pairs[i] for i in sorted(kept)]


def read_preferences(path: str | Path) -> Iterator[tuple[str, str, str]]:
    """(prompt, chosen, rejected) texts of a JSON Lines file. UserError with file and line for a line that is not a pair or whose
    chosen and rejected texts are equal; UserError for an empty file."""
    want = '{"prompt": "...", "chosen": "...", "rejected": "..."}'
    where = ""
    for where, row in json_lines(path, want):
        prompt, chosen, rejected = (text_of(row, key, where, want) for key in ("prompt", "chosen", "rejected"))
        if chosen == rejected:
            raise UserError(f"{where}: chosen and rejected are the same text: remove the line")
        yield prompt, chosen, rejected
    if not where:
        raise UserError(f"{path} has no pairs: write one JSON object per line, {want}")
