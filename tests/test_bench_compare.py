"""bench/compare.py: the same measurement is found in both files; its unit and its noise decide if a change is for the worse."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
RESULTS = sorted((BENCH / "results").rglob("*.json"))

ROW = {"arm": "srpo/cpu", "form": "logits", "in_place": True, "median_ms": 10.0, "min_ms": 8.0, "peak_extra_bytes": 5_000_000}
LOSS = {"machine": {"threads": 2}, "loss": {"kl_coef": 0.1}, "results": [ROW, ROW | {"arm": "eager", "in_place": False}]}
STEP = {"srpo": {"step_s": 2.0, "steps_s": [1.9, 2.0, 2.1], "completions_per_s": 50.0}, "trl": {"step_s": 4.0}}
SEEDS = {
    "table": "table1",
    "rows": [{"name": "SFT", "ours": {"macro_f1": {"mean": 60.0, "std": 1.0, "values": [60.0, 60.0, 60.0]}}}],
}


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import compare  # pyright: ignore[reportMissingImports]

    return compare


def changed(data: dict[str, Any], *path: str | int, to: Any) -> dict[str, Any]:
    """A copy of the result in which the value at `path` is another."""
    data = deepcopy(data)
    part: Any = data
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    return data


def line(printed: str, name: str) -> list[str]:
    """The cells of a measurement's row after its name."""
    (row,) = [row for row in printed.splitlines() if row.startswith(name + "  ")]
    return row.removeprefix(name).split()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_result_equals_itself(
    path: Path, compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", str(path), str(path)])
    assert compare.main() == 0
    assert "worse beyond noise: 0 of " in capsys.readouterr().out
    names = [name for name, _ in compare.measurements(json.loads(path.read_text(encoding="utf-8")))]
    assert names and len(names) == len(set(names))


@pytest.mark.parametrize(
    ("old", "path", "to", "row", "cells"),
    [
        (LOSS, ("results", 0, "median_ms"), 12.0, "srpo/cpu, logits, in_place median_ms", ["1.200", "50", "%"]),  # 12 / 8
        (LOSS, ("results", 0, "median_ms"), 16.0, "srpo/cpu, logits, in_place median_ms", ["1.600", "100", "%"]),
        (
            LOSS,
            ("results", 0, "peak_extra_bytes"),
            5_900_000,
            "srpo/cpu, logits, in_place peak_extra_bytes",
            ["1.180", "15", "%"],
        ),
        (STEP, ("srpo", "step_s"), 2.09, "srpo step_s", ["1.045", "5", "%"]),
        (STEP, ("srpo", "completions_per_s"), 44.0, "srpo completions_per_s", ["0.880", "15", "%"]),
    ],
)
def test_a_change_within_noise_is_none(
    compare: ModuleType, old: dict[str, Any], path: tuple[str | int, ...], to: float, row: str, cells: list[str]
) -> None:
    printed, worse = compare.compare(old, changed(old, *path, to=to))
    assert worse == 0
    assert line(printed, row)[2:] == cells


@pytest.mark.parametrize(
    ("old", "path", "to", "row", "change"),
    [
        (LOSS, ("results", 0, "peak_extra_bytes"), 8_000_000, "srpo/cpu, logits, in_place peak_extra_bytes", "larger"),
        (STEP, ("srpo", "step_s"), 2.2, "srpo step_s", "slower"),
        (STEP, ("srpo", "completions_per_s"), 40.0, "srpo completions_per_s", "slower"),
        (SEEDS, ("rows", 0, "ours", "macro_f1", "mean"), 50.0, "SFT macro_f1", "lower"),
    ],
)
def test_a_change_for_the_worse_beyond_noise_counts(
    compare: ModuleType, old: dict[str, Any], path: tuple[str | int, ...], to: float, row: str, change: str
) -> None:
    new = changed(old, *path, to=to)
    printed, worse = compare.compare(old, new)
    assert (worse, line(printed, row)[-1]) == (1, change)
    printed, worse = compare.compare(new, old)
    assert (worse, line(printed, row)[-1]) == (0, {"larger": "smaller", "slower": "faster", "lower": "higher"}[change])


def test_rounds_widen_the_noise(compare: ModuleType) -> None:
    """The quartile range of the new rounds is 1.5, of a median of 2.5."""
    new = changed(changed(STEP, "srpo", "steps_s", to=[1.0, 2.5, 4.0]), "srpo", "step_s", to=2.5)
    printed, worse = compare.compare(STEP, new)
    assert worse == 0
    assert line(printed, "srpo step_s")[2:] == ["1.250", "60", "%"]
    assert compare.noise(2.0, [2.0]) is None


def test_other_packages_do_not_change_the_exit_code(compare: ModuleType) -> None:
    printed, worse = compare.compare(STEP, changed(STEP, "trl", "step_s", to=40.0))
    assert worse == 0 and line(printed, "trl step_s")[-3:] == ["slower", "(not", "srpo)"]
    _, worse = compare.compare(LOSS, changed(LOSS, "results", 1, "median_ms", to=400.0))
    assert worse == 0


def test_other_differences_are_listed(compare: ModuleType) -> None:
    new = changed(changed(LOSS, "machine", "threads", to=1), "results", 1, "arm", to="srpo/cuda")
    printed, worse = compare.compare(LOSS, new)
    assert worse == 0
    assert "differs: machine.threads: 2 in OLD, 1 in NEW" in printed
    assert "only in OLD: eager, logits median_ms" in printed and "only in NEW: srpo/cuda, logits median_ms" in printed


def test_an_arm_of_ours_that_failed_is_worse(compare: ModuleType) -> None:
    broken = {"median_ms": None, "min_ms": None, "peak_extra_bytes": None, "failed": "RuntimeError: no such kernel"}
    assert compare.compare(LOSS, changed(LOSS, "results", 1, to=LOSS["results"][1] | broken))[1] == 0
    printed, worse = compare.compare(LOSS, changed(LOSS, "results", 0, to=ROW | broken))
    assert worse == 1
    assert "failed in NEW: srpo/cpu, logits, in_place: RuntimeError: no such kernel" in printed


def test_supports_of_another_size_are_other_measurements(compare: ModuleType) -> None:
    unfiltered, filtered = (changed(LOSS, "results", 0, "top_k", to=value) for value in (0, 20))
    assert "only in" not in compare.compare(LOSS, unfiltered)[0]
    assert "only in NEW: srpo/cpu, logits, in_place, top_k 20 median_ms" in compare.compare(LOSS, filtered)[0]


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (json.dumps(changed(LOSS, "loss", "kl_coef", to=0.2)), "loss.kl_coef: 0.1 in OLD, 0.2 in NEW"),
        (json.dumps({"loss": LOSS["loss"]}), "no measurement in common"),
        ("[]", "is not a result file"),
        ("{", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_files_that_cannot_be_compared(
    compare: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    new: str | None,
    message: str,
) -> None:
    (tmp_path / "old.json").write_text(json.dumps(LOSS), encoding="utf-8")
    if new is not None:
        (tmp_path / "new.json").write_text(new, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert compare.main() == 2
    assert message in capsys.readouterr().err
