"""The mismatch between the trainer's distribution and the one that was sampled, and the importance weights that correct it.

R is the number of sampled tokens; `gap` [R] is the trainer's log-probability before the update minus the engine's, both on the
distribution that was sampled. With equal weights of trainer and engine the gap is rounding; it is larger if the engine's weights
are one step older.
"""

from __future__ import annotations

import math

import torch

from srpo.policy.parallel import Parallel

_MAX_GAP = 20.0  # bound of log ratios, as in the loss, against overflow


def importance_weights(gap: torch.Tensor, kind: str, cap: float) -> torch.Tensor:
    """Factors of the tokens' weights in the loss, [R] fp32, without gradient; ratio = exp(gap).

    "truncate": min(ratio, cap), truncated importance sampling. "mask": 1 if 1/cap <= ratio <= cap, else 0.
    Paper: samples from the policy that it updates, so the ratio is 1 there.
    """
    gap = gap.detach().float()
    if kind == "truncate":
        return gap.clamp(max=math.log(cap)).exp()
    assert kind == "mask", kind
    return (~_outside(gap, kind, cap)).float()


def _outside(gap: torch.Tensor, kind: str, cap: float) -> torch.Tensor:
    """[R] bool: tokens whose weight is bounded ("truncate") or set to 0 ("mask")."""
    gap = gap.detach().float()
    bound = math.log(cap)
    return gap > bound if kind == "truncate" else gap.abs() > bound


class Mismatch:
    """Accumulates the gap over the micro-batches of one update. kind, cap: as for `importance_weights`, or kind "off"."""

    def __init__(self, kind: str, cap: float, device: torch.device) -> None:
        self._kind, self._cap, self._device = kind, cap, device
        self._kl = torch.zeros((), dtype=torch.float64, device=device)
        self._largest = torch.zeros((), dtype=torch.float64, device=device)
        self._gaps: list[torch.Tensor] = []

    def add(self, trainer: torch.Tensor, sampling: torch.Tensor) -> None:
        """Add the log-probabilities [R] of one micro-batch, by the trainer and by the engine."""
        if trainer.numel():
            gap = (trainer - sampling).double()
            self._kl += (torch.expm1(gap) - gap).sum()
            self._largest = torch.maximum(self._largest, gap.abs().max())
            self._gaps.append(gap.float())

    def metrics(self, parallel: Parallel) -> dict[str, float]:
        """The `rollout/mismatch_*` and `rollout/importance_*` metrics over all ranks, none without tokens. Collective."""
        gaps = torch.cat(self._gaps) if self._gaps else torch.zeros(0, device=self._device)
        ratios = gaps.clamp(max=_MAX_GAP).exp()
        outside = _outside(gaps, self._kind, self._cap).sum() if self._kind != "off" else torch.zeros((), device=self._device)
        sums = torch.stack([self._kl, ratios.double().sum(), outside.double(), self._kl.new_tensor(float(gaps.numel()))])
        kl, ratio, num_outside, num_tokens = parallel.all_reduce_sum(sums).tolist()
        if not num_tokens:
            return {}
        largest = torch.stack([self._largest, ratios.double().max() if ratios.numel() else self._largest.new_zeros(())])
        largest_gap, largest_ratio = parallel.all_reduce_max(largest).tolist()
        metrics = {
            "rollout/mismatch_kl": kl / num_tokens,
            "rollout/mismatch_max": largest_gap,
            "rollout/mismatch_ratio_mean": ratio / num_tokens,
            "rollout/mismatch_ratio_p99": quantile(ratios, 0.99, parallel),
            "rollout/mismatch_ratio_max": largest_ratio,
        }
        return metrics | ({"rollout/importance_clip_frac": num_outside / num_tokens} if self._kind != "off" else {})


def quantile(values: torch.Tensor, q: float, parallel: Parallel) -> float:
    """The smallest value that at least a fraction `q` of all ranks' values does not exceed; at least one rank has a value. Exact.

    values: [R] fp32, not negative, not NaN. The bit patterns of such numbers have the same order as the numbers, so two summed
    histograms, of the upper and then of the lower 16 bits, find the value without gathering all values. Collective.
    """
    bits = values.contiguous().view(torch.int32).long()
    counts = parallel.all_reduce_sum(torch.bincount(bits >> 16, minlength=1 << 15)).cumsum(0)
    rank = max(1, math.ceil(q * int(counts[-1]) - 1e-9))
    upper = int(torch.searchsorted(counts, rank))
    below = int(counts[upper - 1]) if upper else 0
    lower = torch.bincount(bits[(bits >> 16) == upper] & 0xFFFF, minlength=1 << 16)
    place = int(torch.searchsorted(parallel.all_reduce_sum(lower).cumsum(0), rank - below))
    return float(torch.tensor((upper << 16) | place, dtype=torch.int32).view(torch.float32))
