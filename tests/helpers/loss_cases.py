"""Random inputs of the loss kernels, difficult cases included, and the fp64 reference that tests compare with."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import srpo_kernels
import torch
from srpo_kernels import IGNORE, LossOptions, PolicyLoss, token_logprobs

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kl_coef": 0.0},
    "k1": {"kl_estimator": "k1", "kl_coef": 0.1, "temperature": 0.7},
    "k2": {"kl_estimator": "k2", "kl_coef": 0.3, "dual_clip": 1.5, "clip_eps_low": 0.05, "clip_eps_high": 0.02},
    "k3": {"kl_estimator": "k3", "kl_coef": 0.1, "temperature": 0.99},
    "full": {"kl_estimator": "full", "kl_coef": 0.2, "temperature": 1.3},
    "kept": {"kl_estimator": "k3", "kl_coef": 0.1, "kept": 9},
    "kept_full": {"kl_estimator": "full", "kl_coef": 0.2, "kept": 5, "temperature": 0.8},
    "cispo": {"clip_form": "cispo", "clip_eps_low": 0.1, "clip_eps_high": 0.1, "kl_coef": 0.1},
    "on_policy": {"kl_coef": 0.0, "old": False},
    "on_policy_kl": {"kl_estimator": "k3", "kl_coef": 0.05, "old": False},
}


def arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `srpo_kernels.policy_loss`: fields of `LossOptions` among the settings become its `options`."""
    names = {field.name for field in fields(LossOptions)} & settings.keys()
    others = {name: value for name, value in settings.items() if name not in names}
    return {"options": LossOptions(**{name: settings[name] for name in names}), **others}


def policy_loss(*tensors: torch.Tensor | None, **settings: Any) -> PolicyLoss:
    """`srpo_kernels.policy_loss` with the fields of `LossOptions` as keyword arguments."""
    return srpo_kernels.policy_loss(*tensors, **arguments(settings))  # pyright: ignore[reportArgumentType]


@dataclass
class Case:
    """Logits and the other arguments of `policy_loss`."""

    logits: torch.Tensor
    tables: dict[str, Any]
    options: dict[str, Any]

    def run(self, logits: torch.Tensor, impl: str, **more: Any) -> PolicyLoss:
        """The loss at the given logits; the reference's logits are converted to their dtype."""
        tables = dict(self.tables)
        if tables["ref_logits"] is not None:
            tables["ref_logits"] = tables["ref_logits"].to(logits.dtype)
        return policy_loss(logits, **tables, **self.options, **more, impl=impl)

    def exact(self) -> tuple[PolicyLoss, torch.Tensor]:
        """(result, gradient) in fp64 by plain autograd."""
        logits = self.logits.double().requires_grad_()
        out = self.run(logits, "reference")
        return out, torch.autograd.grad(out.loss, logits)[0]

    def measured(self, impl: str, *, in_place: bool = False) -> tuple[PolicyLoss, torch.Tensor]:
        """(result, gradient) of an implementation. In place, the logits are a copy with a larger row stride."""
        if not in_place:
            logits = self.logits.clone().requires_grad_()
            out = self.run(logits, impl, in_place=False)
            return out, torch.autograd.grad(out.loss, logits)[0]
        num_rows, vocab = self.logits.shape
        padded = torch.full((num_rows, vocab + 3), 7.0, dtype=self.logits.dtype, device=self.logits.device)
        view = padded[:, :vocab].copy_(self.logits).requires_grad_()
        out = self.run(view, impl, in_place=True)
        out.loss.backward()
        assert bool((padded[:, vocab:] == 7).all()), "wrote beside the rows"
        assert view.grad is not None
        return out, view.grad

    def error(self, gradient: torch.Tensor, exact: torch.Tensor) -> float:
        """Relative error of a gradient in the L2 norm. Rows with a nearly certain label, without advantage, or whose clip and KL
        terms cancel have almost no gradient, but still the error of these terms. A draw may consist of such rows, so an error is
        relative to at least one term of size `weights` in every row."""
        return relative(gradient, exact, float(self.tables["weights"].norm()) + 1e-12)


def a_seed() -> int:
    return random.randrange(2**31)


