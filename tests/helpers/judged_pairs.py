"""Random graded pairs and responses with all edge cases, and their scores counted row by row in plain Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sklearn.metrics import f1_score

from srpo.core.batch import Rollout
from srpo.core.grades import Grades
from srpo.data.examples import Example
from srpo.scores.evaluation import results_dict
from srpo.scores.responses import from_predictions, verdict_only

SHARES = (
    "verdict_right_steps_right",
    "verdict_right_steps_wrong",
    "verdict_wrong_steps_right",
    "verdict_wrong_steps_wrong",
)
TRUTH = ("shoes; red", "boots; red", "match", "unclear")


def random_examples(rng: random.Random, num_examples: int, num_queries: int) -> list[Example]:
    """Random pairs; each step has a gold label, a truth, both or neither; some classes may be absent."""
    classes = rng.sample([1, 2, 3, 4], rng.randint(1, 4))
    examples = []
    for i in range(num_examples):
        gold = tuple(rng.choice([None, answer]) for answer in TRUTH)
        truth = tuple(rng.choice([None, answer]) for answer in TRUTH) if rng.random() < 0.8 else (None,) * 4
        query = rng.randrange(num_queries)
        tags = {"query_type": rng.choice(["plain", "negation"])} if rng.random() < 0.9 else {}
        grade = f"L{rng.choice(classes)}"
        examples.append(Example(f"e{i}", f"q{query}", "", "", gold=(*gold, grade), truth=(*truth, None), tags=tags))
    return examples


def random_rollouts(rng: random.Random, examples: Sequence[Example]) -> list[Rollout]:
    """One random response per pair: steps correct, wrong or missing; verdicts of a few classes, or missing."""
    guesses = [*rng.sample(["L1", "L2", "L3", "L4"], rng.randint(0, 4)), None]
    rollouts = []
    for i, example in enumerate(examples):
        steps = tuple(rng.choice([answer, answer, answer, "mismatch", None]) for answer in TRUTH)
        verdict = rng.choice([example.gold[-1], *guesses])
        rollouts.append(Rollout.from_answers(example.example_id, (*steps, verdict), group=i))
    return rollouts


def verdict_results(true: Sequence[int], predicted: Sequence[int | None]) -> dict[str, Any]:
    """`results_dict` of verdicts alone: true grades and predicted grades 1..4, None for a response without a verdict."""
    examples = [Example(f"e{i}", f"q{i}", "", "", gold=(f"L{grade}",)) for i, grade in enumerate(true)]
    predictions = {f"e{i}": (None if grade is None else f"L{grade}",) for i, grade in enumerate(predicted)}
    responses = from_predictions(predictions, examples, verdict_only(Grades()))
    return results_dict(responses.rollouts, responses.examples, responses.schema)


def slow_scores(rollouts: Sequence[Rollout], examples: Sequence[Example], drawn_from: Sequence[Example] = ()) -> dict[str, Any]:
    """All scores of the rows, by scikit-learn and by counting; None if the denominator is 0.

    drawn_from: all pairs, if the rows are a draw from them. A draw that lacks one of their classes has no F1 of it.
    """
    true = [int(str(e.gold[-1])[1:]) for e in examples]
    pred = [int(r.answers[-1][1:]) if r.answers[-1] else 9 for r in rollouts]  # 9: no verdict, a class outside the averages
    absent: dict[str, Any] = {"zero_division": 0}
    scores: dict[str, Any] = {
        "class_f1": f1_score(true, pred, labels=[1, 2, 3, 4], average=None, **absent).tolist(),  # pyright: ignore
        "macro_f1": float(f1_score(true, pred, labels=[1, 2, 3, 4], average="macro", **absent)),
        "good_f1": float(f1_score([t >= 3 for t in true], [p in (3, 4) for p in pred], **absent)),
        "accuracy": sum(t == p for t, p in zip(true, pred, strict=True)) / len(true),
        "parse_rate": sum(None not in r.answers for r in rollouts) / len(rollouts),
        "step_accuracy": [],
    }
    right: list[list[bool | None]] = [[] for _ in rollouts]
    for j in range(5):
        for row, rollout, example in zip(right, rollouts, examples, strict=True):
            reference = example.gold[j] or example.truth[j]
            row.append(None if reference is None else rollout.answers[j] == reference)
        known = [row[j] for row in right if row[j] is not None]
        scores["step_accuracy"].append(sum(map(bool, known)) / len(known) if known else None)
    kinds = []
    for row, t, p in zip(right, true, pred, strict=True):
        steps = [value for value in row[:4] if value is not None]
        if steps:
            kinds.append(SHARES[2 * (t != p) + (not all(steps))])
    lost = {int(str(e.gold[-1])[1:]) for e in drawn_from} - set(true)
    for grade in lost:
        scores["class_f1"][grade - 1] = scores["macro_f1"] = None
    if {3, 4} & lost and not {3, 4} & set(true):
        scores["good_f1"] = None
    scores["consistency"] = {kind: kinds.count(kind) / len(kinds) if kinds else None for kind in SHARES}
    scores["num_checked"] = len(kinds)
    scores["num_fully_checked"] = sum(None not in row[:4] for row in right)
    return scores


def flat(scores: dict[str, Any]) -> dict[str, float | None]:
    """Flat dict of scores, with keys such as "class_f1/0" and "consistency/verdict_right_steps_right"."""
    single = {key: scores[key] for key in ("macro_f1", "accuracy", "good_f1", "parse_rate")}
    single |= {f"{key}/{i}": value for key in ("class_f1", "step_accuracy") for i, value in enumerate(scores[key])}
    shares = scores["consistency"] or dict.fromkeys(SHARES)
    return single | {f"consistency/{kind}": shares[kind] for kind in SHARES}


def slow_interval(values: Sequence[float | None], level: float) -> list[float] | None:
    """Quantiles [low, high] of the values other than None, with linear interpolation; None if no value is left."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    ends = []
    for q in ((1 - level) / 2, (1 + level) / 2):
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        ends.append(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
    return ends
