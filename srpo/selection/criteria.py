"""Selection of training examples from their records: rejection sampling (4.1.1), balance (4.1.2), judge scores (5.5).

Memory per example is about 60 bytes, the numbers of `Scores`; texts and ids are not kept.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np

from srpo.core.config.selection import Criteria
from srpo.core.errors import UserError
from srpo.data.strata import values_of
from srpo.selection.records import Record

REASONS = (
    "selected",
    "ungradable",  # no step of any response could be graded
    "uniform_right",  # all responses of the group earn the same rewards and are right
    "uniform_wrong",
    "too_easy",
    "too_hard",
    "not_judged",  # `score` needs the judge, and the judge graded no step
    "not_chosen_by_score",
    "over_quota",
)
_SELECTED = REASONS.index("selected")
_ELIGIBLE = 255  # not decided yet

Stratum = tuple[str, ...]  # values of the tags of `Criteria.balance`


@dataclass(frozen=True)
class Scores:
    """The numbers of each example that selection reads, in the order of the data; NaN if nothing was graded for it."""

    solve_rate: np.ndarray  # [N]
    verdict_accuracy: np.ndarray  # [N]
    judge_score: np.ndarray  # [N]
    disagreement: np.ndarray  # [N] share of responses whose verdict and steps contradict each other
    uniform: np.ndarray  # [N] bool: all responses of the group have the same step rewards
    draw: np.ndarray  # [N] uint64, hash of (seed, example_id): order among equal ranks
    stratum: np.ndarray  # [N] index into strata
    strata: tuple[Stratum, ...]  # in the order of the data


@dataclass(frozen=True)
class Selection:
    """The examples kept, and why the others are not."""

    reasons: np.ndarray  # [N] uint8, index into REASONS
    quotas: dict[Stratum, int]  # number of examples wanted from each stratum
    shortfall: dict[Stratum, int]  # number that a stratum lacks; empty unless short = "take_all"

    @property
    def keep(self) -> np.ndarray:
        """[N] bool: selected."""
        return self.reasons == _SELECTED


def collect_scores(records: Iterable[Record], balance: Sequence[str], seed: int) -> Scores:
    """The scores of a stream of records. UserError if a record lacks a tag of `balance`, or the stream is empty."""
    codes: dict[Stratum, int] = {}
    columns: list[np.ndarray] = []
    rows: list[tuple[float, ...]] = []
    draws: list[np.ndarray] = []
    pending: list[int] = []
    for record in records:
        code = codes.setdefault(values_of(record.tags, balance, f"example {record.example_id}"), len(codes))
        rows.append((*_numbers(record), record.num_reward_patterns == 1, code))
        pending.append(_draw(seed, record.example_id))
        if len(rows) == 4096:  # as arrays: lists of Python numbers take ten times the memory
            columns.append(np.array(rows, dtype=np.float64))
            draws.append(np.array(pending, dtype=np.uint64))
            rows, pending = [], []
    columns.append(np.array(rows, dtype=np.float64).reshape(-1, 6))
    draws.append(np.array(pending, dtype=np.uint64))
    table = np.concatenate(columns)
    if not len(table):
        raise UserError("there are no records to select from: check data.train")
    solve, verdict, judge, disagreement, uniform, code = table.T
    return Scores(solve, verdict, judge, disagreement, uniform > 0, np.concatenate(draws), code.astype(np.int32), tuple(codes))


def _numbers(record: Record) -> tuple[float, float, float, float]:
    fracs = (record.right_verdict_wrong_steps_frac, record.wrong_verdict_right_steps_frac)
    disagreement = None if fracs[0] is None or fracs[1] is None else fracs[0] + fracs[1]
    numbers = (record.solve_rate, record.verdict_accuracy, record.judge_score, disagreement)
    solve, verdict, judge, disagreement = (math.nan if value is None else value for value in numbers)
    return solve, verdict, judge, disagreement


def _draw(seed: int, example_id: str) -> int:
    key = f"{seed}|{example_id}".encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def select(scores: Scores, criteria: Criteria) -> Selection:
    """The selection by `criteria`, the same for any order of the examples.

    UserError if no example is left, if `score` needs the judge and no step was judged, or, with `short` "error", if a stratum
    has too few examples; the message names each such stratum and how many it lacks.

    Paper: 4.1.1 drops groups that are "either entirely correct or entirely incorrect" because their advantage is zero; here a
    group is dropped by default if all its responses earn the same reward in every step. 5.5 does not say by which score the
    reward model selects; `score` sets it, and the draw breaks ties.
    """
    reasons = reject(scores, criteria)
    left = np.bincount(scores.stratum[reasons == _ELIGIBLE], minlength=len(scores.strata))
    available = {value: int(n) for value, n in zip(scores.strata, left, strict=True)}
    if not any(available.values()):
        raise UserError(_nothing_left(reasons, criteria))
    quotas = quotas_of(available, criteria)
    shortfall = {value: n - available.get(value, 0) for value, n in quotas.items() if n > available.get(value, 0)}
    if shortfall and criteria.short == "error":
        raise UserError(_too_few(quotas, available, criteria))
    lost = REASONS.index("over_quota" if criteria.score == "none" else "not_chosen_by_score")
    rank = _rank(scores, criteria.score)
    for code, value in enumerate(scores.strata):
        members = np.flatnonzero((reasons == _ELIGIBLE) & (scores.stratum == code))
        members = members[np.lexsort((scores.draw[members], rank[members]))]
        reasons[members[: quotas.get(value, 0)]] = _SELECTED
        reasons[members[quotas.get(value, 0) :]] = lost if quotas.get(value, 0) else REASONS.index("over_quota")
    if not (reasons == _SELECTED).any():
        raise UserError("the quotas leave no example: raise select.num_examples, select.keep_frac or select.quotas")
    return Selection(reasons, quotas, shortfall)


def rates(scores: Scores, criteria: Criteria) -> np.ndarray:
    """The solve rate of each example that `difficulty_score` chooses, [N]; NaN if nothing was graded."""
    return scores.solve_rate if criteria.difficulty_score == "total" else scores.verdict_accuracy


def reject(scores: Scores, criteria: Criteria) -> np.ndarray:
    """Rejection sampling (4.1.1): the reason each example is dropped, [N] uint8 index into REASONS; 255 if it passes."""
    rate = rates(scores, criteria)
    uniform, right = scores.uniform, np.where(np.isnan(scores.verdict_accuracy), rate, scores.verdict_accuracy) >= 0.5
    if criteria.uniform == "verdict":
        uniform = (scores.verdict_accuracy == 0) | (scores.verdict_accuracy == 1)
    if criteria.uniform == "keep":
        uniform = np.zeros_like(scores.uniform)
    tests = {
        "ungradable": np.isnan(rate),
        "uniform_right": uniform & right,
        "uniform_wrong": uniform & ~right,
        "too_easy": rate >= criteria.difficulty_high,
        "too_hard": rate <= criteria.difficulty_low,
        "not_judged": np.isnan(_rank(scores, criteria.score)),
    }
    reasons = np.full(len(rate), _ELIGIBLE, dtype=np.uint8)
    for name, failed in tests.items():
        reasons[failed & (reasons == _ELIGIBLE)] = REASONS.index(name)
    return reasons


def _rank(scores: Scores, score: str) -> np.ndarray:
    """[N] sort key, lowest first; NaN if the score is unknown."""
    if score == "none":
        return np.zeros(len(scores.draw))
    return {
        "best": -scores.judge_score,
        "uncertain": np.abs(scores.judge_score - 0.5),
        "disagree": -scores.disagreement,
    }[score]


def quotas_of(available: Mapping[Stratum, int], criteria: Criteria) -> dict[Stratum, int]:
    """Number of examples wanted from each stratum; `available` is the number each has.

    Without `quotas` every combination of the values that occur has an equal share, even if no example has that combination.
    Without a total each share is the size of the smallest stratum that is not empty; without `balance` it is all examples.
    UserError for a quota of a stratum that does not occur.
    """
    total = criteria.num_examples
    if criteria.keep_frac:
        total = max(1, math.floor(criteria.keep_frac * sum(available.values()) + 0.5))
    if criteria.quotas:
        named = {"/".join(value): value for value in available}
        for name in criteria.quotas:
            if name not in named:
                near = difflib.get_close_matches(name, named, n=1)
                raise UserError(
                    f"select.quotas names {name!r}, a stratum without examples: use {', '.join(sorted(named)[:20])}"
                    + (f"; the nearest is {near[0]!r}" if near else "")
                )
        shares = {named[name]: quota for name, quota in criteria.quotas.items()}
        return apportion(total, shares) if total else {value: int(quota) for value, quota in shares.items()}
    seen = [sorted(set(values)) for values in zip(*available, strict=True)]
    cells = list(product(*seen))
    if total:
        return apportion(total, dict.fromkeys(cells, 1.0))
    smallest = min(n for n in available.values() if n)
    return dict.fromkeys(cells, smallest)


def apportion(total: int, shares: Mapping[Stratum, float]) -> dict[Stratum, int]:
    """`total` split in proportion to `shares` by largest remainders; equal remainders go to the first in sorted order."""
    exact = {value: Fraction(repr(float(share))) for value, share in sorted(shares.items())}  # 0.1 is a tenth
    sum_of_shares = sum(exact.values())
    wanted = {value: total * share / sum_of_shares for value, share in exact.items()}
    split = {value: math.floor(want) for value, want in wanted.items()}
    for value in sorted(wanted, key=lambda v: split[v] - wanted[v])[: total - sum(split.values())]:
        split[value] += 1
    return split


def check_quotas(counts: Counter[Stratum], criteria: Criteria) -> None:
    """Raise UserError if the quotas cannot be met even without rejections. With `keep_frac` the total is not known yet."""
    if criteria.keep_frac:
        return
    quotas = quotas_of(counts, criteria)
    if criteria.short == "error" and any(n > counts[value] for value, n in quotas.items()):
        raise UserError(_too_few(quotas, counts, criteria))


def stratum_name(value: Stratum) -> str:
    """Name of a stratum in settings and reports: "negation/L4"; "all" without balance."""
    return "/".join(value) or "all"


def _too_few(quotas: Mapping[Stratum, int], available: Mapping[Stratum, int], criteria: Criteria) -> str:
    short = {value: (n, available.get(value, 0)) for value, n in quotas.items() if n > available.get(value, 0)}
    lacks = [f"{stratum_name(v)} has {have} of {want} ({want - have} short)" for v, (want, have) in sorted(short.items())]
    by = f"select.balance = {list(criteria.balance)}" if criteria.balance else "select.num_examples"
    return (
        f"{by} cannot be met: {', '.join(lacks[:10])}{', ...' if len(lacks) > 10 else ''}. Lower select.num_examples or "
        'select.quotas, give more data, or set select.short = "take_all"'
    )


def _nothing_left(reasons: np.ndarray, criteria: Criteria) -> str:
    counts = Counter(REASONS[code] for code in reasons.tolist())
    reason_counts = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in REASONS if counts[name])
    fix = "widen select.difficulty_low and difficulty_high, raise rollout.group_size, or start from another policy"
    if counts["not_judged"]:
        fix = f"select.score {criteria.score!r} needs steps that a judge grades: set reward.judge and the steps' sources"
    return f"rejection sampling leaves none of {len(reasons)} examples ({reason_counts}): {fix}"
