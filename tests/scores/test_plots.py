from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from judged_pairs import verdict_results
from matplotlib.figure import Figure

from srpo.core.grades import PAPER_GRADES
from srpo.core.step_presets import PAPER, PAPER_STEPS
from srpo.scores.plots import draw_before_after, draw_confusion, draw_macro_f1, draw_rewards, series, smooth, spread, write_plots

SCHEMA = PAPER


def metrics(num_steps: int) -> list[dict[str, float | None]]:
    rng = random.Random(num_steps)
    lines: list[dict[str, float | None]] = []
    for step in range(1, num_steps + 1):
        line: dict[str, float | None] = {f"reward/step/{s.name}": s.reward * rng.random() for s in PAPER_STEPS}
        lines.append({"step": step, "policy/entropy": rng.random(), "rollout/mismatch_kl": 1e-7 * rng.random(), **line})
    lines[-1]["eval/macro_f1"] = 0.4
    return lines


def results(accuracy: float, steps: list[float | None], none_every: int = 10**9) -> dict[str, Any]:
    rng = random.Random(int(100 * accuracy))
    true = [rng.randint(1, 4) for _ in range(200)]
    pred = [None if i % none_every == 1 else t if rng.random() < accuracy else rng.randint(1, 4) for i, t in enumerate(true)]
    return {**verdict_results(true, pred), "step_accuracy": steps, "parse_rate": 1.0, "num_examples": 200}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("seed", range(20))
def test_spread_keeps_order_gap_and_bounds_and_moves_nothing_needlessly(seed: int):
    rng = random.Random(seed)
    wished = [rng.uniform(-5, 105) for _ in range(rng.randint(1, 8))]
    placed = spread(wished, 7.0, 0, 100)
    order = sorted(range(len(wished)), key=lambda i: wished[i])
    assert all(placed[b] - placed[a] > 7 - 1e-9 for a, b in pairwise(order))
    assert min(placed) > -1e-9
    assert max(placed) < 100 + 1e-9
    assert spread(placed, 7.0, 0, 100) == pytest.approx(placed)
    assert spread([10.0, 50.0], 7.0, 0, 100) == [10.0, 50.0]


@pytest.mark.parametrize("n", [1, 5, 23, 200])
def test_smooth_is_a_mean_that_keeps_constants(n: int):
    values = np.random.default_rng(n).normal(size=n)
    half = n // 24
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(n)]
    np.testing.assert_allclose(smooth(values), expected, atol=1e-12)


def test_series_skips_lines_without_a_number():
    steps, values = series([{"step": 1, "a": 0.5}, {"step": 2}, {"step": 3, "a": None}, {"step": 4, "a": 2.0}], "a")
    assert (steps.tolist(), values.tolist()) == ([1, 4], [0.5, 2.0])


def test_rewards_are_shares_of_what_a_step_can_earn_with_a_name_at_each_line():
    lines: list[dict[str, float | None]] = [{"step": s, "reward/step/item": 0.1, "reward/step/verdict": 0.75} for s in (1, 2)]
    figure = Figure()
    axes = figure.add_subplot()
    draw_rewards(axes, lines, SCHEMA)
    assert texts(figure) == ["item  50 %", "verdict  75 %"]
    assert [np.asarray(line.get_ydata())[0] for line in axes.lines] == pytest.approx([50, 50, 75, 75])


def test_macro_f1_falls_back_to_the_two_ends():
    before, after = results(0.2, [None] * 5), results(0.8, [None] * 5)
    figure = Figure()
    draw_macro_f1(figure.add_subplot(), [{"step": 7}], before, after)
    line = figure.axes[0].lines[0]
    assert np.asarray(line.get_xdata()).tolist() == [0, 7]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([100 * before["macro_f1"], 100 * after["macro_f1"]])


def test_before_after_tells_the_change_in_points_and_leaves_unknown_scores_out():
    before, after = results(0.2, [None, 0.5, 0.5, 0.5, 0.2]), results(0.8, [None, 0.25, 0.75, 0.5, 0.8])
    figure = Figure()
    axes = figure.add_subplot()
    draw_before_after(axes, before, after, SCHEMA)
    names = [label.get_text() for label in axes.get_yticklabels()]
    changes = dict(zip(names, texts(figure), strict=False))
    assert "S1 query intent" not in names
    assert (changes["S2 item"], changes["S3 category match"], changes["S4 attribute match"]) == ("-25.0", "+25.0", "+0.0")


def test_confusion_shows_counts_and_shares_of_the_row():
    figure = Figure()
    draw_confusion(figure.add_subplot(), verdict_results([1, 1, 1, 2], [1, 1, None, 2]), PAPER_GRADES, "", show_unparsed=True)
    shown = texts(figure)
    assert shown[:4] == ["67 %", "2", "0 %", "0"]
    assert shown[8:10] == ["33 %", "1"]
    assert len(shown) == 2 * 4 * 5


@pytest.mark.parametrize(("num_steps", "with_results"), [(30, True), (2, False)])
def test_every_plot_is_written_and_global_style_stays(tmp_path: Path, num_steps: int, with_results: bool):
    style = dict(mpl.rcParams)
    scores = {"before": results(0.2, [0.5] * 5, none_every=9), "after": results(0.6, [0.9] * 5)} if with_results else None
    files = write_plots(tmp_path, metrics(num_steps), SCHEMA, scores, "runs/x")
    names = {"overview", "rewards", "macro_f1", "entropy", "mismatch_kl"} | ({"confusion"} if with_results else set())
    assert {file.stem for file in files} == names
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 5000
    assert dict(mpl.rcParams) == style


@pytest.mark.parametrize("name", ["a$\\foo$b", "x^{$", "$", "100 % \\ $x_1$"])
def test_a_name_is_text_and_no_formula(tmp_path: Path, name: str):
    assert len(write_plots(tmp_path, metrics(3), SCHEMA, None, name)) == 5


def test_plots_of_a_run_that_has_logged_nothing_yet(tmp_path: Path):
    assert len(write_plots(tmp_path, [], SCHEMA)) == 5
