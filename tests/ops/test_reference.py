"""`srpo_kernels.reference` against Eq. 6 written out in Python loops, finite differences, and hand-made edge cases."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import partial
from itertools import pairwise
from typing import Any

import loss_cases
import pytest
import srpo_kernels
import strict_clamp
import torch
from srpo_kernels import IGNORE, PolicyLoss, StepStats, step_of_row, topk_support

PPO: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.3, "kl_coef": 0.0, "kl_estimator": "k3", "temperature": 1.0}
# "auto" would take the C++ kernels for fp32.
policy_loss = partial(loss_cases.policy_loss, impl="reference")
token_logprobs = partial(srpo_kernels.token_logprobs, impl="reference")
STAT_NAMES = [field.name for field in fields(StepStats)]


def case(seed: int, vocab: int = 7, top_k: int | None = None) -> dict[str, Any]:
    """Random fp64 inputs: four sequences (one empty), three steps (some empty, some past the end), some rows ignored."""
    gen = torch.Generator().manual_seed(seed)
    lengths = [5, 0, 3, 6]
    num_rows = sum(lengths)
    logits = 2 * torch.randn(num_rows, vocab, generator=gen, dtype=torch.float64)
    labels = torch.randint(vocab, (num_rows,), generator=gen)
    labels[torch.rand(num_rows, generator=gen) < 0.3] = IGNORE
    out: dict[str, Any] = {
        "logits": logits,
        "labels": labels,
        "step_advantages": torch.randn(4, 3, generator=gen, dtype=torch.float64),
        "step_ends": torch.tensor([[1, 1, 4], [0, 0, 0], [0, 2, 3], [2, 5, 6]], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        "weights": torch.rand(num_rows, generator=gen, dtype=torch.float64),
        "old_logprobs": token_logprobs(logits, labels.clamp(min=0), temperature=1.0, top_k=top_k)[0]
        + 0.4 * torch.randn(num_rows, generator=gen, dtype=torch.float64),
        "ref_logprobs": -3 * torch.rand(num_rows, generator=gen, dtype=torch.float64),
        "ref_logits": 2 * torch.randn(num_rows, vocab, generator=gen, dtype=torch.float64),
    }
    return out


def one_row(log_p: list[float], label: int = 0, advantage: float = 1.0, **kw: Any) -> tuple[PolicyLoss, torch.Tensor]:
    """Loss and gradient of a single fp32 row of the given logits."""
    logits = torch.tensor([log_p], requires_grad=True)
    ones = torch.ones(1)
    tables = (torch.tensor([[advantage]]), torch.tensor([[1]]), torch.tensor([0, 1]))
    out = policy_loss(logits, torch.tensor([label]), *tables, ones, **{**PPO, **kw})
    return out, torch.autograd.grad(out.loss, logits)[0]


def slow_eq6(
    x: dict[str, Any], logits: list[list[float]], options: dict[str, Any]
) -> tuple[float, dict[int, float], dict[str, list[float]]]:
    """Eq. 6 as printed, over sequences and tokens: (loss, logprob of each labelled row, sums by step)."""
    low, high, dual_clip = 1 - options["clip_eps_low"], 1 + options["clip_eps_high"], options.get("dual_clip")

    def distribution(row: list[float], kept: list[int]) -> dict[int, float]:
        exps = {v: math.exp(row[v] / options["temperature"]) for v in kept}
        return {v: e / sum(exps.values()) for v, e in exps.items()}

    loss, logprobs, stats = 0.0, {}, {name: [0.0] * 3 for name in STAT_NAMES}
    starts = x["cu_seqlens"].tolist()
    for i, (start, stop) in enumerate(pairwise(starts)):
        for t in range(start, stop):
            label = int(x["labels"][t])
            if label == IGNORE:
                continue
            j = 0
            while j < 2 and t - start >= int(x["step_ends"][i, j]):
                j += 1
            row = logits[t]
            kept = sorted(range(len(row)), key=row.__getitem__, reverse=True)[: options.get("top_k")]
            outside = label not in kept
            pi = distribution(row, kept + [label] * outside)
            log_pi = math.log(pi[label])
            ratio = math.exp(log_pi - float(x["old_logprobs"][t]))
            advantage = float(x["step_advantages"][i, j])
            surrogate = min(ratio * advantage, min(max(ratio, low), high) * advantage)
            if dual_clip and advantage < 0:
                surrogate = max(surrogate, dual_clip * advantage)
            d = log_pi - float(x["ref_logprobs"][t])
            ref = distribution(x["ref_logits"][t].tolist(), list(pi))
            full = sum(p * math.log(p / ref[v]) for v, p in pi.items())
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "full": full}[options["kl_estimator"]]
            loss += float(x["weights"][t]) * (-surrogate + options["kl_coef"] * kl)
            logprobs[t] = log_pi
            entropy = -sum(p * math.log(p) for p in pi.values())
            values = [1.0, surrogate != ratio * advantage, outside, ratio, kl, entropy]
            for name, value in zip(STAT_NAMES, values, strict=True):
                stats[name][j] += value
    return loss, logprobs, stats


OPTIONS = [
    {},
    {"temperature": 0.7, "dual_clip": 1.2, "kl_estimator": "k1", "kl_coef": 0.1},
    {"top_k": 3, "kl_estimator": "k2", "kl_coef": 0.5, "temperature": 1.3},
    {"top_k": 4, "kl_estimator": "full", "kl_coef": 0.3},
    {"kl_estimator": "full", "kl_coef": 1.0, "dual_clip": 1.1},
    {"top_k": 2, "kl_estimator": "k3", "kl_coef": 0.2, "clip_eps_low": 0.05, "clip_eps_high": 0.02},
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_eq6_in_loops_with_finite_difference_gradient(options: dict[str, Any], seed: int) -> None:
    options = {**PPO, **options}
    x = case(seed, top_k=options.get("top_k"))
    logits = x["logits"].clone().requires_grad_()
    out = policy_loss(**{**x, "logits": logits}, **options)
    rows = x["logits"].tolist()
    loss, logprobs, stats = slow_eq6(x, rows, options)
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)
    assert out.logprobs.tolist() == pytest.approx([logprobs.get(t, 0.0) for t in range(len(rows))], rel=1e-12)
    for name in STAT_NAMES:
        assert getattr(out.stats, name).tolist() == pytest.approx(stats[name], rel=1e-12), name

    (gradient,) = torch.autograd.grad(out.loss, logits)
    expected, eps = torch.zeros_like(gradient), 1e-6
    for t, row in enumerate(rows):
        for v, value in enumerate(row):
            row[v] = value + eps
            up = slow_eq6(x, rows, options)[0]
            row[v] = value - eps
            expected[t, v] = (up - slow_eq6(x, rows, options)[0]) / (2 * eps)
            row[v] = value
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: dict[str, Any], seed: int) -> None:
    options = {**PPO, **options}
    x = case(seed, top_k=options.get("top_k"))
    logits = x.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(lambda z: policy_loss(z, **x, **options).loss, (logits,), fast_mode=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS)
def test_no_old_policy_means_on_policy(options: dict[str, Any], seed: int) -> None:
    options = {**PPO, **options}
    x = case(seed)
    logits = x.pop("logits").requires_grad_()
    old, _ = token_logprobs(logits.detach(), x["labels"], temperature=options["temperature"], top_k=options.get("top_k"))
    given = policy_loss(logits, **{**x, "old_logprobs": old}, **options)
    absent = policy_loss(logits, **{**x, "old_logprobs": None}, **options)
    torch.testing.assert_close(absent.loss, given.loss)
    torch.testing.assert_close(torch.autograd.grad(absent.loss, logits), torch.autograd.grad(given.loss, logits))
    assert torch.equal(absent.stats.sum_ratio, absent.stats.num_tokens) and not absent.stats.num_clipped.any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("top_k", [None, 3])
def test_token_logprobs_gradcheck_and_lse(top_k: int | None, seed: int) -> None:
    x = case(seed)
    logits, labels = x["logits"].requires_grad_(), x["labels"]
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, labels, temperature=0.9, top_k=top_k), (logits,))
    logprobs, lse = token_logprobs(logits, labels, temperature=0.9, top_k=top_k)
    rows = labels != IGNORE
    torch.testing.assert_close(logprobs[rows], logits[rows, labels[rows]] / 0.9 - lse[rows])
    assert not logprobs[~rows].any() and not lse[~rows].any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"kl_estimator": "full"}, {"kept_ids": True}])
def test_ignored_rows_are_never_read(options: dict[str, Any], seed: int) -> None:
    x = case(seed)
    ignored = x["labels"] == IGNORE
    assert ignored.any()
    options = {**PPO, "kl_coef": 0.1, **options}
    if "kept_ids" in options:
        options["kept_ids"] = topk_support(x["logits"], 3)

    def run(inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        logits = inputs["logits"].clone().requires_grad_()
        out = policy_loss(**{**inputs, "logits": logits}, **options)
        return out.loss, out.logprobs, out.stats.stack(), torch.autograd.grad(out.loss, logits)[0]

    clean = run(x)
    poisoned = {k: x[k].clone() for k in x}
    for name in ("logits", "weights", "old_logprobs", "ref_logprobs", "ref_logits"):
        poisoned[name][ignored] = torch.nan
    if "kept_ids" in options:
        options["kept_ids"] = options["kept_ids"].masked_fill(ignored[:, None], 10**9)
    for a, b in zip(clean, run(poisoned), strict=True):
        assert torch.equal(a, b)
    assert not clean[3][ignored].any() and not clean[1][ignored].any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_zero_advantages(kl: float, seed: int) -> None:
    x = case(seed)
    x |= {"logits": x["logits"].requires_grad_(), "step_advantages": torch.zeros(4, 3)}
    out = policy_loss(**x, **{**PPO, "kl_coef": kl})
    (gradient,) = torch.autograd.grad(out.loss, x["logits"])
    assert bool(gradient.any()) == (kl > 0)
    assert not out.stats.num_clipped.any()
    assert kl or out.loss == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_on_the_clip_edge_is_not_clipped(advantage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    strict_clamp.patch(monkeypatch)
    on_edge, gradient = one_row([0.3, -0.2, 1.0], advantage=advantage, clip_eps_low=0.0, clip_eps_high=0.0)  # ratio is 1
    _, inside = one_row([0.3, -0.2, 1.0], advantage=advantage)
    assert torch.equal(gradient, inside) and gradient.any()
    assert on_edge.stats.num_clipped.tolist() == [0]


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "dual_clip", "loss", "clipped"),
    [
        (2.0, math.log(1.5), None, -2.6, 1),  # 1.3 * 2
        (2.0, math.log(0.5), None, -1.0, 0),  # pessimistic: the lower edge does not bind where A > 0
        (-2.0, math.log(0.5), None, 1.6, 1),  # 0.8 * 2
        (-2.0, math.log(5.0), None, 10.0, 0),
        (-2.0, math.log(5.0), 3.0, 6.0, 1),
        (2.0, math.log(5.0), 3.0, -2.6, 1),
    ],
)
def test_asymmetric_and_dual_clip_by_hand(
    advantage: float, log_ratio: float, dual_clip: float | None, loss: float, clipped: int
) -> None:
    old = torch.tensor([-math.log(4) - log_ratio])
    out, gradient = one_row([1.0] * 4, advantage=advantage, old_logprobs=old, dual_clip=dual_clip)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    assert out.stats.num_clipped.tolist() == [clipped]
    assert gradient.any() == (not clipped)


@pytest.mark.parametrize("seed", range(3))
def test_cispo_is_reinforce_under_a_clipped_importance_weight(seed: int) -> None:
    x = case(seed)
    logits, labels = x.pop("logits").requires_grad_(), x["labels"]
    low, high = 0.9, 1.05
    options = {**PPO, "clip_form": "cispo", "clip_eps_low": 1 - low, "clip_eps_high": high - 1}
    out = policy_loss(logits, **x, **options)
    logprobs, _ = token_logprobs(logits, labels, temperature=1.0)
    ratio = (logprobs.detach() - x["old_logprobs"]).exp()
    rows = (labels != IGNORE).nonzero()[:, 0]
    sequence, step = step_of_row(x["cu_seqlens"], x["step_ends"], rows)
    advantages = x["step_advantages"][sequence, step]
    terms = ratio[rows].clamp(low, high) * advantages * logprobs[rows] * x["weights"][rows]
    torch.testing.assert_close(out.loss, -terms.sum())
    torch.testing.assert_close(torch.autograd.grad(out.loss, logits), torch.autograd.grad(-terms.sum(), logits))
    beyond = ((ratio < low) | (ratio > high))[rows] & (advantages != 0)
    assert 0 < int(beyond.sum()) == int(out.stats.num_clipped.sum()) < len(rows)


@pytest.mark.parametrize("log_ratio", [1e3, 1e30, -1e3, -1e30])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_no_log_ratio_overflows(log_ratio: float, advantage: float) -> None:
    far = torch.tensor([-log_ratio])
    out, gradient = one_row([0.0, 1.0], advantage=advantage, old_logprobs=far, ref_logprobs=far, kl_coef=1.0)
    assert out.loss.isfinite() and gradient.square().sum().isfinite() and out.stats.stack().isfinite().all()


@pytest.mark.parametrize("log_ratio", [-20.0, -3.0, 0.0, 19.9])
def test_log_ratios_up_to_20_are_exact(log_ratio: float) -> None:
    far = torch.tensor([-math.log(2) - log_ratio])
    out, gradient = one_row([0.0, 0.0], advantage=-1.0, old_logprobs=far, clip_eps_low=1.0)
    assert out.stats.sum_ratio.item() == pytest.approx(math.exp(log_ratio), rel=1e-5)
    assert gradient[0].tolist() == pytest.approx([math.exp(log_ratio) / 2, -math.exp(log_ratio) / 2], rel=1e-5)
    kl, _ = one_row([0.0, 0.0], advantage=0.0, ref_logprobs=torch.tensor([-math.log(2) + log_ratio]), kl_coef=1.0)
    assert kl.loss.item() == pytest.approx(math.expm1(log_ratio) - log_ratio, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_kl_estimators_in_expectation_over_the_policy(seed: int) -> None:
    """Exactly, by a row per label weighted with its probability: k1 and k3 are unbiased, the gradient of k1 vanishes."""
    gen = torch.Generator().manual_seed(seed)
    vocab = 9
    row, ref_row = torch.randn(2, vocab, generator=gen, dtype=torch.float64)
    ref = ref_row.log_softmax(0)
    tables = (torch.zeros(1, 1), torch.tensor([[vocab]]), torch.tensor([0, vocab]))
    loss, gradient = {}, {}
    for kl_estimator in ("k1", "k2", "k3", "full"):
        logits = row.expand(vocab, -1).clone().requires_grad_()
        options = {**PPO, "kl_coef": 1.0, "kl_estimator": kl_estimator}
        ref_logits = ref_row.expand(vocab, -1)
        out = policy_loss(logits, torch.arange(vocab), *tables, row.softmax(0), None, ref, ref_logits=ref_logits, **options)
        loss[kl_estimator], gradient[kl_estimator] = out.loss.item(), torch.autograd.grad(out.loss, logits)[0].sum(0)
    assert loss["k1"] == pytest.approx(loss["full"]) and loss["k3"] == pytest.approx(loss["full"])
    torch.testing.assert_close(gradient["k1"], torch.zeros(vocab, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient["k2"], gradient["full"])  # the gradient of k2 is that of the reverse KL, on-policy
    assert gradient["k3"].abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_equal_columns_are_grpo_whatever_the_steps(seed: int) -> None:
    x = case(seed)
    x["step_advantages"] = x["step_advantages"][:, :1].expand(-1, 3)
    one_step = {**x, "step_advantages": x["step_advantages"][:, :1], "step_ends": x["step_ends"][:, -1:]}
    torch.testing.assert_close(policy_loss(**x, **PPO).loss, policy_loss(**one_step, **PPO).loss)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_computed_in_fp32(dtype: torch.dtype, seed: int) -> None:
    x = case(seed, vocab=1000)
    low = x["logits"].to(dtype).requires_grad_()
    exact = low.detach().double().requires_grad_()
    tables = {k: x[k] for k in ("labels", "step_advantages", "step_ends", "cu_seqlens", "weights")}
    out, want = policy_loss(low, **tables, **PPO), policy_loss(exact, **tables, **PPO)
    assert out.loss.dtype == out.logprobs.dtype == torch.float32
    torch.testing.assert_close(out.logprobs.double(), want.logprobs, rtol=0, atol=4e-6)
    (gradient,) = torch.autograd.grad(out.loss, low)
    (want_gradient,) = torch.autograd.grad(want.loss, exact)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=2**-7, atol=1e-7)


def test_masked_vocabulary_and_extreme_logits() -> None:
    inf = math.inf
    for logits in ([1e4, -1e4, 0.0], [0.5, -inf, -inf], [0.5, 1.0, -inf], [-1e4, -1e4, -1e4]):
        out, gradient = one_row(logits, ref_logits=torch.tensor([logits]), kl_estimator="full", kl_coef=1.0)
        assert out.loss.isfinite() and gradient.isfinite().all() and out.stats.stack().isfinite().all()
        assert out.logprobs.item() == pytest.approx(torch.tensor(logits).double().log_softmax(0)[0].item(), abs=1e-6)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("num_rows", "vocab"), [(0, 5), (3, 1), (3, 5)])
def test_nothing_to_train_on(num_rows: int, vocab: int, top_k: int | None) -> None:
    logits = torch.randn(num_rows, vocab, requires_grad=True)
    labels = torch.full((num_rows,), 0 if vocab == 1 else IGNORE)  # a vocabulary of one: logprob 0, gradient 0
    sequences = min(num_rows, 1)
    cu_seqlens = torch.tensor([0, num_rows][: sequences + 1])
    tables = (torch.ones(sequences, 2), torch.full((sequences, 2), num_rows), cu_seqlens, torch.ones(num_rows))
    out = policy_loss(logits, labels, *tables, **PPO, top_k=top_k)
    assert not out.logprobs.any() and out.logprobs.shape == (num_rows,)
    assert not torch.autograd.grad(out.loss, logits)[0].any()


def test_gradient_flows_to_the_logits_alone() -> None:
    x = case(0)
    x = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in x.items()}
    for kl_estimator in ("k3", "full"):
        policy_loss(**x, **{**PPO, "kl_coef": 0.1, "kl_estimator": kl_estimator}).loss.backward()
    assert [k for k, v in x.items() if v.grad is not None] == ["logits"]


def test_inputs_stay_as_they_were_and_row_stride_is_free() -> None:
    x = case(9)
    before = {k: v.clone() for k, v in x.items()}
    expected = policy_loss(**x, **PPO, top_k=3)
    assert all(torch.equal(x[k], before[k]) for k in x)
    wide = torch.full((len(x["labels"]), 20), torch.nan, dtype=torch.float64)
    wide[:, 3:10] = x["logits"]
    strided = policy_loss(**{**x, "logits": wide[:, 3:10]}, **PPO, top_k=3)
    assert torch.equal(strided.loss, expected.loss)
