"""Scores of a judge, step by step (5.3, Table 2): agreement with annotators, precision and recall on wrong steps, calibration.

Pure functions of verdicts and numbers. A verdict is True (correct), False (incorrect) or None (missing, or not judged).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from srpo.rewards.judge import Verdicts


def judge_scores(
    verdicts: Sequence[Verdicts],
    truths: Sequence[Verdicts],
    shares: Sequence[Sequence[float | None]],
    step_names: Sequence[str],
    num_bins: int = 10,
) -> dict[str, Any]:
    """`{num_responses, steps: {name: scores}}`, JSON-able; the judge's verdicts, truths and shares are [N][J].

    truths are an annotator's verdicts; only steps that have one are scored, `num` of them. Scores per step:
    `agreement` (Table 2; a missing verdict does not agree), `num_missing`, `incorrect_precision` and `incorrect_recall` of
    the verdict "incorrect" (None if the denominator is 0), and `calibration` of `shares`, the judge's probability of "correct".
    A verdict given as a probability counts as "correct" from 0.5 on.
    ValueError for lists of different length, or no responses.
    """
    if not verdicts or not len(verdicts) == len(truths) == len(shares):
        raise ValueError(
            f"{len(verdicts)} verdicts, {len(truths)} of annotators, {len(shares)} shares: give one of each per response"
        )
    steps: dict[str, Any] = {}
    for j, name in enumerate(step_names):
        rows = [(_as_bool(v[j]), t[j], s[j]) for v, t, s in zip(verdicts, truths, shares, strict=True) if t[j] is not None]
        steps[name] = _step_scores([r[0] for r in rows], [bool(r[1]) for r in rows])
        known = [(s, bool(t)) for _, t, s in rows if s is not None]
        steps[name]["calibration"] = calibration([s for s, _ in known], [t for _, t in known], num_bins)
    return {"num_responses": len(verdicts), "steps": steps}


def _as_bool(verdict: bool | float | None) -> bool | None:
    return None if verdict is None else verdict >= 0.5


def _step_scores(verdicts: Sequence[bool | None], truth: Sequence[bool]) -> dict[str, Any]:
    rejected = [t for v, t in zip(verdicts, truth, strict=True) if v is False]
    num_caught, num_wrong = rejected.count(False), truth.count(False)
    agreed = sum(v is t for v, t in zip(verdicts, truth, strict=True))
    return {
        "num": len(truth),
        "agreement": _ratio(agreed, len(truth)),
        "num_missing": sum(v is None for v in verdicts),
        "num_incorrect": num_wrong,
        "incorrect_precision": _ratio(num_caught, len(rejected)),
        "incorrect_recall": _ratio(num_caught, num_wrong),
    }


def _ratio(part: int, total: int) -> float | None:
    return part / total if total else None


def calibration(probabilities: Sequence[float], outcomes: Sequence[bool], num_bins: int = 10) -> dict[str, Any]:
    """`{ece, brier, num, bins}` of predicted probabilities [N] against outcomes [N].

    `bins` are the reliability table: `[{low, high, num, probability, frac_correct}]`, bins of equal width, closed above (the
    first one on both sides), empty ones left out. `ece` is the mean over N of |probability - frac_correct| of the bin, `brier`
    the mean squared error; both None if N is 0. ValueError for a probability outside 0..1, lists of different length, or no bin.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if p.shape != y.shape or num_bins < 1:
        raise ValueError(
            f"{len(p)} probabilities, {len(y)} outcomes, {num_bins} bins: give one outcome per probability, a bin or more"
        )
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"probabilities run from {p.min()} to {p.max()}: give numbers from 0 to 1")
    if not len(p):
        return {"ece": None, "brier": None, "num": 0, "bins": []}
    edges = np.linspace(0, 1, num_bins + 1)
    index = np.searchsorted(edges[1:-1], p)
    bins = [
        {
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "num": int((index == b).sum()),
            "probability": float(p[index == b].mean()),
            "frac_correct": float(y[index == b].mean()),
        }
        for b in sorted(set(index.tolist()))
    ]
    ece = sum(b["num"] * abs(b["probability"] - b["frac_correct"]) for b in bins) / len(p)
    return {"ece": ece, "brier": float(np.square(p - y).mean()), "num": len(p), "bins": bins}


def vote_shares(votes: Sequence[Sequence[Verdicts]]) -> list[tuple[float | None, ...]]:
    """[N][J] share of "correct" among the sampled verdicts on each step, without missing ones; None if all are missing.

    votes: [N][V][J].
    """
    return [tuple(_share([v for v in step if v is not None]) for step in zip(*several, strict=True)) for several in votes]


def _share(verdicts: Sequence[bool | float]) -> float | None:
    return sum(v >= 0.5 for v in verdicts) / len(verdicts) if verdicts else None


SCORE_ROWS = (
    ("agreement", "agreement, %"),
    ("incorrect_precision", "incorrect: precision, %"),
    ("incorrect_recall", "incorrect: recall, %"),
    ("ece", "calibration error, %"),
    ("num_missing", "verdicts missing"),
    ("num_incorrect", "incorrect steps"),
    ("num", "steps judged by annotators"),
)


def judge_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Table 2 with more scores: a column per step; per score one line for each stage in `scores` (name -> `judge_scores`)."""
    first = next(iter(scores.values()))["steps"]
    rows = [["", "", *first]]
    for key, title in SCORE_ROWS:
        for stage, result in scores.items():
            cells = [_cell(key, s["calibration"] if key == "ece" else s) for s in result["steps"].values()]
            rows.append([title, stage, *cells])
            title = ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(key: str, scores: Mapping[str, Any]) -> str:
    value = scores[key]
    return "-" if value is None else str(value) if key.startswith("num") else f"{100 * value:.1f}"


def reliability_table(result: Mapping[str, Any]) -> str:
    """Reliability of one stage as text: for each bin of the probability of "correct", the share correct per step."""
    lines = ["says correct with  " + "  ".join(f"{name:>24}" for name in result["steps"])]
    tables = [{(b["low"], b["high"]): b for b in s["calibration"]["bins"]} for s in result["steps"].values()]
    for low, high in sorted({edges for table in tables for edges in table}):
        bins = [table.get((low, high)) for table in tables]
        cells = ["-" if b is None else f"{100 * b['frac_correct']:.1f} % of {b['num']}" for b in bins]
        lines.append(f"{100 * low:3.0f} to {100 * high:3.0f} %      " + "  ".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)
