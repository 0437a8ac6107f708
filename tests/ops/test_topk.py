"""The sampler's top-k filter inside the ops, against a softmax of masked logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import policy_loss
from srpo_kernels import token_logprobs, topk_support

OPTIONS: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "kl_coef": 0.0, "kl_estimator": "k3", "temperature": 0.99}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("given", [False, True])
def test_top_k_is_the_filtered_softmax(given: bool, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(200, 12, generator=gen, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(12, (200,), generator=gen)
    kept = topk_support(logits, 5)
    keep = torch.zeros(200, 12, dtype=torch.bool).scatter(1, kept, True).scatter(1, labels[:, None], True)
    brute = logits.masked_fill(~keep, -torch.inf).div(0.99).log_softmax(1)
    expected = brute.gather(1, labels[:, None])[:, 0]
    padded = torch.cat([kept, torch.full((200, 2), -1)], 1)
    support: dict[str, Any] = {"kept_ids": padded} if given else {"top_k": 5}
    tables = (torch.ones(1, 1), torch.tensor([[200]]), torch.tensor([0, 200]))
    out = policy_loss(logits, labels, *tables, torch.ones(200), **OPTIONS, **support)
    torch.testing.assert_close(out.logprobs, expected.detach())
    torch.testing.assert_close(torch.autograd.grad(out.loss, logits), torch.autograd.grad(-expected.sum(), logits))
    assert out.stats.num_outside_support.item() == (kept != labels[:, None]).all(1).sum() > 0
    probabilities = brute.detach().exp()
    torch.testing.assert_close(out.stats.sum_entropy.sum(), torch.special.entr(probabilities).sum())


def test_top_k_support_breaks_ties_like_torch_topk_and_stops_at_the_vocabulary() -> None:
    tied = torch.zeros(3, 6)
    assert torch.equal(topk_support(tied, 4), tied.topk(4, 1).indices)
    assert topk_support(tied, 100).shape == (3, 6) and topk_support(tied[:, :0], 2).shape == (3, 0)
    logits, labels = torch.randn(9, 6), torch.randint(6, (9,))
    unfiltered = token_logprobs(logits, labels, temperature=1.0)
    torch.testing.assert_close(token_logprobs(logits, labels, temperature=1.0, top_k=100), unfiltered)
    assert torch.equal(token_logprobs(logits, labels, temperature=1.0, top_k=0)[0], unfiltered[0])


def test_a_filter_of_the_label_alone_has_nothing_to_learn() -> None:
    logits = torch.randn(4, 8, requires_grad=True)
    labels = torch.randint(8, (4,))
    logprobs, lse = token_logprobs(logits, labels, temperature=0.5, kept_ids=labels[:, None])
    assert not logprobs.any()
    torch.testing.assert_close(lse, 2 * logits.gather(1, labels[:, None])[:, 0])
    assert not torch.autograd.grad(logprobs.sum(), logits)[0].any()
