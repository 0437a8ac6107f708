"""Every op in plain torch autograd: the specification that all other implementations are tested against, and the fallback.

The math is fp32 for logits of 16 or 32 bits and fp64 for fp64 logits. Labelled rows are selected before any computation, so the
contents of ignored rows (NaN included) reach neither a result nor a gradient. Nothing is written in place.

Shapes: T rows, R labelled rows, V vocabulary, K kept ids, C candidates of the softmax, N sequences, J reasoning steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from srpo_kernels.options import LossOptions
from srpo_kernels.segments import IGNORE, PolicyLoss, StepStats, Tables, scatter, step_of_row

# exp(20) = 4.9e8: neither a ratio nor a k3 term can overflow, nor the square of its gradient in a global norm. Log ratios up to
# the bound are unchanged; above it the exponential is constant and has no gradient. Underflow is harmless: no bound from below.
MAX_LOG_RATIO = 20.0
_CACHED = 2**18  # number of elements of a temporary that fits into a CPU's cache


def policy_loss(logits: torch.Tensor, tables: Tables, options: LossOptions, top_k: int | None) -> PolicyLoss:
    """See `srpo_kernels.policy_loss`."""
    labels, step_ends, temperature = tables.labels, tables.step_ends, options.temperature
    num_rows = labels.shape[0]
    rows = (labels != IGNORE).nonzero()[:, 0]
    logits, labels = _select(logits, rows), _select(labels, rows)
    support = _support(logits, labels, rows, top_k, tables.kept_ids)
    log_p = _candidates(logits, temperature, support).log_softmax(1)  # [R, C]
    logprobs = _of_label(log_p, labels, support)  # [R]

    sequence, step = step_of_row(tables.cu_seqlens, step_ends, rows)
    advantages = tables.step_advantages.detach().to(log_p.dtype)[sequence, step]
    old = logprobs.detach() if tables.old_logprobs is None else _constant(tables.old_logprobs, rows, log_p.dtype)
    ratio = at_most(logprobs - old, MAX_LOG_RATIO).exp()  # Eq. 6: rho_{i,t} = pi_theta / pi_theta_old
    # min(ratio A, clip(ratio) A) bounds the ratio from above where A > 0 and from below where A < 0. Dual clip also bounds it
    # from above where A < 0.
    low, high = 1 - options.clip_eps_low, 1 + options.clip_eps_high
    if options.clip_form == "cispo":
        bounded = ratio.detach().clamp(low, high)
        terms = torch.where(advantages == 0, 0, -bounded * advantages * logprobs)
    else:
        raised = at_most(at_least(ratio, low), math.inf if options.dual_clip is None else options.dual_clip)
        bounded = torch.where(advantages > 0, at_most(ratio, high), raised)
        terms = -bounded * advantages  # Eq. 6: -min(r A, clip(r, 1-eps, 1+eps) A)

    if tables.ref_logits is not None:
        kl = _full_kl(log_p, _candidates(_select(tables.ref_logits.detach(), rows), temperature, support).log_softmax(1))
    elif tables.ref_logprobs is not None:
        kl = _sampled_kl(logprobs - _constant(tables.ref_logprobs, rows, log_p.dtype), options.kl_estimator)
    else:
        kl = torch.zeros_like(logprobs)
    if options.kl_coef:
        terms = terms + options.kl_coef * kl  # Eq. 6: beta * D_KL[pi_theta || pi_ref]

    stats = StepStats.sum_rows(
        step,
        step_ends.shape[1],
        num_clipped=(bounded != ratio) & (advantages != 0),
        num_outside_support=torch.zeros_like(labels) if support is None else support.outside,
        sum_ratio=ratio,
        sum_kl=kl,
        sum_entropy=_entropy(log_p.detach()),
    )
    # Eq. 6: 1/G sum_i 1/|o_i| sum_t. The caller decides on the denominators and passes them as the weight of each token.
    loss = (_constant(tables.weights, rows, log_p.dtype) * terms).sum()
    return PolicyLoss(loss, scatter(logprobs.detach(), rows, num_rows), stats)


def token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    top_k: int | None,
    kept_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `srpo_kernels.token_logprobs`."""
    num_rows = labels.shape[0]
    rows = (labels != IGNORE).nonzero()[:, 0]
    logits, labels = _select(logits, rows), _select(labels, rows)
    support = _support(logits, labels, rows, top_k, kept_ids)
    candidates = _candidates(logits, temperature, support)
    logprobs = _of_label(candidates.log_softmax(1), labels, support)
    return scatter(logprobs, rows, num_rows), scatter(candidates.logsumexp(1), rows, num_rows)


