"""Online metrics of two systems on the same queries (5.1.2, Table 7): GSB, query goodrate and item goodrate.

Paper: "GSB+x % indicates that, in x % of comparisons, the test system is preferred over the baseline". Read literally, GSB is
never negative and ignores lost comparisons, so `gsb` is the net share (good - bad) / comparisons; the shares of good, same and
bad are reported, too. The paper names the two points of a page's four-point scale that count, Good and Mid; we take them as the
upper two. It leaves rating to people; without their ratings and verdicts, `rating_of` and `verdict_of` derive both from the
classes of the shown items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srpo.core.config.evaluation import BootstrapConfig, PagesConfig
from srpo.core.errors import UserError
from srpo.core.grades import Grades
from srpo.scores.bootstrap import resampled_sums
from srpo.scores.pages import RATINGS, VERDICTS, Pages
from srpo.scores.paired import summarized

GOOD_RATINGS = RATINGS[:2]
# Columns [K] of the counts of a query.
_COLUMNS = ("requests", "item_a", "item_b", "page_a", "page_b", *VERDICTS)


def good_frac(classes: Sequence[int], scale: Grades) -> float:
    """Share of items of a good class (3 and 4 of the paper's) on a page."""
    return sum(number - 1 in scale.good_classes for number in classes) / len(classes)


def rating_of(classes: Sequence[int], bounds: Sequence[float], scale: Grades) -> str:
    """Rating of a page without a human rating: good, mid or poor if its share of good items is at least the bound of that
    rating, else bad."""
    share = good_frac(classes, scale)
    return next((rating for rating, bound in zip(RATINGS, bounds, strict=False) if share >= bound), RATINGS[-1])


def verdict_of(grades_a: Sequence[int], grades_b: Sequence[int], margin: float) -> str:
    """Good if the mean class of B's items exceeds A's by more than `margin`, bad if it is lower by more than that, else same."""
    gain = sum(grades_b) / len(grades_b) - sum(grades_a) / len(grades_a)
    return "good" if gain > margin else "bad" if gain < -margin else "same"


def side_by_side(
    pages: Pages,
    grades_a: Mapping[str, Sequence[int]],
    grades_b: Mapping[str, Sequence[int]],
    verdicts: Mapping[str, Sequence[str]] | None,
    settings: PagesConfig,
    tags: Mapping[str, Mapping[str, str]],
    *,
    scale: Grades,
    by: Sequence[str] = ("query_type",),
    bootstrap: BootstrapConfig | None = None,
) -> dict[str, Any]:
    """The online metrics, JSON-able, B against A:

    - `item_goodrate: {a, b, difference, interval, b_higher_frac, equal_frac}`: mean over queries of the share of shown items of
      a good class;
    - `query_goodrate`: the same form, the share of queries whose page is rated good or mid; `ratings_by`: "people", or "item
      classes" if the pages have no rating;
    - `gsb: {gsb, interval, positive_frac, good, same, bad, num_comparisons}`, shares of the comparisons; `verdicts_by`;
    - `num_queries`, `num_short_pages` (fewer than `top_n` items), and `by: {tag: {value: the same metrics}}`.

    grades_a, grades_b: classes of the shown items by query_id; verdicts: human verdicts by query_id, or None; tags: tags by
    query_id. Intervals are paired and over queries. Raises UserError if some pages have a rating and others none.
    """
    rated = {page.rating is not None for page in (*pages.a.values(), *pages.b.values())}
    if len(rated) > 1:
        raise UserError("some pages have a rating and some have none: rate all pages or none")
    rows = []
    for query_id in pages.a:
        both = grades_a[query_id], grades_b[query_id]
        ratings = [
            page.rating or rating_of(grades, settings.rating_bounds, scale)
            for page, grades in zip((pages.a[query_id], pages.b[query_id]), both, strict=True)
        ]
        votes = [verdict_of(*both, settings.verdict_margin)] if verdicts is None else verdicts.get(query_id, ())
        counts = [sum(verdict == name for verdict in votes) for name in VERDICTS]
        rows.append(
            [1, *(good_frac(classes, scale) for classes in both), *(rating in GOOD_RATINGS for rating in ratings), *counts]
        )
    table = np.array(rows, dtype=np.float64)
    results = {
        "ratings_by": "people" if rated == {True} else "item classes",
        "verdicts_by": "item classes" if verdicts is None else "people",
        "num_short_pages": sum(len(page.ids) < settings.top_n for page in (*pages.a.values(), *pages.b.values())),
        **_metrics(table, bootstrap or BootstrapConfig()),
        "by": {},
    }
    for tag in by:
        values = [tags.get(query_id, {}).get(tag) for query_id in pages.a]
        parts = {value: table[[v == value for v in values]] for value in sorted({v for v in values if v is not None})}
        if parts:
            results["by"][tag] = {value: _metrics(part, bootstrap or BootstrapConfig()) for value, part in parts.items()}
    return results


def _metrics(table: NDArray[np.float64], bootstrap: BootstrapConfig) -> dict[str, Any]:
    """The metrics of the counts [Q, K] of queries."""
    totals = np.concatenate([table.sum(0)[None], resampled_sums(table, bootstrap)])  # row 0: all queries, then the draws
    column: dict[str, NDArray[np.float64]] = dict(zip(_COLUMNS, totals.T, strict=True))
    metrics: dict[str, Any] = {"num_queries": len(table)}
    for name in ("item", "page"):
        a, b = (column[f"{name}_{system}"] / column["requests"] for system in "ab")
        summary = summarized(b[0] - a[0], b[1:] - a[1:], bootstrap.level)
        metrics["item_goodrate" if name == "item" else "query_goodrate"] = {"a": float(a[0]), "b": float(b[0]), **(summary or {})}
    compared = column["good"] + column["same"] + column["bad"]
    with np.errstate(invalid="ignore"):  # a draw without compared queries has no GSB
        shares = {name: column[name] / compared for name in VERDICTS}
        gsb = (column["good"] - column["bad"]) / compared
    summary = summarized(gsb[0], gsb[1:], bootstrap.level)
    metrics["gsb"] = summary and {
        "gsb": summary["difference"],
        "interval": summary["interval"],
        "positive_frac": summary["b_higher_frac"],
        **{name: float(share[0]) for name, share in shares.items()},
        "num_comparisons": int(compared[0]),
    }
    return metrics