def off_the_edges(old_logprobs: torch.Tensor, logprobs: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Old log-probabilities, moved in rows so near the edge of a clip that rounding would decide on their gradient: one row in a
    million. Other tests check rows exactly on an edge."""
    low, high = 1 - options["clip_eps_low"], 1 + options["clip_eps_high"]
    edges = torch.tensor([low, high, options.get("dual_clip", high)], dtype=torch.float64, device=logprobs.device)
    near = (logprobs[:, None] - old_logprobs[:, None].double() - edges.log()).abs().amin(1) < 1e-5
    return torch.where(near, old_logprobs + 1e-3, old_logprobs)


def draw(seed: int, num_rows: int, vocab: int, dtype: torch.dtype, name: str, *, scale: float = 3.0, nan: bool = True) -> Case:
    """Sequences of random lengths (some empty), steps with random ends (some empty, some beyond the end), ignored rows full of
    NaN, advantages of which some are 0, and labels that are likely as often as not."""
    gen = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.25, "kl_estimator": "k3", "temperature": 1.0}
    options |= OPTIONS[name]
    kept, old = options.pop("kept", 0), options.pop("old", True)
    num_sequences, num_steps = 5, 4
    cuts = torch.randint(num_rows + 1, (num_sequences - 1,), generator=gen).sort().values
    cu_seqlens = torch.cat([torch.tensor([0]), cuts, torch.tensor([num_rows])]).int()
    step_ends = torch.randint(max(num_rows, 1), (num_sequences, num_steps), generator=gen).sort(1).values.int()
    step_ends[:, 0] *= torch.randint(2, (num_sequences,), generator=gen).int()  # half of the first steps are empty
    logits = (scale * torch.randn(num_rows, vocab, generator=gen)).to(dtype)
    best = logits.float().argmax(1) if num_rows else torch.zeros(0, dtype=torch.long)
    labels = torch.where(torch.rand(num_rows, generator=gen) < 0.5, best, torch.randint(vocab, (num_rows,), generator=gen))
    labels[torch.rand(num_rows, generator=gen) < 0.2] = IGNORE
    kept_ids = None
    if kept:
        kept_ids = torch.rand(num_rows, vocab, generator=gen).topk(min(kept, vocab), 1).indices
        kept_ids[torch.rand(kept_ids.shape, generator=gen) < 0.2] = -1
    exact = token_logprobs(logits.double(), labels, temperature=options["temperature"], kept_ids=kept_ids, impl="reference")[0]
    old_logprobs = (exact + 0.3 * torch.randn(num_rows, generator=gen)).float() if old else None
    if old_logprobs is not None:
        old_logprobs = off_the_edges(old_logprobs, exact, options)
    if nan:
        logits[labels == IGNORE] = torch.nan
    full = options["kl_estimator"] == "full"
    tables = {
        "labels": labels,
        "step_advantages": torch.randn(num_sequences, num_steps, generator=gen) * (torch.rand(5, 4, generator=gen) < 0.8),
        "step_ends": step_ends,
        "cu_seqlens": cu_seqlens,
        "weights": torch.rand(num_rows, generator=gen),
        "old_logprobs": old_logprobs,
        "ref_logprobs": None if full else (exact + 0.5 * torch.randn(num_rows, generator=gen)).float(),
        "kept_ids": kept_ids,
        "ref_logits": (logits.float() + torch.randn(num_rows, vocab, generator=gen)).to(dtype) if full else None,
    }
    return Case(logits, tables, options)


def check_small_terms(impl: str, power: int, device: str = "cpu") -> None:
    """Asserts that a sum which begins or ends with 1 loses none of 151,935 terms of 2^-power, each of which rounding alone would
    drop or double, and that the sums of the policy and of an equal reference are equal."""
    logits = torch.full((4, 151936), -power * math.log(2))
    logits[:2, 0] = logits[2:, -1] = 0
    labels = torch.tensor([0, 7, 151935, 7])
    exact = token_logprobs(logits.double(), labels, temperature=1.0, impl="reference")
    logits, labels = logits.to(device), labels.to(device)
    for got, wanted in zip(token_logprobs(logits, labels, temperature=1.0, impl=impl), exact, strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=6e-8, atol=1e-6)
    tables = [x.to(device) for x in (torch.ones(1, 1), torch.tensor([[4]]), torch.tensor([0, 4]), torch.ones(4))]
    options = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "kl_coef": 0.1, "kl_estimator": "full", "temperature": 1.0}
    out = policy_loss(logits, labels, *tables, old_logprobs=None, ref_logits=logits.clone(), **options, in_place=False, impl=impl)
    assert not bool(out.stats.sum_kl.any()), out.stats.sum_kl


def relative(got: torch.Tensor, exact: torch.Tensor, floor: float = 1e-12) -> float:
    """Relative error in the L2 norm; a gradient below `floor` is measured against that."""
    return float((got.double() - exact).norm()) / max(float(exact.norm()), floor)


def check(case: Case, impl: str, *, in_place: bool, fp64: tuple[PolicyLoss, torch.Tensor] | None = None) -> None:
    """Asserts that an implementation is as accurate as promised, and that ignored rows get zero gradient. fp64: the result of
    `case.exact()`, if it has been computed already."""
    exact, exact_grad = case.exact() if fp64 is None else fp64
    out, grad = case.measured(impl, in_place=in_place)
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=6e-8, atol=2e-6)  # 6e-8: half a unit of the result
    terms = case.tables["weights"].double()  # the size of each row's term; that of cispo is a log-probability
    if case.options.get("clip_form") == "cispo":
        terms = terms * exact.logprobs.abs()
    carried = 2e-6 * float(exact_grad.abs().sum()) / 2 * case.options["temperature"]  # from log-probabilities into the loss
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=1.2e-7, atol=2e-7 * (1 + float(terms.sum())) + carried)
    stats, exact_stats = out.stats.stack(), exact.stats.stack()  # sums over a step's tokens, each as exact as a log-probability
    allowed = 2e-6 * (1 + exact.stats.num_tokens + exact_stats.abs())
    assert bool(((stats - exact_stats).abs() <= allowed).all()), (stats, exact_stats)
    assert not bool(grad[case.tables["labels"] == IGNORE].any())
    fp32 = case.logits.dtype == torch.float32
    limit = 3e-7 if fp32 else max(1.05 * case.error(exact_grad.to(case.logits.dtype), exact_grad), 1e-7)
    assert case.error(grad, exact_grad) <= limit, (case.error(grad, exact_grad), limit)
