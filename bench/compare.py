"""Has a result of bench/ become worse?   python bench/compare.py OLD.json NEW.json

Reads two files that the same benchmark wrote with `--json`, or two tables of srpo.reproduce, pairs the measurements that have the
same name and prints old, new, their ratio and the noise. Durations and sizes should not rise, rates and scores should not fall.

Noise is relative: the quartile range of the rounds or seeds if the file holds them, the distance from minimum to median if it
holds the minimum, else 15 %; the larger value of the two files counts, and at least 5 %, because two runs differ more than the
rounds within one. Other packages and bounds are listed, but do not change the exit code.

Exit code 0: nothing is worse beyond noise. 1: something is, or an arm of ours failed in NEW. 2: the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srpo.core.tables import text_table

DEFAULT_NOISE = 0.15  # of a measurement without its rounds
MIN_NOISE = 0.05


@dataclass(frozen=True)
class Unit:
    """How to judge a change: `sign` is 1 if larger values are worse; changes of less than `floor` are none."""

    sign: int
    worse: str
    better: str
    floor: float = 0.0


_TIME, _RATE, _SCORE = Unit(1, "slower", "faster"), Unit(-1, "slower", "faster"), Unit(-1, "lower", "higher")
# A key belongs to the first unit that it equals or ends with, after an underscore.
UNITS = {"per_s": _RATE, "s": _TIME, "ms": _TIME, "minutes": Unit(1, "slower", "faster", floor=1.0)}
UNITS |= {"bytes": Unit(1, "larger", "smaller", floor=1e6)}
UNITS |= {"false_l4": Unit(1, "higher", "lower", floor=3.0)}
UNITS |= dict.fromkeys(("true_l4", "f1", "accuracy", "parse_rate", "gap", "end", "test", "mean"), _SCORE)
SPREADS = {"median_ms": "min_ms", "step_s": "steps_s", "mean": "values"}  # key -> its minimum, or the list of its rounds or seeds
NAMES = ("name", "policy", "pairs", "lines", "attack", "arm", "form", "in_place", "dtype", "tokens", "vocab", "hidden", "top_k")
NAMES += ("size", "group_size", "seed")
SETTINGS = ("table", "workload", "loss", "scale", "seeds", "num_parameters", "num_train", "num_test")
ABOUT = (
    "machine",
    "environment",
    "versions",
    "commit",
    "command",
    "commands",
    "rounds",
)  # may differ: the output lists the differences
# The last two lines: numbers of the paper, derived numbers (some negative), and baselines that should not score high.
NOT_COMPARED = {*SETTINGS, *ABOUT, *SPREADS.values(), "paper", "order", "std", "gap_mean", "test_gap_mean", "curves"}
NOT_COMPARED |= {"words", "words_and_pairs"}
UNNAMED = ("results", "rows", "runs", "ours", "mean")  # keys that would only lengthen the name of a measurement


@dataclass(frozen=True)
class Measurement:
    """One number of a result file; `noise` is None if the file has neither rounds nor minimum, `ours` is False for other packages
    and for bounds."""

    value: float
    unit: Unit
    noise: float | None
    ours: bool


def measurements(data: Any, name: str = "", unit: Unit | None = None, ours: bool = True) -> Iterator[tuple[str, Measurement]]:
    """(name, measurement) of every number in a part of a result file whose key, or a key above it, has a unit."""
    if isinstance(data, dict):
        parts = [(key, part) for key, part in data.items() if key not in NOT_COMPARED and key not in NAMES]
    else:
        parts = [(label(part) or str(index), part) for index, part in enumerate(data)]
    for key, part in parts:
        its_name = name if key in UNNAMED else f"{name} {key}".strip()
        its_unit = unit_of(key) or unit
        if isinstance(part, (dict, list)):
            arm = part.get("arm", "srpo/") if isinstance(part, dict) else "srpo/"
            yield from measurements(part, its_name, its_unit, ours and key != "trl" and arm.startswith("srpo/"))
        elif its_unit and isinstance(part, (int, float)) and not isinstance(part, bool):
            spread = data.get(SPREADS.get(key)) if isinstance(data, dict) else None
            yield its_name, Measurement(part, its_unit, noise(part, spread), ours)


def label(part: Any) -> str:
    """The name of a list's element, from the settings that it was measured with; "" if it has none."""
    known = {key: part[key] for key in NAMES if key in part} if isinstance(part, dict) else {}
    words = [value if isinstance(value, str) else key if value is True else f"{key} {value}" for key, value in known.items()]
    return ", ".join(word for word in words if word not in ("in_place False", "hidden 0", "top_k 0"))


