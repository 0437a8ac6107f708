"""The public functions of `srpo_kernels`: the choice of an implementation, and errors for bad input."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import srpo_kernels
import torch
from loss_cases import policy_loss
from srpo_kernels import cpu, cuda, token_logprobs, topk_support, triton_rows


def good_input() -> dict[str, Any]:
    """Two sequences of 3 and 4 rows, two steps, a vocabulary of 5."""
    return {
        "logits": torch.randn(7, 5),
        "labels": torch.randint(5, (7,)),
        "step_advantages": torch.randn(2, 2),
        "step_ends": torch.tensor([[1, 3], [2, 4]]),
        "cu_seqlens": torch.tensor([0, 3, 7]),
        "weights": torch.ones(7),
        "ref_logprobs": -torch.ones(7),
        "clip_eps_low": 0.2,
        "clip_eps_high": 0.2,
        "kl_coef": 0.0,
        "kl_estimator": "k3",
        "temperature": 1.0,
    }


def test_a_missing_implementation_is_named() -> None:
    x = good_input()
    best, *_, last = srpo_kernels.implementations(x["logits"])
    assert last == "reference"
    assert torch.equal(policy_loss(**x, impl=best).loss, policy_loss(**x, impl="auto").loss)
    with pytest.raises(ValueError, match=r"policy_loss has no implementation 'abacus': .*cpu, reference"):
        policy_loss(**x, impl="abacus")
    with pytest.raises(ValueError, match=r"token_logprobs has no implementation 'abacus'"):
        token_logprobs(x["logits"], x["labels"], temperature=1.0, impl="abacus")


def test_an_implementation_that_cannot_take_the_input_says_why() -> None:
    x: dict[str, Any] = {**good_input(), "logits": torch.randn(7, 5, dtype=torch.float64)}
    assert srpo_kernels.implementations(x["logits"]) == ("reference",)
    assert policy_loss(**x).loss.dtype == torch.float64
    with pytest.raises(ValueError, match=r"'cpu' cannot be used because logits are torch.float64: give one of auto, reference"):
        policy_loss(**x, impl="cpu")


def test_without_a_compiler_the_reference_runs_and_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SRPO_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu.library.cache_clear()
    try:
        x = good_input()
        with pytest.warns(UserWarning, match="reference implementation is used instead: no-such-compiler is not on the PATH"):
            assert srpo_kernels.implementations(x["logits"]) == ("reference",)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            policy_loss(**x)
        with pytest.raises(ValueError, match="install a C\\+\\+ compiler"):
            policy_loss(**x, impl="cpu")
    finally:
        cpu.library.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_estimator": "k4"}, "k1, k2, k3, full"),
        ({"kl_coef": 0.1, "ref_logprobs": None}, "give ref_logprobs, or set kl_coef to 0"),
        ({"kl_coef": 0.1, "kl_estimator": "full"}, "give ref_logits, or set kl_coef to 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"clip_eps_low": -0.1}, "must not be negative"),
        ({"clip_eps_high": float("nan")}, "must not be negative"),
        ({"dual_clip": 1.0}, "above 1"),
        ({"ratio_over": "response"}, "token, step, sequence"),
        ({"top_k": -3}, "top_k is -3"),
        ({"logits": torch.ones(7, 5, dtype=torch.long)}, "give fp32, bf16, fp16 or fp64"),
        ({"clip_form": "clip"}, "ppo, cispo"),
        ({"clip_form": "cispo", "dual_clip": 2.0}, "leave it at None"),
        ({"weights": torch.ones(3)}, "weights has shape"),
        ({"labels": torch.ones(3, dtype=torch.long)}, r"labels \(3,\) do not fit"),
        ({"ref_logits": torch.ones(3, 5)}, "ref_logits has shape"),
        ({"step_ends": torch.ones(2, 3)}, r"step_ends \(2, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens has shape"),
        ({"cu_seqlens": torch.tensor([0, 3, 6])}, "set its last entry to T"),
        ({"cu_seqlens": torch.tensor([1, 3, 7])}, "set its first entry to 0"),
        ({"cu_seqlens": torch.tensor([7]), "step_ends": torch.ones(0, 2), "step_advantages": torch.ones(0, 2)}, "no sequence"),
        ({"kept_ids": torch.ones(3, 2)}, "kept_ids has shape"),
    ],
)
def test_bad_input_says_what_to_do(change: dict[str, Any], message: str) -> None:
    policy_loss(**good_input())
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**good_input(), **change})


def test_a_support_needs_an_id() -> None:
    with pytest.raises(ValueError, match="at least one id"):
        topk_support(torch.ones(2, 2), 0)


@pytest.mark.parametrize(
    ("capability", "cuda_takes", "triton_takes"),
    [((7, 5), False, False), ((8, 0), False, True), ((8, 9), False, True), ((9, 0), True, True), ((12, 0), True, True)],
)
def test_backends_by_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda_takes: bool, triton_takes: bool
) -> None:
    """An older GPU is refused before anything is compiled for it."""
    compiled: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "library", lambda: compiled.append("cuda"))
    monkeypatch.setattr(triton_rows, "kernels", lambda: ModuleType("kernels"))
    monkeypatch.setattr(triton_rows, "interpreted", lambda: False)
    logits: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert (cuda.why_not(logits) is None) == cuda_takes == bool(compiled)
    assert (triton_rows.why_not(logits) is None) == triton_takes
