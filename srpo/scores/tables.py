"""Tables of scores: one system, or one before and after training."""

from __future__ import annotations

from collections.abc import Sequence

from srpo.core.steps import StepSchema
from srpo.core.tables import percent, text_table
from srpo.scores.evaluation import Results, consistency_rows, score_rows


def before_after_table(before: Results, after: Results, schema: StepSchema) -> str:
    """The table of all scores before and after training, in percent, with intervals if known, and the change in points.

    "-" stands for an unknown score.
    """
    cells = _cells(schema, before, after)
    changes = [
        "-" if first is None or last is None else percent(last - first, signed=True)
        for rows in (score_rows(schema, before, after), consistency_rows(before, after))
        for _, (first, last) in rows
    ]
    rows = [(*row, change) for row, change in zip(cells, changes, strict=True)]
    notes = [*_majority_notes(after), f"percent, {after['num_examples']:,} held-out pairs{_interval_note(after)}"]
    return text_table(("", "before", "after", "change"), _parted(rows, schema), notes)


def results_table(results: Results, schema: StepSchema) -> str:
    """The table of all scores in percent, with intervals if known.

    It has a column for all pairs and one for each value of the tags in `results["by"]`. Columns beyond 130 characters continue
    below.
    """
    columns = {"all": results}
    for tag, parts in results.get("by", {}).items():
        columns |= {f"{tag} {value}" if value in columns else value: part for value, part in parts.items()}
    parted = _parted(_cells(schema, *columns.values()), schema)
    counts = ("pairs", *(f"{part['num_examples']:,}" for part in columns.values()))
    notes = [f"percent{_interval_note(results)}", *_majority_notes(results)]
    notes += [f"{number:,} pairs have no tag {tag}" for tag, number in results.get("untagged", {}).items() if number]
    if checked := results.get("consistency"):
        notes.append(f"consistency: over the {checked['num_examples']:,} pairs whose steps before the verdict can be checked")
    return text_table(("", *columns), [*parted, [counts]], notes)


def _majority_notes(results: Results) -> list[str]:
    """The scores of always answering the most common grade, the share of the most common verdict, and the scores of ranking."""
    if "majority" not in results:  # results of an earlier version
        return []
    majority, top, ranking = results["majority"], results["top_verdict"], results.get("ranking")
    always = f"accuracy {percent(majority['accuracy'])}, macro F1 {percent(majority['macro_f1'])}"
    notes = [f"always answering {majority['grade']}: {always}"]
    if top is not None:
        notes[0] += f"; the most common verdict is {top['grade']}, {percent(top['share'])} of them"
    if ranking:
        shown = {"NDCG by expected grade": "ndcg_expected", "by the best grade": "ndcg_best", "AUC of the best grade": "auc_best"}
        scores = ", ".join(f"{name} {percent(ranking[key])}" for name, key in shown.items())
        notes.append(f"ranking by probabilities: {scores} ({ranking['num_ranked_queries']:,} queries)")
    return notes


def _cells(schema: StepSchema, *results: Results) -> list[tuple[str, ...]]:
    """Rows of all scores and shares: (name, one cell per result)."""
    rows = [*score_rows(schema, *results), *consistency_rows(*results)]
    intervals = []  # for each result: {name of the row: [interval]}
    for result in results:
        confidence = result.get("confidence")
        intervals.append(dict([*score_rows(schema, confidence), *consistency_rows(confidence)]) if confidence else {})
    return [
        (name, *(percent(value, named.get(name, [None])[0]) for value, named in zip(values, intervals, strict=True)))
        for name, values in rows
    ]


def _parted(rows: Sequence[Sequence[str]], schema: StepSchema) -> list[Sequence[Sequence[str]]]:
    """The rows in three parts: the scores of Table 1; the accuracy of the steps and the parse rate; consistency."""
    num_verdict = len(schema.grades.names) + 3
    num_scores = num_verdict + schema.num_steps + 1
    return [rows[:num_verdict], rows[num_verdict:num_scores], rows[num_scores:]]


def _interval_note(results: Results) -> str:
    confidence = results.get("confidence")
    if not confidence:
        return ""
    draws = f"{confidence['num_draws']:,} draws of {confidence['num_queries']:,} queries"
    return f"; in brackets {100 * confidence['level']:g} % intervals from {draws}"
