"""`selection.json` and its tables: how many examples were kept, why the others were not, and the strata before and after."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from srpo.core.config.selection import Criteria
from srpo.core.tables import percent, text_table
from srpo.selection.criteria import REASONS, Scores, Selection, stratum_name
from srpo.selection.records import Record

_NUM_BINS = 10


def report_of(scores: Scores, selection: Selection, criteria: Criteria, records: Iterable[Record], output: str) -> dict[str, Any]:
    """The content of `selection.json`. `records` are those from which `scores` was collected."""
    keep = selection.keep
    before, after = (np.bincount(scores.stratum[mask], minlength=len(scores.strata)) for mask in (slice(None), keep))
    counted = {value: (int(b), int(a)) for value, b, a in zip(scores.strata, before, after, strict=True)}
    rows = [(value, *counted.get(value, (0, 0))) for value in sorted(counted.keys() | selection.quotas.keys())]
    totals = np.zeros(4, dtype=np.int64)
    for record in records:
        totals += (record.num_responses, record.num_different, record.num_verdicts, record.num_no_verdict)
    return {
        "output": output,
        "num_examples": len(keep),
        "num_selected": int(keep.sum()),
        "reasons": {name: int((selection.reasons == code).sum()) for code, name in enumerate(REASONS)},
        "balance": list(criteria.balance),
        "strata": {
            stratum_name(value): {
                "before": num_before,
                "quota": selection.quotas.get(value, 0),
                "after": num_after,
                "short": selection.shortfall.get(value, 0),
            }
            for value, num_before, num_after in rows
        },
        "solve_rate": {
            "edges": [i / _NUM_BINS for i in range(_NUM_BINS + 1)],
            "before": _histogram(scores.solve_rate),
            "after": _histogram(scores.solve_rate[keep]),
        },
        "mean": {
            name: {"before": _mean(values), "after": _mean(values[keep])}
            for name, values in (
                ("solve_rate", scores.solve_rate),
                ("verdict_accuracy", scores.verdict_accuracy),
                ("judge_score", scores.judge_score),
                ("disagreement", scores.disagreement),
            )
        },
        "num_responses": int(totals[0]),
        "num_different_responses": int(totals[1]),
        "num_verdicts": int(totals[2]),
        "num_no_verdict": int(totals[3]),
        "criteria": {**asdict(criteria), "balance": list(criteria.balance)},
    }


def report_json(report: dict[str, Any]) -> str:
    """The text of `selection.json`."""
    return json.dumps(report, indent=1) + "\n"


def report_text(report: dict[str, Any]) -> str:
    """The report as text tables."""
    num_examples = report["num_examples"]
    reasons = [(name.replace("_", " "), f"{n:,}", percent(n / num_examples)) for name, n in report["reasons"].items()]
    blocks = [text_table(("", "examples", "percent"), [reasons])]
    if report["balance"]:
        rows = [(name, *(f"{row[key]:,}" for key in _COLUMNS)) for name, row in report["strata"].items()]
        blocks.append(text_table((" x ".join(report["balance"]), *_COLUMNS), [rows]))
    edges, histogram = report["solve_rate"]["edges"], report["solve_rate"]
    bins = zip(edges, edges[1:], histogram["before"], histogram["after"], strict=False)
    counts = [(f"{low:.1f} - {high:.1f}", f"{before:,}", f"{after:,}") for low, high, before, after in bins]
    means = [(name.replace("_", " "), percent(m["before"]), percent(m["after"])) for name, m in report["mean"].items()]
    short = sum(row["short"] for row in report["strata"].values())
    notes = [f"{short:,} fewer than the quotas ask for"] if short else []
    notes.append(f"{report['num_selected']:,} of {num_examples:,} examples written to {report['output']}")
    blocks.append(text_table(("solve rate", "before", "after"), [counts]))
    blocks.append(text_table(("mean, percent", "before", "after"), [means], notes))
    return "\n\n".join(blocks)


_COLUMNS = ("before", "quota", "after", "short")


def _histogram(values: np.ndarray) -> list[int]:
    """Counts in ten equal bins of 0..1; a rate of 1 falls into the last bin, NaN into none."""
    known = values[~np.isnan(values)]
    return np.bincount(np.minimum((known * _NUM_BINS).astype(int), _NUM_BINS - 1), minlength=_NUM_BINS).tolist()


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
