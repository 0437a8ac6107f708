"""Importance weights and the mismatch metrics, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from srpo.policy.parallel import Parallel
from srpo.training.mismatch import Mismatch, importance_weights, quantile

ONE = Parallel(0, 1, 0, torch.device("cpu"))


class Ranks(Parallel):
    """Several ranks in one process: the test supplies the sums of their reductions."""

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.__dict__.setdefault("seen", []).append(tensor)
        return self.__dict__["totals"].pop(0) if self.__dict__.get("totals") else tensor


def test_weights_by_hand() -> None:
    ratios = torch.tensor([0.1, 0.5, 0.9, 1.0, 1.9, 2.0, 2.1, 50.0])
    gap = ratios.log()
    torch.testing.assert_close(importance_weights(gap, "truncate", 2.0), ratios.clamp(max=2.0))
    assert importance_weights(gap, "mask", 2.05).tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
    assert importance_weights(torch.zeros(3), "truncate", 1.0).tolist() == [1, 1, 1]
    assert importance_weights(torch.tensor([1e4, -1e4]), "truncate", 3.0).tolist() == pytest.approx([3.0, 0.0])
    assert not importance_weights(gap.requires_grad_(), "truncate", 2.0).requires_grad


@pytest.mark.parametrize("seed", range(20))
def test_the_quantile_is_numpy_s_nearest_rank(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 3000))
    values = np.exp(rng.normal(size=size) * rng.choice([1e-7, 0.1, 5.0])).astype(np.float32)
    if seed % 3 == 0:
        values = np.round(values, 1)  # ties, and zeros
    q = float(rng.choice([0.01, 0.5, 0.9, 0.99, 1.0]))
    want = np.quantile(values, q, method="inverted_cdf")
    assert quantile(torch.from_numpy(values), q, ONE) == want, (size, q)


def test_the_quantile_over_ranks() -> None:
    """One process with all values records the sums that two ranks' reductions would give."""
    rng = np.random.default_rng(3)
    shares = [torch.from_numpy(rng.random(n, dtype=np.float32)) for n in (500, 40)]
    together = torch.cat(shares)
    want = quantile(together, 0.99, ONE)
    recorder = Ranks(0, 1, 0, torch.device("cpu"))
    quantile(together, 0.99, recorder)
    totals = recorder.__dict__["seen"]
    for share in shares:
        rank = Ranks(0, 2, 0, torch.device("cpu"))
        rank.__dict__["totals"] = list(totals)
        assert quantile(share, 0.99, rank) == want
    assert want == np.quantile(together.numpy(), 0.99, method="inverted_cdf")


@pytest.mark.parametrize("kind", ["off", "truncate", "mask"])
def test_metrics_over_micro_batches(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    gap = rng.normal(size=777) * 0.5
    sampling = rng.normal(size=777).astype(np.float32)
    trainer = (sampling + gap).astype(np.float32)
    gap = (trainer - sampling).astype(np.float64)
    mismatch = Mismatch(kind, 1.5, torch.device("cpu"))
    for part in np.array_split(np.arange(777), 5):
        mismatch.add(torch.from_numpy(trainer[part]), torch.from_numpy(sampling[part]))
    mismatch.add(torch.zeros(0), torch.zeros(0))
    got, ratio = mismatch.metrics(ONE), np.exp(gap)
    want = {
        "rollout/mismatch_kl": (ratio - 1 - gap).mean(),
        "rollout/mismatch_max": np.abs(gap).max(),
        "rollout/mismatch_ratio_mean": ratio.mean(),
        "rollout/mismatch_ratio_p99": np.quantile(ratio, 0.99, method="inverted_cdf"),
        "rollout/mismatch_ratio_max": ratio.max(),
    }
    if kind != "off":
        outside = ratio > 1.5 if kind == "truncate" else (ratio > 1.5) | (ratio < 1 / 1.5)
        want["rollout/importance_clip_frac"] = outside.mean()
    assert got == pytest.approx(want, rel=1e-5)


def test_nothing_and_infinity() -> None:
    assert Mismatch("mask", 2.0, torch.device("cpu")).metrics(ONE) == {}  # no tokens, no values
    far = Mismatch("off", 2.0, torch.device("cpu"))
    far.add(torch.tensor([0.0]), torch.tensor([-200.0]))
    assert far.metrics(ONE)["rollout/mismatch_ratio_max"] == pytest.approx(math.exp(20.0))
