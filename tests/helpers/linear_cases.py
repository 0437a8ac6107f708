"""Random inputs of the losses from hidden states, and the fp64 result that tests compare with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import srpo_kernels
import torch
from loss_cases import arguments, off_the_edges
from srpo_kernels import IGNORE, PolicyLoss
from srpo_kernels.linear import linear_policy_loss, linear_token_logprobs
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BASE: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.25, "kl_coef": 0.0, "kl_estimator": "k3", "temperature": 1.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "k3": {"kl_coef": 0.1, "temperature": 0.8},
    "dual": {"dual_clip": 1.1, "kl_estimator": "k2", "kl_coef": 0.2},
    "cispo": {"clip_form": "cispo", "clip_eps_low": 0.05, "clip_eps_high": 0.05},
    "full": {"kl_coef": 0.2, "kl_estimator": "full"},
    "full_measured": {"kl_estimator": "full", "temperature": 1.3},
    "kept": {"kept": 6, "kl_coef": 0.1},
    "kept_full": {"kept": 6, "kl_coef": 0.1, "kl_estimator": "full"},
    "top_k": {"top_k": 5},
    "on_policy": {"old": False},
    "by_step": {"ratio_over": "step"},
    "by_sequence": {"ratio_over": "sequence", "kl_coef": 0.1},
}
chunked = pytest.mark.skipif(srpo_kernels.implementations(torch.empty(0, 1)) == ("reference",), reason="no C++ compiler")


class Case:
    """Hidden states, head, tables and options. On a `grid` all products are sums of few bits, exact in fp32 in any order."""

    def __init__(
        self,
        seed: int,
        num_rows: int = 83,
        size: int = 37,
        vocab: int = 211,
        option: str = "plain",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        grid: bool = False,
        std: float = 2.0,
        ignored: bool = True,
    ) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.options = BASE | OPTIONS[option]
        kept, old = self.options.pop("kept", 0), self.options.pop("old", True)

        def factor(rows: int, scale: float) -> Tensor:
            if grid:
                return torch.randint(-8, 9, (rows, size), generator=gen) / 16
            return scale * torch.randn(rows, size, generator=gen)

        hidden, weight = factor(num_rows, 1.0), factor(vocab, std / size**0.5)
        ref_hidden, ref_weight = factor(num_rows, 1.0), factor(vocab, std / size**0.5)
        labels = torch.randint(vocab, (num_rows,), generator=gen)
        if num_rows:
            likely = torch.rand(num_rows, generator=gen) < 0.5
            labels = torch.where(likely, (hidden @ weight.T).argmax(1), labels)
        if ignored:
            labels[torch.rand(num_rows, generator=gen) < 0.25] = IGNORE
        cuts = torch.randint(num_rows + 1, (3,), generator=gen).sort().values
        step_ends = torch.randint(max(num_rows // 2, 1), (4, 3), generator=gen).sort(1).values
        step_ends[::2, 0] = 0  # an empty first step
        self.hidden, self.weight = hidden.to(device, dtype), weight.to(device, dtype)
        self.tables: dict[str, Any] = {
            "labels": labels,
            "step_advantages": torch.randn(4, 3, generator=gen) * (torch.rand(4, 3, generator=gen) < 0.8),
            "step_ends": step_ends.int(),
            "cu_seqlens": torch.cat([torch.tensor([0]), cuts, torch.tensor([num_rows])]).int(),
            "weights": torch.rand(num_rows, generator=gen) * (torch.rand(num_rows, generator=gen) < 0.9),
        }
        if kept:
            ids = torch.rand(num_rows, vocab, generator=gen).topk(min(kept, vocab), 1).indices
            self.tables["kept_ids"] = ids.masked_fill(torch.rand(ids.shape, generator=gen) < 0.2, -1)
        if self.options["kl_estimator"] == "full":
            self.tables |= {"ref_hidden": ref_hidden.to(dtype), "ref_weight": ref_weight.to(dtype)}
        self.tables = {name: table.to(device) for name, table in self.tables.items()}
        noise = 0.3 * torch.randn(2, num_rows, generator=gen).to(device)
        near, _ = self.logprobs(self.hidden.double(), self.weight.double())
        if old:
            self.tables["old_logprobs"] = off_the_edges((near + noise[0]).float(), near, self.options)
        if self.options["kl_estimator"] != "full":
            self.tables["ref_logprobs"] = (near + noise[1]).float()

    def logprobs(self, hidden: Tensor, weight: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        """`linear_token_logprobs`"""
        options = {"temperature": self.options["temperature"], "top_k": self.options.get("top_k")}
        return linear_token_logprobs(
            hidden, weight, self.tables["labels"], kept_ids=self.tables.get("kept_ids"), **options, **more
        )

    def arguments(self, dtype: torch.dtype, **more: Any) -> dict[str, Any]:
        """Keyword arguments of `linear_policy_loss`, with the reference's head in `dtype`."""
        tables = {k: v.to(dtype) if k in ("ref_hidden", "ref_weight") else v for k, v in self.tables.items()}
        return arguments({**tables, **self.options, **more})

    def loss(self, hidden: Tensor, weight: Tensor, **more: Any) -> PolicyLoss:
        """`linear_policy_loss`"""
        return linear_policy_loss(hidden, weight, **self.arguments(hidden.dtype, **more))

    def run(
        self, dtype: torch.dtype | None = None, upstream: float | None = None, **more: Any
    ) -> tuple[PolicyLoss, Tensor, Tensor]:
        """(result, gradient of hidden, of weight); `dtype` replaces the case's own. upstream: factor of the loss."""
        hidden, weight = (x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in (self.hidden, self.weight))
        out = self.loss(hidden, weight, **more)
        (out.loss if upstream is None else upstream * out.loss).backward()
        return out, grad_of(hidden), grad_of(weight)

    def exact(self) -> tuple[PolicyLoss, Tensor, Tensor]:
        """As `run`, in fp64 by plain autograd over all logits."""
        return self.run(torch.float64, impl="reference")


def two_roundings(dtype: torch.dtype) -> float:
    """Largest relative error of many values that were each rounded twice: that of values just above a power of two."""
    return math.sqrt(2) * torch.finfo(dtype).eps / 2 / math.sqrt(3)


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def relative(got: Tensor, exact: Tensor) -> float:
    """Relative error in the L2 norm."""
    return float((got.double() - exact).norm() / exact.norm())


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """Relative error of storing the exact tensor in `dtype`."""
    return relative(exact.to(dtype), exact)


def same(got: tuple[PolicyLoss, Tensor, Tensor], expected: tuple[PolicyLoss, Tensor, Tensor]) -> bool:
    """Whether two results of `Case.run` are equal bit for bit."""
    pairs = zip(
        (got[0].loss, got[0].logprobs, got[0].stats.stack(), *got[1:]),
        (expected[0].loss, expected[0].logprobs, expected[0].stats.stack(), *expected[1:]),
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)
