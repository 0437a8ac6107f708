"""The support of a top-k filter: the ids of each row's largest logits.

Shapes: T rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels import cuda, reference


def topk_support(logits: Tensor, top_k: int) -> Tensor:
    """Ids of the top-k filter's support, [T, min(top_k, V)] int64, largest logit first; NaN counts as the largest.

    The same for every implementation of a loss but the reference, so that a sampler that filters by these ids and a loss that
    recomputes them agree exactly. Where the CUDA library can be used it reads each row once and takes the smaller ids of equal
    logits; elsewhere, and above 1024 ids, it is torch.topk with its order of equal ones. Raises ValueError if top_k is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}: a support needs at least one id")
    if 0 < min(top_k, logits.shape[1]) <= cuda.MAX_TOP_K and _takes(logits.device, logits.dtype):
        return _top_k(logits.detach(), top_k)
    return reference.topk_support(logits, top_k)


@torch.compiler.assume_constant_result
def _takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the CUDA library takes logits of this device and dtype."""
    return cuda.why_not(torch.empty(0, 1, device=device, dtype=dtype)) is None


@torch.library.custom_op("srpo::top_k", mutates_args=())
def _top_k(logits: Tensor, top_k: int) -> Tensor:
    return cuda.top_k(logits, min(top_k, logits.shape[1]))


@_top_k.register_fake
def _(logits: Tensor, top_k: int) -> Tensor:
    return logits.new_empty(logits.shape[0], min(top_k, logits.shape[1]), dtype=torch.int64)