def unit_of(key: str) -> Unit | None:
    """The unit of a key, if it has one."""
    return next((unit for suffix, unit in UNITS.items() if f"_{key}".endswith(f"_{suffix}")), None)


def noise(value: float, spread: Any) -> float | None:
    """Relative noise of a median or mean, from the list of its rounds or from their minimum."""
    if not value or not spread:
        return None
    if isinstance(spread, list):
        if len(spread) == 1:
            return None
        low, _, high = statistics.quantiles(spread, n=4, method="inclusive")
        return (high - low) / abs(value)
    return value / spread - 1


def verdict(old: Measurement, new: Measurement) -> tuple[float, float, str]:
    """(new / old, noise, the word for the change; "" within noise)."""
    known = [m.noise for m in (old, new) if m.noise is not None]
    limit = max(MIN_NOISE, *known) if known else DEFAULT_NOISE
    ratio = new.value / old.value if old.value else 1.0 if not new.value else float("inf")
    if abs(new.value - old.value) <= old.unit.floor or 1 / (1 + limit) <= ratio <= 1 + limit:
        return ratio, limit, ""
    return ratio, limit, old.unit.worse if (ratio > 1) == (old.unit.sign > 0) else old.unit.better


def flat(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested tables."""
    if isinstance(data, dict):
        for name, part in data.items():
            yield from flat(part, f"{key}.{name}" if key else name)
    else:
        yield key, data


def changed(old: dict[str, Any], new: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """One line per value under these top-level keys that differs between the two files."""
    a, b = (dict(flat({key: data[key] for key in keys if key in data})) for data in (old, new))
    return [f"{key}: {a.get(key)} in OLD, {b.get(key)} in NEW" for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, int]:
    """(table and notes, number of our measurements that are worse beyond noise or failed). Raises ValueError if nothing can be
    compared."""
    if problems := changed(old, new, SETTINGS):
        raise ValueError("the files measure different things: " + "; ".join(problems))
    a, b = dict(measurements(old)), dict(measurements(new))
    shared = [name for name in a if name in b]
    if not shared:
        raise ValueError("the files have no measurement in common: are they of the same benchmark?")
    rows, worse = [], 0
    for name in shared:
        ratio, limit, word = verdict(a[name], b[name])
        worse += a[name].ours and word == a[name].unit.worse
        numbers = [f"{m.value:.4g}" for m in (a[name], b[name])]
        change = word if a[name].ours or not word else f"{word} (not srpo)"
        rows.append([name, *numbers, f"{ratio:.3f}", f"{100 * limit:.0f} %", change])
    notes = [f"differs: {line}" for line in changed(old, new, ABOUT)]
    notes += [f"only in {side}: {name}" for side, x, y in (("OLD", a, b), ("NEW", b, a)) for name in x if name not in y]
    notes += [f"failed in NEW: {label(row)}: {row['failed']}" for row in failed(new)]
    ours = sum(a[name].ours for name in shared)
    notes.append(f"worse beyond noise: {worse} of {ours} measurements of srpo")
    worse += sum(row["arm"].startswith("srpo/") for row in failed(new))
    return text_table(["measurement", "old", "new", "new/old", "noise", "change"], [rows], notes), worse


def failed(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The results that an error ended."""
    results = data.get("results")
    rows = results if isinstance(results, list) else []
    return [row for row in rows if isinstance(row, dict) and "arm" in row and row.get("failed")]


def read(path: Path) -> dict[str, Any]:
    """The result file. Raises ValueError for one that is not a JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a result file: it holds no JSON object")
    return data


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="result file to compare with")
    parser.add_argument("new", type=Path, help="result file under test")
    args = parser.parse_args()
    try:
        printed, worse = compare(read(args.old), read(args.new))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(printed)
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
