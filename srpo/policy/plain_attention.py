"""Attention of one short sequence in three matrix products, for a CPU in bf16.

Torch's flash attention goes through small tiles, and its backward through one head at a time. Up to some 500 rows a whole matrix
of scores is small enough for the caches, and products of bf16 have the rate of all others. All heads that share a key-value head
are the rows of one product.
Letters: L rows, D width of queries and keys, W width of values, M key-value heads, B rows of all heads that share one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor
) -> torch.Tensor:
    """softmax(scale * query key^T + bias) value, [L, heads, W] in the dtype of the inputs; differentiable once.

    query [L, heads, D], key [L, M, D], value [L, M, W]; bias [L, L] fp32 or fp64, 0 or -inf, for all heads. Scores and softmax
    are at least fp32, as in flash attention; the probabilities are rounded to the dtype of the inputs, also for the gradient.
    """
    return _Plain.apply(query, key, value, scale, bias)  # pyright: ignore[reportReturnType]


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        query, key, value, scale, bias = inputs
        length, heads, num_shared = *query.shape[:2], key.shape[1]
        q, k, v = (_by_shared(x, num_shared) for x in (query, key, value))
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = torch.bmm(q.to(exact) * scale, k.to(exact).mT)
        scores.view(heads, length, length).add_(bias)
        probs = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, probs)
        ctx.scale, ctx.heads = scale, heads
        return _by_head(torch.bmm(probs, v), heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, probs = ctx.saved_tensors
        exact = torch.promote_types(q.dtype, torch.float32)
        grad = _by_shared(upstream[0], len(k))
        of_probs = torch.bmm(grad, v.mT).to(exact).mul_(probs)
        of_scores = (of_probs - of_probs.sum(-1, keepdim=True) * probs).mul_(ctx.scale).to(q.dtype)
        of_query, of_key = torch.bmm(of_scores, k), torch.bmm(of_scores.mT, q)
        of_value = torch.bmm(probs.mT, grad)
        return _by_head(of_query, ctx.heads), _by_head(of_key, len(k)), _by_head(of_value, len(k)), None, None


def _by_shared(x: torch.Tensor, num_shared: int) -> torch.Tensor:
    """[L, heads, D] -> [M, B, D], the rows of one head after another's."""
    return x.unflatten(1, (num_shared, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[M, B, D] -> [L, heads, D], a view."""
    return x.unflatten(1, (heads // len(x), -1)).permute(2, 0, 1, 3).flatten(1, 2)