def at_most(x: torch.Tensor, bound: float) -> torch.Tensor:
    """x, bounded from above; an x on the bound keeps its gradient. From torch 2.14 on that of `clamp` is 0 there."""
    return torch.where(x > bound, bound, x)


def at_least(x: torch.Tensor, bound: float) -> torch.Tensor:
    """x, bounded from below; see `at_most`."""
    return torch.where(x < bound, bound, x)


class _Support(NamedTuple):
    """Candidates of a filtered softmax: the label first, then the kept ids. The label is therefore always in its own support."""

    ids: torch.Tensor  # [R, C] with C = 1 + K
    blank: torch.Tensor  # [R, C] bool: the label's second copy, or padding
    outside: torch.Tensor  # [R] bool: the label is not among the kept ids


def _support(
    logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, top_k: int | None, kept_ids: torch.Tensor | None
) -> _Support | None:
    """Candidates of the selected rows; None without a filter. `kept_ids` covers all rows."""
    if kept_ids is not None:
        kept = _select(kept_ids, rows).to(torch.int64)
    elif top_k:
        kept = topk_support(logits, top_k)
    else:
        return None
    label = labels[:, None]
    blank = torch.nn.functional.pad((kept == label) | (kept < 0), (1, 0))
    return _Support(torch.cat([label, kept.clamp(min=0)], 1), blank, (kept != label).all(1))


def topk_support(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """See `srpo_kernels.topk_support`."""
    return logits.detach().topk(min(top_k, logits.shape[1]), 1).indices


def _candidates(logits: torch.Tensor, temperature: float, support: _Support | None) -> torch.Tensor:
    """Logits of the candidates divided by the temperature, [R, C] in the dtype of the math; -inf where blank."""
    if support is not None:
        logits = logits.gather(1, support.ids)
    scaled = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if temperature != 1:
        scaled = scaled / temperature
    return scaled if support is None else scaled.masked_fill(support.blank, -torch.inf)


def _of_label(log_p: torch.Tensor, labels: torch.Tensor, support: _Support | None) -> torch.Tensor:
    """The label's entry of each row, [R]."""
    return log_p.gather(1, labels[:, None])[:, 0] if support is None else log_p[:, 0]


def _sampled_kl(log_ratio: torch.Tensor, estimator: str) -> torch.Tensor:
    """KL(pi || pi_ref) estimated from log(pi / pi_ref) of the sampled token, [R]."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    inverse = at_most(-log_ratio, MAX_LOG_RATIO)
    return torch.expm1(inverse) - inverse


def _full_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Exact KL(p || q) of each row, [R]. Candidates with p = 0 contribute nothing and get no gradient."""
    return (log_p.exp() * (log_p - log_q).masked_fill(log_p == -torch.inf, 0)).sum(1)


def _entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Entropy of each row, [R]; without gradient. Takes a few rows at a time, so that temporaries stay in a CPU's cache."""
    num_rows = max(1, (_CACHED if log_p.device.type == "cpu" else 64 * _CACHED) // max(log_p.shape[1], 1))
    lowest = torch.finfo(log_p.dtype).min  # replaces -inf, so that p log p is 0 rather than NaN where p is 0
    return -torch.cat([torch.linalg.vecdot(part.exp(), part.clamp(min=lowest)) for part in log_p.split(num_rows)])


def _select(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The labelled rows of a tensor; the tensor itself, without a copy, if all rows are labelled."""
    return tensor if rows.shape[0] == tensor.shape[0] else tensor.index_select(0, rows)


def _constant(tensor: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The labelled rows of a tensor, detached, in the given dtype."""
    return _select(tensor.detach(), rows).to(dtype)
