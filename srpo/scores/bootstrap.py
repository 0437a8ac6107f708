"""Bootstrap intervals over clusters: queries are resampled with all their pairs, instead of single pairs.

Pairs of one query share its difficulty, so resampling pairs as if they were independent would make intervals too narrow. A score
must be a function of sums of counts: a draw is then one product of a matrix of multiplicities with the sums of the clusters.

Letters of shapes: N rows (responses), Q clusters (queries), D draws, K counts.

Paper: it reports no uncertainty. We take percentile intervals, 2,000 draws, 95 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from srpo.core.config.evaluation import BootstrapConfig

Interval = list[float]  # [low, high]

_CHUNK = 1 << 20  # multiplicities held in memory at a time: 8 MB, independent of the data


def cluster_sums(rows: NDArray[np.integer] | NDArray[np.floating], clusters: Sequence[str]) -> NDArray[np.float64]:
    """Sums [Q, K] of `rows` [N, K] over the rows of each cluster, clusters in the order of their first row.

    `clusters` [N] names the cluster of each row. Raises ValueError if `rows` is empty or the lengths differ.
    """
    if not len(rows) or len(rows) != len(clusters):
        raise ValueError(f"{len(rows)} rows and {len(clusters)} cluster names: give one name per row, and at least one row")
    index: dict[str, int] = {}
    numbers = np.array([index.setdefault(name, len(index)) for name in clusters])
    order = np.argsort(numbers, kind="stable")
    starts = np.searchsorted(numbers[order], np.arange(len(index)))
    return np.add.reduceat(np.asarray(rows, dtype=np.float64)[order], starts, axis=0)


def multiplicities(num_clusters: int, settings: BootstrapConfig) -> Iterator[NDArray[np.float64]]:
    """How often each draw contains each cluster: arrays [d, Q] whose d add up to `settings.num_draws`; each row sums to Q.

    Each draw takes the next Q numbers of `numpy.random.default_rng(seed).integers(Q)`. The draws depend on the seed and Q only,
    so two systems that are scored on the same queries are scored on the same draws.
    """
    generator = np.random.default_rng(settings.seed)
    chunk = max(1, _CHUNK // num_clusters)
    for first in range(0, settings.num_draws, chunk):
        num_draws = min(chunk, settings.num_draws - first)
        drawn = generator.integers(num_clusters, size=(num_draws, num_clusters))
        drawn += np.arange(num_draws)[:, None] * num_clusters
        counts = np.bincount(drawn.ravel(), minlength=num_draws * num_clusters)
        yield counts.reshape(num_draws, num_clusters).astype(np.float64)


def resampled_sums(sums: NDArray[np.float64], settings: BootstrapConfig) -> NDArray[np.float64]:
    """Totals [D, K] over the clusters of each draw, from the `cluster_sums` [Q, K]. Sums of counts are exact.

    D is 0 if `settings.num_draws` is 0, and for fewer than two clusters, which do not show how scores vary over clusters.
    """
    if len(sums) < 2 or not settings.num_draws:
        return np.zeros((0, sums.shape[1]))
    return np.concatenate([counts @ sums for counts in multiplicities(len(sums), settings)])


def percentile_interval(draws: NDArray[np.float64], level: float) -> Interval | None:
    """[low, high] of the middle `level` of the draws [D]. NaN draws, which had nothing to score, are left out; None if no draw
    remains."""
    defined = draws[~np.isnan(draws)]
    return np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]).tolist() if defined.size else None
