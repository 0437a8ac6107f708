"""Results of evaluated responses: the paper's offline metrics (5.1.2), the accuracy of each step, and confidence intervals.

Paper: it is silent on responses without a readable verdict. We count them as a fifth predicted class that is never right: a miss
of the true class, and a false alarm of no class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srpo.core.batch import Rollout
from srpo.core.config.evaluation import BootstrapConfig, EvaluateConfig
from srpo.core.errors import UserError
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.scores.bootstrap import cluster_sums, percentile_interval, resampled_sums
from srpo.scores.tally import CONSISTENCY, Layout, confusion_of, consistency_counts, scores, tally, verdict_scores

COLLAPSED = 0.95  # share of one grade among the verdicts from which `collapse` warns
Results = Mapping[str, Any]  # a dict of `results_dict`; `results.json` holds one under before and one under after


def results_dict(
    rollouts: Sequence[Rollout],
    examples: Sequence[Example],
    schema: StepSchema,
    *,
    by: Sequence[str] = ("query_type",),
    bootstrap: BootstrapConfig | None = None,
) -> dict[str, Any]:
    """The results of an evaluation, JSON-able; rollout i answers example i.

    `{macro_f1, accuracy, good_f1, class_f1: [C], step_accuracy: [J], parse_rate, num_examples}`, scores as fractions (the
    accuracy of a step is None if no example has a reference for it), and

    - `confusion: [C][C + 1]`: true grade, predicted grade (the last column: no verdict);
    - `majority: {grade, accuracy, macro_f1}`: the most common human grade, and the scores of always answering it; `top_verdict:
      {grade, share}`: the most common verdict and its share of the responses that have one (None without any);
    - `consistency`: the four shares of `tally.CONSISTENCY` over the `num_examples` responses with a reference for a step before
      the verdict; all steps with a reference must be right. `num_fully_checked` of them have a reference for each of these steps.
      None if no response has any;
    - `by: {tag: {value: the same}}` for each tag of `by` that an example carries, `untagged: {tag: examples without it}`;
    - with `bootstrap`, `confidence`: `{level, num_draws, seed, num_queries}` and, under the name of each score, its interval
      [low, high] over queries, in the same shape as the score; None without an interval, as for a single query.

    Raises UserError if there are no examples or a pair has no grade, ValueError if rollouts and examples are of different pairs.
    """
    if [r.example_id for r in rollouts] != [e.example_id for e in examples]:
        raise ValueError("rollouts and examples are of different pairs: give one rollout per example, in the same order")
    if not examples:
        raise UserError("there are no examples to evaluate: give at least one graded pair")
    counts = tally(rollouts, examples, schema)

    def of(rows: Sequence[int]) -> dict[str, Any]:
        queries = [examples[i].query_id for i in rows]
        return _results(counts[list(rows)], Layout.of(schema), schema.grades.names, queries, bootstrap)

    results = {**of(range(len(examples))), "by": {}, "untagged": {}}
    for tag, parts in parts_by(examples, by).items():
        results["by"][tag] = {value: of(rows) for value, rows in parts.items()}
        results["untagged"][tag] = len(examples) - sum(map(len, parts.values()))
    return results


def parts_by(examples: Sequence[Example], by: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """{tag: {value: indices of the examples that carry it}}, values sorted, for each tag of `by` that any example carries."""
    parts: dict[str, dict[str, list[int]]] = {}
    for tag in by:
        values = sorted({example.tags[tag] for example in examples if tag in example.tags})
        if values:
            parts[tag] = {v: [i for i, example in enumerate(examples) if example.tags.get(tag) == v] for v in values}
    return parts


def _results(
    counts: NDArray[np.int64], at: Layout, names: Sequence[str], queries: Sequence[str], bootstrap: BootstrapConfig | None
) -> dict[str, Any]:
    total = counts.sum(0)
    point = {key: _known(value.tolist()) for key, value in scores(total, at).items()}
    num_checked, num_fully_checked = consistency_counts(total, at)
    shares = dict(zip(CONSISTENCY, point.pop("consistency"), strict=True))
    return {
        **{key: point[key] for key in ("macro_f1", "accuracy", "good_f1", "class_f1", "step_accuracy", "parse_rate")},
        "num_examples": len(counts),
        "confusion": confusion_of(total, at).tolist(),
        **_most_common(confusion_of(total, at), at, names),
        "consistency": {**shares, "num_examples": num_checked, "num_fully_checked": num_fully_checked} if num_checked else None,
        **({"confidence": _confidence(counts, at, queries, bootstrap)} if bootstrap and bootstrap.num_draws else {}),
    }


def _most_common(confusion: NDArray[np.int64], at: Layout, names: Sequence[str]) -> dict[str, Any]:
    """`majority` and `top_verdict` of `results_dict`; the better grade of two that are equally common."""
    true, said = confusion.sum(1), confusion.sum(0)[:-1]
    common, top = (len(names) - 1 - int(np.argmax(numbers[::-1])) for numbers in (true, said))
    always = np.zeros_like(confusion)
    always[:, common] = true
    scored = verdict_scores(always, at.good)
    return {
        "majority": {"grade": names[common], **{key: float(scored[key]) for key in ("accuracy", "macro_f1")}},
        "top_verdict": {"grade": names[top], "share": float(said[top] / said.sum())} if said.sum() else None,
    }


def collapse(results: Results) -> str:
    """A sentence if nearly all verdicts are the same grade and the human grades are not; "" otherwise."""
    top, confusion = results["top_verdict"], np.asarray(results["confusion"])
    if top is None or top["share"] < COLLAPSED:
        return ""
    column = int(confusion.sum(0)[:-1].argmax())
    true_share = confusion[column].sum() / confusion.sum()
    if true_share > COLLAPSED - 0.1:
        return ""
    return (
        f"{100 * top['share']:.0f} % of the verdicts are {top['grade']}, the grade of {100 * true_share:.0f} % of the pairs: the "
        "policy no longer tells grades apart. Balance the demonstrations and sampler.balance by grade, or lower optimizer.lr"
    )


def _known(value: Any) -> Any:
    """The value with NaN replaced by None."""
    if isinstance(value, list):
        return [_known(item) for item in value]
    return None if value != value else value


def _confidence(counts: NDArray[np.int64], at: Layout, queries: Sequence[str], bootstrap: BootstrapConfig) -> dict[str, Any]:
    sums = cluster_sums(counts, queries)
    drawn = scores(resampled_sums(sums, bootstrap), at, sums.sum(0))
    settings = {"level": bootstrap.level, "num_draws": bootstrap.num_draws, "seed": bootstrap.seed, "num_queries": len(sums)}
    return {**settings, **shaped(drawn, lambda draws: percentile_interval(draws, bootstrap.level))}


def shaped(drawn: Mapping[str, NDArray[np.float64]], summary: Any) -> dict[str, Any]:
    """`summary` applied to the draws [D] of each score, in the shape that the scores have in `results_dict`."""
    shapes = {
        key: summary(draws) if draws.ndim == 1 else [summary(column) for column in draws.T]
        for key, draws in drawn.items()
        if key != "consistency"
    }
    columns = zip(CONSISTENCY, drawn["consistency"].T, strict=True)
    return {**shapes, "consistency": {name: summary(column) for name, column in columns}}


SCORE_NAMES = {"good_f1": "Good F1", "accuracy": "Accuracy", "macro_f1": "Macro F1"}
CONSISTENCY_NAMES = ("Verdict, steps right", "Only verdict right", "Only steps right", "Neither right")


def score_rows(schema: StepSchema, *results: Results) -> list[tuple[str, list[Any]]]:
    """(name, its value in each of `results`) of every score, in the order of the paper's Table 1, then the steps; fractions.

    Takes the `confidence` of results, too: the values are then intervals.
    """
    names: list[tuple[str, str, int | None]] = [
        (f"Class {schema.grades.title(i)} F1", "class_f1", i) for i in range(len(schema.grades.names))
    ]
    names += [(name, key, None) for key, name in SCORE_NAMES.items()]
    names += [(f"S{j} {spec.name.replace('_', ' ')}", "step_accuracy", j - 1) for j, spec in enumerate(schema.specs, start=1)]
    names += [("Responses that parse", "parse_rate", None)]
    return [(name, [r[key] if index is None else r[key][index] for r in results]) for name, key, index in names]


def consistency_rows(*results: Results) -> list[tuple[str, list[Any]]]:
    """(name, its value in each of `results`) of the consistency shares; no rows if no result has them."""
    shares = [r.get("consistency") or {} for r in results]
    if not any(shares):
        return []
    return [(name, [s.get(key) for s in shares]) for name, key in zip(CONSISTENCY_NAMES, CONSISTENCY, strict=True)]


def check_tags(tags: Iterable[Mapping[str, str]], by: Sequence[str]) -> None:
    """Raise UserError for a tag of `by`, other than the default one, that is in none of `tags` (of examples or queries)."""
    known = sorted({tag for carried in tags for tag in carried})
    for tag in by:
        if tag not in known and tag not in EvaluateConfig.by:
            raise UserError(f"by: nothing carries the tag {tag!r}; tags of the data: {', '.join(known) or 'none'}")
