"""bench/rivals.py: every arm of another package calls it as its release expects. Each package is replaced by a fake that has the
release's names, parameters and shapes and computes in plain torch, so a wrong argument shows as a wrong gradient.

An installed package is called as it is by tests/test_bench_loss_kernel.py.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import loss_bench
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 32768


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    return loss_bench.modules()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module with these attributes, and its packages, in the place of what is installed."""

    def put(module: str, **attributes: Any) -> None:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            fake = ModuleType(name)
            fake.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            monkeypatch.setitem(sys.modules, name, fake)
        for name, value in attributes.items():
            setattr(sys.modules[module], name, value)

    return put


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


def check(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, form: str, hidden: int = 64) -> None:
    """The gradients of an arm, in all its variants, agree with the exact one."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that no arm asks for a GPU
    found = [arm for arm in bench.arms.ARMS if (arm.name, arm.form) == (name, form)]
    assert found
    for arm in found:
        data = loss_bench.problem(bench, form, "fp32", vocab=503, hidden=hidden)
        assert bench.arms.gradient_error(arm, arm.make(data), data) <= loss_bench.COARSE["fp32"]


def test_trl_from_logits(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]) -> None:
    def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Any = None) -> Tensor:
        assert logits.ndim == 3 and index.shape == logits.shape[:-1] and row_mask is None
        return label_logprobs(logits / temperature, index)

    install("trl.trainer.utils", selective_log_softmax=selective_log_softmax)
    check(bench, monkeypatch, "trl", "logits")


def test_trl_from_hidden_states_asks_for_what_its_grpo_trainer_asks_for(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]
) -> None:
    class ChunkedLogProbFunction:
        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        ) -> tuple[Tensor | None, ...]:
            assert hidden.ndim == 2 and targets.shape == hidden.shape[:1] and bias is None
            assert (chunk_size, final_logit_softcapping, outputs) == (CHUNK, None, ("log_probs", "entropy"))
            logits = hidden @ weight.T * logit_scale / temperature
            return label_logprobs(logits, targets), logits.detach().sum(1), None, None, None

    install("trl.trainer.utils", _CHUNKED_LOGPROB_CHUNK_SIZE=CHUNK)
    kernels = ModuleType("trl.kernels")
    kernels.ChunkedLogProbFunction = ChunkedLogProbFunction  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "trl.kernels", kernels)
    check(bench, monkeypatch, "trl", "hidden")


def test_liger_from_logits(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]) -> None:
    def triton_grpo_loss(
        logits: Tensor,
        old_logp: Tensor,
        ref_logp: Tensor,
        completion_ids: Tensor,
        advantages: Tensor,
        completion_mask: Any = None,
        temperature: float = 0.9,
        beta: float = 0.04,
        eps_low: float = 0.2,
        eps_high: float = 0.4,
        inplace: bool = True,
    ) -> tuple[Tensor, None, None]:
        size, length = completion_ids.shape
        assert logits.shape[:2] == (size, length + 1) and advantages.shape == (size,) and completion_mask is None
        assert old_logp.is_contiguous() and ref_logp.is_contiguous() and completion_ids.is_contiguous()
        logprobs = label_logprobs(logits[:, :-1] / temperature, completion_ids)
        ratio, gap = (logprobs - old_logp).exp(), ref_logp - logprobs
        gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - eps_low, 1 + eps_high) * advantages[:, None])
        return beta * (gap.exp() - gap - 1) - gain, None, None

    install("liger_kernel.transformers.grpo_loss", triton_grpo_loss=triton_grpo_loss)
    check(bench, monkeypatch, "liger", "logits")


def test_liger_from_hidden_states(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]) -> None:
    class LigerFusedLinearGRPOLoss:
        def __init__(self, beta: float, epsilon_low: float, epsilon_high: float, loss_type: str, temperature: float) -> None:
            assert loss_type == "grpo"
            self.beta, self.low, self.high, self.temperature = beta, 1 - epsilon_low, 1 + epsilon_high, temperature

        def __call__(
            self,
            _input: Tensor,
            lin_weight: Tensor,
            selected_token_ids: Tensor,
            attention_mask: Tensor,
            advantages: Tensor,
            bias: Any = None,
            ref_per_token_logps: Any = None,
            old_per_token_logps: Any = None,
        ) -> tuple[Tensor, list[Tensor]]:
            assert _input.ndim == 3 and bias is None and attention_mask.shape == selected_token_ids.shape
            logprobs = label_logprobs(_input @ lin_weight.T / self.temperature, selected_token_ids)
            ratio, gap = (logprobs - old_per_token_logps).exp(), ref_per_token_logps - logprobs
            gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(self.low, self.high) * advantages[:, None])
            losses = (self.beta * (gap.exp() - gap - 1) - gain) * attention_mask
            return (losses.sum(1) / attention_mask.sum(1)).mean(), []

    install("liger_kernel.chunked_loss.grpo_loss", LigerFusedLinearGRPOLoss=LigerFusedLinearGRPOLoss)
    check(bench, monkeypatch, "liger/fused_linear", "hidden")


def test_verl(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]) -> None:
    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        assert inplace_backward
        return label_logprobs(logits, labels)

    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, reduction: str = "none", group: Any = None
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(temperature, float) and reduction == "none" and group is None
        logprobs = label_logprobs(hidden @ weight.T / temperature, labels)
        return logprobs, logprobs.detach()

    install("verl.utils.torch_functional", logprobs_from_logits=logprobs_from_logits)
    check(bench, monkeypatch, "verl", "logits")
    install("verl.utils.kernel.linear_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    check(bench, monkeypatch, "verl", "hidden", 128)
    with pytest.raises(bench.rivals.Absent, match="multiple of 128, not 64"):
        check(bench, monkeypatch, "verl", "hidden", 64)


def test_cut_cross_entropy(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]) -> None:
    def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, *, reduction: str = "mean", impl: str = "cce") -> Tensor:
        assert impl == "cce"
        return F.cross_entropy(e @ c.T, targets, reduction=reduction)

    install("cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    check(bench, monkeypatch, "cce", "hidden")


def test_quack_gets_the_logits_and_labels(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]
) -> None:
    seen = []

    def cross_entropy_fwd(
        x: Tensor, target: Tensor, *, return_dx: bool = False, inplace_backward: bool = False
    ) -> tuple[Tensor, Tensor]:
        assert return_dx
        seen.append(inplace_backward)
        gradient = torch.softmax(x, -1) - F.one_hot(target, x.shape[1])
        return F.cross_entropy(x, target, reduction="none"), x.copy_(gradient) if inplace_backward else gradient

    def chunked_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(x @ weight.T, target, reduction=reduction)

    install("quack.cross_entropy", cross_entropy_fwd=cross_entropy_fwd)
    install("quack.linear_cross_entropy", chunked_linear_cross_entropy=chunked_linear_cross_entropy)
    monkeypatch.setattr(bench.rivals, "needs_gpu", lambda *_, **__: None)
    for arm in bench.arms.ARMS:
        if arm.name == "quack":
            data = loss_bench.problem(bench, arm.form, "fp32")
            before = data.logits.clone() if arm.form == "logits" else None
            data.gradients = {}
            bench.arms.finish(arm.make(data))
            if before is None:
                product = (data.hidden @ data.weight.T).requires_grad_()
                F.cross_entropy(product, data.labels, reduction="sum").backward()
                torch.testing.assert_close(data.gradients["hidden"], product.grad @ data.weight)
            else:
                assert seen[-1] == arm.in_place == (not torch.equal(before, data.logits))
    assert sorted(seen) == [False, True]


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("liger", "logits", "its Triton kernels need a CUDA device"),
        ("verl", "hidden", "its Triton kernels need a CUDA device"),
        ("cce", "hidden", "its Triton kernels need a CUDA device"),
        ("quack", "logits", "its CuTe kernels need a CUDA device"),
        ("quack", "hidden", "its CuTe kernels need a CUDA device"),
    ],
)
def test_arms_that_need_a_gpu_say_so(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, form: str, reason: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for arm in bench.arms.ARMS:
        if (arm.name, arm.form) == (name, form):
            with pytest.raises(bench.rivals.Absent, match=reason):
                arm.make(loss_bench.problem(bench, form, "fp32"))


def test_a_release_without_the_function_is_a_reason(bench: SimpleNamespace, install: Callable[..., None]) -> None:
    install("trl.trainer.utils")
    (arm,) = [arm for arm in bench.arms.ARMS if (arm.name, arm.form) == ("trl", "logits")]
    with pytest.raises(bench.rivals.Absent, match=r"selective_log_softmax of trl\.trainer\.utils cannot be imported"):
        arm.make(loss_bench.problem(bench, "logits", "fp32"))
