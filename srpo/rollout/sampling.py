"""Chooses one token per row of logits: temperature, top-k, inverse transform sampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_BLOCK = 64  # a long distribution is searched by blocks, so that its full cumulative sum is never stored
_BELOW_ONE = 1 - 2**-53


def choose(
    logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, top_k: int, greedy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One token per row from softmax(logits / temperature) restricted to its top_k tokens (0: all).

    Returns (token ids [S], their log-probabilities [S] fp32, ids [S, K] that top-k kept, unsorted, None if nothing is filtered).
    logits: [S, V] fp32, overwritten. uniforms: [S] float64 in [0, 1), one per row, so a row's token does not depend on the other
    rows. A token of probability 0 is never chosen.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    ids = None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k, dim=-1, sorted=False)
    probs = logits.softmax(-1)
    choice = logits.argmax(-1) if greedy else _draw(probs, uniforms)
    logprobs = probs.gather(-1, choice[:, None])[:, 0].log()
    return (choice if ids is None else ids.gather(-1, choice[:, None])[:, 0]), logprobs, ids


def _draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Index [S] with probability proportional to weights [S, V], by inverse transform of uniforms [S]."""
    num_rows, size = weights.shape
    if size <= 4 * _BLOCK:
        return _invert(weights, uniforms)[0]
    blocks = F.pad(weights, (0, -size % _BLOCK)).view(num_rows, -1, _BLOCK)
    block, uniforms = _invert(blocks.sum(-1), uniforms)
    inner, _ = _invert(blocks[torch.arange(num_rows, device=weights.device), block], uniforms)
    return (block * _BLOCK + inner).clamp(max=size - 1)  # NaN is found in the padding


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(index whose interval of the cumulative distribution contains the uniform, its position in it, 0 to 1), both [S]."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    target = uniforms[:, None] * cdf[:, -1:]
    index = torch.searchsorted(cdf, target, right=True).clamp(max=weights.shape[-1] - 1)  # NaN is found past the end
    behind = (cdf.gather(-1, index) - target) / weights.gather(-1, index)
    return index[:, 0], (1 - behind[:, 0]).clamp(0.0, _BELOW_ONE)
