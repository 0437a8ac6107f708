"""The correction of the sampler-trainer mismatch, and the replayed support, in an update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import policy_lab as lab
import pytest
import torch
from srpo_kernels import token_logprobs, topk_support

from srpo.core.batch import Batch, pack
from srpo.policy.model import Policy


def spread(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    index, _ = batch.rows()
    return values.new_zeros(len(batch.labels), *values.shape[1:]).index_copy(0, index, values)


def sampled_logprobs(batch: Batch, policy: Policy, temperature: float, top_k: int) -> torch.Tensor:
    """Log-probabilities [R] under the filtered distribution that was sampled."""
    with torch.no_grad():
        logits = policy(batch)
        labels = batch.rows()[1].labels
        kept = topk_support(logits, top_k)
        return token_logprobs(logits, labels, temperature=temperature, kept_ids=kept, impl="reference")[0]


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("num_updates", [1, 2])
@pytest.mark.parametrize("top_k", [None, 10])
def test_weights_are_multiplied_once(tmp_path: Path, kind: str, num_updates: int, top_k: int | None) -> None:
    """Gradient and loss equal those of an update whose weights were multiplied by hand, for filtered and unfiltered ratios."""
    policy, cap = Policy(lab.tiny(1)), 1.3
    plain = replace(lab.ON_POLICY, top_k=top_k, num_updates=num_updates)
    random = torch.Generator().manual_seed(num_updates)
    parts, corrected = [], []
    for batch in lab.batches(4, 30):
        exact = sampled_logprobs(batch, policy, 0.9, 10)
        gap = 0.5 * torch.randn(len(exact), generator=random)
        batch = batch.with_(sampling_logprobs=spread(batch, exact - gap))
        ratio = gap.exp()
        factor = ratio.clamp(max=cap) if kind == "truncate" else ((ratio <= cap) & (ratio >= 1 / cap)).float()
        assert factor.unique().numel() > 1
        parts.append(batch)
        corrected.append(batch.with_(weights=batch.weights * spread(batch, factor)))
    objective = replace(plain, importance=kind, importance_cap=cap)
    got, metrics = lab.gradients(parts, lab.one_process(), tmp_path / "dump.pt", objective)
    want, expected = lab.gradients(corrected, lab.one_process(), tmp_path / "dump.pt", plain)
    off, _ = lab.gradients(parts, lab.one_process(), tmp_path / "dump.pt", plain)
    assert 0 < metrics.pop("rollout/importance_clip_frac") < 1
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert any((off[name] - gradient).norm() > 1e-2 * gradient.norm() for name, gradient in want.items())


def test_nothing_changes_where_sampler_and_trainer_agree(tmp_path: Path) -> None:
    policy = Policy(lab.tiny(1))
    parts = [b.with_(sampling_logprobs=spread(b, sampled_logprobs(b, policy, 0.9, 10))) for b in lab.batches(4, 30)]
    off, _ = lab.gradients(parts, lab.one_process(), tmp_path / "dump.pt", lab.ON_POLICY)
    for kind in ("truncate", "mask"):
        objective = replace(lab.ON_POLICY, importance=kind)
        got, metrics = lab.gradients(parts, lab.one_process(), tmp_path / "dump.pt", objective)
        assert metrics["rollout/importance_clip_frac"] == 0
        assert all((got[name] - g).norm() <= 1e-5 * g.norm() for name, g in off.items())


@pytest.mark.parametrize("num_updates", [1, 2])
def test_a_replayed_support_is_what_ratios_are_taken_on(tmp_path: Path, num_updates: int) -> None:
    """The engine kept other ids than the trainer would. Log-probabilities are taken on the engine's ids, and agree with it."""
    policy, older = Policy(lab.tiny(1)), Policy(lab.tiny(7))
    rollouts = lab.rollouts(3, [(3, 5), (2, 7), (4, 1)])
    (plain,) = pack(rollouts, torch.ones(3, len(lab.STEPS)), torch.ones(3))
    _, rows = plain.rows()
    with torch.no_grad():
        kept = topk_support(older(plain), 9)
        kept[:, 0] = torch.where((kept == rows.labels[:, None]).any(1), kept[:, 0], rows.labels)
        exact = token_logprobs(policy(plain), rows.labels, temperature=0.9, kept_ids=kept, impl="reference")[0]
    ends = np.cumsum([len(r.response_ids) for r in rollouts])[:-1]
    supports = np.split(kept.int().numpy(), ends)
    supports[1] = np.pad(supports[1], ((0, 0), (0, 2)), constant_values=-1)  # one support has two more places
    logprobs = np.split(exact.numpy(), ends)
    replayed = [
        replace(r, support=s, sampling_logprobs=tuple(map(float, p)))
        for r, s, p in zip(rollouts, supports, logprobs, strict=True)
    ]
    parts = pack(replayed, torch.ones(3, len(lab.STEPS)), torch.ones(3), max_tokens=12)
    assert len(parts) == 2
    for batch in parts:
        assert batch.kept_ids is not None
        assert (batch.kept_ids[batch.labels < 0] == -1).all()
    assert torch.cat([b.rows()[1].kept_ids[:, :9] for b in parts]).equal(kept)  # pyright: ignore[reportOptionalSubscript]
    objective = replace(lab.ON_POLICY, num_updates=num_updates, top_k=9, sampling_top_k=9)
    _, metrics = lab.gradients(parts, lab.one_process(), tmp_path / "dump.pt", objective)
    assert metrics["rollout/mismatch_max"] < 1e-5
    forgotten = [batch.with_(kept_ids=None) for batch in parts]
    _, metrics = lab.gradients(forgotten, lab.one_process(), tmp_path / "dump.pt", objective)
    assert metrics["rollout/mismatch_max"] > 1e-2


def test_a_batch_without_all_supports_has_none() -> None:
    rollouts = lab.rollouts(3, [(3, 5), (2, 7)])
    rollouts[0] = replace(rollouts[0], support=np.zeros((5, 2), dtype=np.int32))
    (batch,) = pack(rollouts, torch.ones(2, len(lab.STEPS)), torch.ones(2))
    assert batch.kept_ids is None
