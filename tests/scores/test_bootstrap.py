from __future__ import annotations

import random

import numpy as np
import pytest

import srpo.scores.bootstrap
from srpo.core.config.evaluation import BootstrapConfig
from srpo.core.ranges import check_ranges
from srpo.scores.bootstrap import cluster_sums, multiplicities, percentile_interval, resampled_sums


@pytest.mark.parametrize("seed", range(5))
def test_cluster_sums_equal_a_loop(seed: int):
    rng = random.Random(seed)
    names = [rng.choice("abcdefg") for _ in range(rng.randint(1, 40))]
    rows = np.array([[rng.randint(0, 5) for _ in range(3)] for _ in names])
    expected: dict[str, list[int]] = {}
    for name, row in zip(names, rows.tolist(), strict=True):
        expected[name] = [a + b for a, b in zip(expected.get(name, [0, 0, 0]), row, strict=True)]
    assert cluster_sums(rows, names).tolist() == list(expected.values())


def test_draws_are_the_generators_next_numbers_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch):
    settings = BootstrapConfig(num_draws=23, seed=5)
    generator = np.random.default_rng(5)
    drawn = [generator.integers(7, size=7).tolist() for _ in range(23)]
    expected = [[float(draw.count(cluster)) for cluster in range(7)] for draw in drawn]
    for chunk in (1, 20, 50, 1 << 20):
        monkeypatch.setattr(srpo.scores.bootstrap, "_CHUNK", chunk)
        assert np.concatenate(list(multiplicities(7, settings))).tolist() == expected
    sums = np.random.default_rng(0).integers(0, 9, (7, 3)).astype(float)
    np.testing.assert_array_equal(
        resampled_sums(sums, settings), [[sum(sums[c, k] for c in draw) for k in range(3)] for draw in drawn]
    )


def test_interval_interpolates_and_leaves_out_draws_without_a_value():
    assert percentile_interval(np.array([3.0, np.nan, 1.0, 2.0, 5.0, 4.0]), 0.5) == [2.0, 4.0]
    assert percentile_interval(np.array([1.0, 2.0]), 0.9) == pytest.approx([1.05, 1.95])
    assert percentile_interval(np.array([np.nan, np.nan]), 0.9) is None
    assert percentile_interval(np.zeros(0), 0.9) is None


def test_one_cluster_or_no_draws_give_no_draws():
    assert resampled_sums(np.ones((1, 3)), BootstrapConfig()).shape == (0, 3)
    assert resampled_sums(np.ones((5, 3)), BootstrapConfig(num_draws=0)).shape == (0, 3)


@pytest.mark.parametrize("seed", range(3))
def test_intervals_over_queries_cover_the_truth_and_those_over_pairs_do_not(seed: int):
    """50 queries of 12 pairs; the judge's accuracy varies over queries, 0.6 on average."""
    rng = np.random.default_rng(seed)
    settings = BootstrapConfig(num_draws=300)
    names = [f"q{i}" for i in range(50) for _ in range(12)]
    covered = {"queries": 0, "pairs": 0}
    for _ in range(200):
        right = rng.random(600) < np.repeat(rng.beta(0.9, 0.6, 50), 12)
        for unit, clusters in (("queries", names), ("pairs", [str(i) for i in range(600)])):
            drawn = resampled_sums(cluster_sums(right[:, None].astype(int), clusters), settings)[:, 0] / 600
            interval = percentile_interval(drawn, 0.95)
            assert interval is not None
            covered[unit] += interval[0] <= 0.6 <= interval[1]
    assert 0.88 <= covered["queries"] / 200 <= 0.995  # 0.95, up to the noise of 200 trials of 50 queries
    assert covered["pairs"] / 200 < 0.75


@pytest.mark.parametrize("changes", [{"num_draws": -1}, {"seed": -1}, {"level": 0.0}, {"level": 1.0}, {"level": 95.0}])
def test_settings_that_cannot_be_are_refused(changes: dict[str, float]):
    with pytest.raises(ValueError, match=rf"bootstrap\.{next(iter(changes))} is"):
        check_ranges(BootstrapConfig(**changes), prefix="bootstrap.")  # pyright: ignore[reportArgumentType]


def test_rows_and_names_have_to_agree():
    for rows, names in ((np.zeros((0, 2)), []), (np.zeros((3, 2)), ["a"])):
        with pytest.raises(ValueError, match="one name per row"):
            cluster_sums(rows, names)
