"""The registered ops of srpo_kernels on the device: torch's own checks of them, and one compiled graph against eager."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu_proof import lab
from gpu_proof.parts import Found, small

BAR = 1e-5  # relative error of the compiled gradient against eager's by the same kernel, fp32
VOCAB = 64 if small() else 4096


def case(impl: str, rows: int, name: str) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """(case, logits, tables) of random rows on the device. Raises Skip if the implementation cannot run there."""
    from loss_cases import a_seed, draw

    drawn = draw(a_seed(), rows, VOCAB, torch.float32, name, nan=False)
    logits = drawn.logits.to(lab.device())
    lab.needs_backend(impl, logits)
    tables = {key: None if value is None else value.to(lab.device()) for key, value in drawn.tables.items()}
    return drawn, logits, tables


def registered(impl: str, name: str) -> Found:
    """torch.library.opcheck of the loss, the loss in place and the log-probabilities."""
    from srpo_kernels import LossOptions, operators

    drawn, logits, tables = case(impl, 40, name)
    options = LossOptions(**drawn.options).packed
    names = ("labels", "step_advantages", "step_ends", "cu_seqlens", "weights", "old_logprobs", "ref_logprobs", "kept_ids")
    flat = [tables[key] for key in (*names, "ref_logits")]
    for x in (logits, logits.clone().requires_grad_()):
        torch.library.opcheck(operators.policy_loss, (x, *flat, options, x.requires_grad, impl))
        torch.library.opcheck(operators.token_logprobs, (x, tables["labels"], tables["kept_ids"], 0.7, impl))
    torch.library.opcheck(operators.policy_loss_, (logits.clone(), *flat, options, impl))
    return None


def compiled(impl: str) -> Found:
    """torch.compile(fullgraph=True) of a head and the loss: the same loss and gradients as without it."""
    from srpo_kernels import LossOptions, policy_loss

    _, _, tables = case(impl, 64, "on_policy")
    factors = [torch.randn(64, 32, device=lab.device()), torch.randn(VOCAB, 32, device=lab.device())]
    tables |= {"ref_logprobs": None}  # those of the case belong to other logits
    options = LossOptions(clip_eps_low=0.2, clip_eps_high=0.2, kl_coef=0.0, kl_estimator="k3", temperature=0.9)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return policy_loss(hidden @ weight.T, **tables, options=options, impl=impl).loss

    def gradients(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in factors]
        return list(torch.autograd.grad(function(*inputs), inputs))

    torch.set_float32_matmul_precision("highest")  # no tf32
    backend = "aot_eager" if small() else "inductor"  # a dry run does not wait for the compiler
    got, wanted = gradients(torch.compile(loss, fullgraph=True, backend=backend)), gradients(loss)
    errors = {name: lab.relative(g, w) for name, g, w in zip(("hidden", "weight"), got, wanted, strict=True)}
    lab.hold(errors, BAR, got, wanted)
    return None


def operator_parts() -> dict[str, Callable[[], Found]]:
    """The parts, for each implementation of the device."""
    parts: dict[str, Callable[[], Found]] = {}
    for impl in lab.implementations():
        for name in ("k3", "full", "kept"):
            parts[f"opcheck {impl}, {name}"] = partial(registered, impl, name)
        parts[f"compiled {impl}"] = partial(compiled, impl)
    return parts
