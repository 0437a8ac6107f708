"""Denominators as weights, and DPO: examples by hand, and loops over the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from srpo.algorithm.losses import dpo_loss, sequence_weights, sft_weights


def test_sequence_mean_by_hand() -> None:
    # two groups: of three (one response empty) and of one
    out = sequence_weights([2, 4, 5, 0], [9, 9, 1, 9], denominator="sequence_mean")
    assert out.dtype == torch.float32
    torch.testing.assert_close(
        out, torch.tensor([1 / 12, 1 / 24, 1 / 10, 0.0])
    )  # 1/2 * 1/3 * 1/2, 1/2 * 1/3 * 1/4, 1/2 * 1 * 1/5


def test_token_mean_by_hand() -> None:
    out = sequence_weights([2, 4, 0, 2], [0, 0, 1, 1], denominator="token_mean")
    torch.testing.assert_close(out, torch.tensor([1 / 8, 1 / 8, 0.0, 1 / 8]))


@pytest.mark.parametrize("seed", range(3))
def test_weights_times_terms_are_eq6_averaged_over_groups(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (11,), generator=gen).tolist()
    groups = [0, 1, 2, 0, 1, 0, 0, 2, 1, 1, 0]
    terms = [torch.randn(n, generator=gen, dtype=torch.float64).tolist() for n in lengths]
    total = 0.0
    for group in range(3):
        members = [i for i in range(11) if groups[i] == group]
        total += sum(sum(terms[i]) / lengths[i] for i in members) / len(members) / 3
    weights = sequence_weights(torch.tensor(lengths), groups, denominator="sequence_mean").tolist()
    assert sum(w * sum(t) for w, t in zip(weights, terms, strict=True)) == pytest.approx(total, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("denominator", ["sequence_mean", "token_mean"])
def test_weights_sum_to_one_over_tokens(denominator: Any) -> None:
    lengths = torch.tensor([3, 7, 1, 30, 2])
    for weights in (
        sequence_weights(lengths, [0, 0, 1, 2, 2], denominator=denominator),
        sft_weights(lengths, denominator=denominator),
    ):
        assert float((weights * lengths).sum()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("denominator", ["sequence_mean", "token_mean"])
def test_only_empty_responses_weigh_nothing(denominator: Any) -> None:
    assert sequence_weights([0, 0], [0, 0], denominator=denominator).tolist() == [0, 0]
    assert sequence_weights([], [], denominator=denominator).shape == (0,)


def test_constant_denominator_by_hand() -> None:
    # Dr. GRPO: two groups, of three (one response empty) and of one; at most 10 tokens each
    out = sequence_weights([2, 4, 5, 0], [9, 9, 1, 9], denominator="constant", max_length=10)
    torch.testing.assert_close(out, torch.tensor([1 / 60, 1 / 60, 1 / 20, 0.0]))


@pytest.mark.parametrize("seed", range(3))
def test_constant_denominator_lets_no_response_off_by_its_length(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    lengths, groups = torch.randint(1, 30, (12,), generator=gen), torch.arange(12) % 3
    out = sequence_weights(lengths, groups, denominator="constant", max_length=30)
    torch.testing.assert_close(out, torch.full((12,), 1 / (3 * 4 * 30)))


def test_dpo_label_smoothing_is_the_mixture_of_both_labels() -> None:
    gen = torch.Generator().manual_seed(2)
    chosen, rejected, ref_chosen, ref_rejected = -9 * torch.rand(4, 7, generator=gen, dtype=torch.float64)
    right = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3).loss
    wrong = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, 0.3).loss
    smooth = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, label_smoothing=0.2).loss
    torch.testing.assert_close(smooth, 0.8 * right + 0.2 * wrong)


def test_sft_weights_by_hand() -> None:
    torch.testing.assert_close(sft_weights([1, 3]), torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(sft_weights([1, 3], denominator="sequence_mean"), torch.tensor([1 / 2, 1 / 6]))


def test_dpo_by_hand() -> None:
    # rewards .1 * 2 and .1 * -1, margin .3; then the same pair turned around
    out = dpo_loss(
        torch.tensor([-3.0, -6.0]), torch.tensor([-6.0, -3.0]), -torch.tensor([5.0, 5.0]), -torch.tensor([5.0, 5.0]), 0.1
    )
    assert out.loss.item() == pytest.approx((math.log(1 + math.exp(-0.3)) + math.log(1 + math.exp(0.3))) / 2, rel=1e-6)
    sums = {name: value.item() for name, value in out.sums.items()}
    assert sums == pytest.approx({"chosen_reward": 0.1, "rejected_reward": 0.1, "margin": 0.0, "accuracy": 1.0}, abs=1e-6)


def test_dpo_gradcheck_and_start() -> None:
    gen = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = -9 * torch.rand(4, 5, generator=gen, dtype=torch.float64)
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(lambda c, r: dpo_loss(c, r, ref_chosen, ref_rejected, 0.3).loss, inputs)
    start = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.3)
    assert start.loss.item() == pytest.approx(math.log(2)) and start.sums["accuracy"] == 0
    assert not any(value.requires_grad for value in start.sums.values())


def test_dpo_micro_batches_add_up_and_nothing_overflows() -> None:
    gen = torch.Generator().manual_seed(1)
    logprobs = -1e4 * torch.rand(4, 6, generator=gen)
    undivided = dpo_loss(*logprobs, beta=0.5)
    parts = [dpo_loss(*logprobs[:, rows], beta=0.5, num_pairs=6) for rows in (slice(0, 1), slice(1, 6))]
    assert undivided.loss.isfinite()
    torch.testing.assert_close(parts[0].loss + parts[1].loss, undivided.loss)
    for name, value in undivided.sums.items():
        torch.testing.assert_close(parts[0].sums[name] + parts[1].sums[name], value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_weights([1, 2], [0], denominator="token_mean"), "one group per sequence"),
        (lambda: sequence_weights([1, -2], [0, 0], denominator="token_mean"), "negative"),
        (lambda: sequence_weights([1], [0], denominator="mean"), "sequence_mean, token_mean or constant"),  # type: ignore[arg-type]
        (lambda: sequence_weights([1], [0], denominator="constant"), "max_length is 0"),
        (lambda: dpo_loss(*torch.zeros(4, 2), beta=0.0), "beta is 0.0"),
        (lambda: dpo_loss(*torch.zeros(4, 2), beta=0.1, label_smoothing=0.5), "label_smoothing is 0.5"),
        (lambda: dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3), beta=0.1), "four tensors"),
    ],
)
def test_bad_input_says_what_to_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
