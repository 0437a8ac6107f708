from __future__ import annotations

import pytest
import torch

from srpo.rollout.sampling import choose


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("vocab", "top_k"), [(30, 0), (30, 1), (30, 4), (30, 30), (30, 100), (1000, 0), (1024, 0), (1000, 300)])
def test_each_uniform_picks_its_slice_of_the_distribution(seed, vocab, top_k):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocab, generator=generator) * 3
    kept = logits[0].topk(min(top_k or vocab, vocab)).indices
    probs = torch.zeros(vocab).index_copy(0, kept, (logits[0, kept] / 0.7).softmax(-1))
    n = 4000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, logprobs, _ = choose(logits.repeat(n, 1), uniforms, temperature=0.7, top_k=top_k)
    torch.testing.assert_close(torch.bincount(tokens, minlength=vocab) / n, probs, atol=1.5 / n, rtol=0)
    torch.testing.assert_close(logprobs.exp(), probs[tokens], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("vocab", [5, 1000])
def test_tokens_without_probability_are_never_chosen(vocab):
    logits = torch.full((4, vocab), -torch.inf)
    logits[:, 1] = logits[:, vocab - 2] = 0.0
    uniforms = torch.tensor([0.0, 0.499, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs, _ = choose(logits, uniforms, temperature=1.0, top_k=0)
    assert tokens.tolist() == [1, 1, vocab - 2, vocab - 2]
    torch.testing.assert_close(logprobs, torch.full((4,), 0.5).log())


@pytest.mark.parametrize("seed", range(3))
def test_extreme_uniforms_stay_inside_the_distribution(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, 3000, generator=generator) * 30  # many probabilities underflow to 0
    for uniform in (0.0, 2**-53, 0.5, 1 - 2**-53):
        uniforms = torch.full((64,), uniform, dtype=torch.float64)
        tokens, logprobs, _ = choose(logits.clone(), uniforms, temperature=1.0, top_k=0)
        assert logprobs.isfinite().all()
        assert ((tokens >= 0) & (tokens < 3000)).all()


@pytest.mark.parametrize("vocab", [200, 1000, 1024])
def test_logits_that_are_not_finite_give_a_token_and_no_logprob(vocab):
    """The engine finds the log-probabilities and says so; an id out of range would crash before."""
    logits = torch.full((3, vocab), torch.nan)
    tokens, logprobs, _ = choose(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), temperature=1.0, top_k=0)
    assert bool((tokens < vocab).all()) and not bool(logprobs.isfinite().any())


def test_greedy_reports_the_filtered_logprob():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    token, logprob, _ = choose(logits.clone(), torch.zeros(1, dtype=torch.float64), temperature=2.0, top_k=2, greedy=True)
    assert token.item() == 1
    torch.testing.assert_close(logprob, torch.tensor([1.5, 1.0]).log_softmax(0)[:1])
