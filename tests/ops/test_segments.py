"""Rows, reasoning steps and their sums: `srpo_kernels.segments`; and cutting a batch into micro-batches changes no result."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch
from loss_cases import policy_loss
from srpo_kernels import StepStats, step_of_row

from srpo.algorithm.losses import sequence_weights
from srpo.core.batch import Rollout, pack

OPTIONS: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.3, "kl_coef": 0.0, "kl_estimator": "k3", "temperature": 0.9}


def test_step_of_row_edges() -> None:
    cu_seqlens = torch.tensor([0, 4, 4, 7], dtype=torch.int32)  # the second sequence is empty
    step_ends = torch.tensor(
        [[0, 2, 2], [0, 0, 0], [1, 1, 3]], dtype=torch.int32
    )  # boundary at 0; empty steps; ends before the last
    sequence, step = step_of_row(cu_seqlens, step_ends, torch.arange(7))
    assert sequence.tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert step.tolist() == [1, 1, 2, 2, 0, 2, 2]


@pytest.mark.parametrize("seed", range(20))
def test_step_of_row_equals_a_loop(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    num_sequences, num_steps = (int(n) for n in torch.randint(1, 6, (2,), generator=gen))
    lengths = torch.randint(0, 8, (num_sequences,), generator=gen)
    step_ends = torch.randint(0, 10, (num_sequences, num_steps), generator=gen).sort(1).values
    expected = []
    for i in range(num_sequences):
        for position in range(int(lengths[i])):
            containing = [j for j in range(num_steps) if position < int(step_ends[i, j])]
            expected.append((i, containing[0] if containing else num_steps - 1))
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    rows = torch.randperm(len(expected), generator=gen)
    sequence, step = step_of_row(cu_seqlens, step_ends.int(), rows)
    assert list(zip(sequence.tolist(), step.tolist(), strict=True)) == [expected[t] for t in rows.tolist()]


def test_stats_add_and_stack() -> None:
    ones, step = torch.ones(3), torch.tensor([0, 2, 2])
    rows = {"num_clipped": ones > 1, "num_outside_support": ones, "sum_ratio": ones * 2, "sum_kl": ones, "sum_entropy": ones}
    a = StepStats.sum_rows(step, 3, **rows)
    assert a.num_tokens.tolist() == [1, 0, 2] and a.sum_ratio.tolist() == [2, 0, 4] and not a.num_clipped.any()
    assert torch.equal(StepStats.unstack(a.stack()).stack(), a.stack())
    assert torch.equal((StepStats.zeros(3) + a + a).sum_ratio, 2 * a.sum_ratio)


def random_rollouts(seed: int, vocab: int) -> list[Rollout]:
    gen = torch.Generator().manual_seed(seed)

    def ints(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=gen).tolist()

    rollouts = []
    for i in range(12):
        length = int(torch.randint(1, 9, (1,), generator=gen))
        ends = (*sorted(ints(length + 1, 2)), length)
        logprobs = tuple((-3 * torch.rand(length, generator=gen)).tolist())
        tokens = (tuple(ints(vocab, 1 + i % 4)), tuple(ints(vocab, length)))
        rollouts.append(Rollout(str(i), i // 5, *tokens, logprobs, ends, (None,) * 3, "", "stop", 0))
    return rollouts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_tokens", [11, 20, 37])
def test_micro_batches_and_label_rows_change_nothing(max_tokens: int, seed: int) -> None:
    """The policy is a table of logits per input token. Its gradient must not depend on how the batch was cut."""
    vocab = 10
    rollouts = random_rollouts(seed, vocab)
    gen = torch.Generator().manual_seed(seed)
    table = torch.randn(vocab, vocab, generator=gen, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(len(rollouts), 3, generator=gen)
    weights = sequence_weights([len(r.response_ids) for r in rollouts], [r.group for r in rollouts], denominator="sequence_mean")

    def run(max_tokens: int | None, label_rows_only: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batches = pack(rollouts, advantages, weights, max_tokens)
        assert (len(batches) > 1) == (max_tokens is not None)
        outs = []
        for full_batch in batches:
            batch = full_batch.rows()[1] if label_rows_only else full_batch
            tables = (batch.step_advantages, batch.step_ends, batch.cu_seqlens, batch.weights, batch.sampling_logprobs)
            outs.append(policy_loss(table[batch.input_ids], batch.labels, *tables, top_k=6, **OPTIONS))
        loss = torch.stack([out.loss for out in outs]).sum()
        stats = reduce(StepStats.__add__, [out.stats for out in outs], StepStats.zeros(3))
        return loss, torch.autograd.grad(loss, table)[0], stats.stack()

    expected = run(None, label_rows_only=False)
    assert expected[2][0].sum() == sum(len(r.response_ids) for r in rollouts)
    for other in (run(None, label_rows_only=True), run(max_tokens, label_rows_only=False), run(max_tokens, label_rows_only=True)):
        torch.testing.assert_close(other, expected, rtol=1e-12, atol=1e-14)
