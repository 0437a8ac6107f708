"""Stage train_step: one update of a small mixture of experts in bf16 under FSDP2, by each kernel, against two references.

The references are the eager loss on the same device in bf16, and fp32 on the CPU. Compared are the step itself (its direction by
the cosine) and the norm of the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch

from gpu_proof import lab
from gpu_proof.parts import Found, Wrong, figure, small, state

VOCAB = 500 if small() else 4096
LENGTHS = [(5, 12), (17, 40), (3, 60), (9, 31), (30, 8), (1, 25)]  # (prompt, response)
# Bars: 1 - cosine of the step, and relative error of the gradient's norm.
EAGER_BAR, EXACT_BAR, NORM_BAR = 0.005, 0.02, 0.05


@dataclass(frozen=True)
class Case:
    """How the step is computed. top_k: filter of the ratio, None without."""

    device: str
    dtype: str = "bfloat16"
    impl: str = "reference"
    inputs: Literal["logits", "hidden"] = "logits"
    top_k: int | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class Outcome:
    step: torch.Tensor  # all parameters' changes, fp32 on the CPU
    grad_norm: float
    ms: float  # of the second update, which compiles nothing


@cache
def outcome(case: Case) -> Outcome:
    """Two updates with SGD, so that the step is the clipped gradient; the first one counts."""
    from policy_lab import STEPS, rollouts
    from srpo_kernels import LossOptions

    from srpo.core.batch import pack
    from srpo.policy.model import Policy, load_policy
    from srpo.policy.parallel import Parallel, iter_full_params
    from srpo.training.update import Objective, update

    parallel = Parallel(0, 1, 0, torch.device(case.device))
    model = Policy(load_policy(lab.tiny_model(VOCAB)), activation_checkpointing=case.checkpointing)
    policy = parallel.shard(model, dtype=case.dtype)
    options = LossOptions(clip_eps_low=0.2, clip_eps_high=0.2, kl_coef=0.0, kl_estimator="k3", temperature=0.99)
    objective = Objective(
        options, case.top_k, case.top_k, 1, impl=case.impl, inputs="hidden" if case.inputs == "hidden" else "logits"
    )
    draw = torch.Generator().manual_seed(1)
    advantages = torch.randn(len(LENGTHS), len(STEPS), generator=draw)
    batches = pack(rollouts(1, LENGTHS), advantages, torch.full((len(LENGTHS),), 1 / 176), None)
    batches = [batch.to(parallel.device) for batch in batches]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)

    def weights() -> torch.Tensor:
        return torch.cat([value.detach().float().cpu().flatten() for _, value in iter_full_params(policy)])

    dump = state() / "train_step.pt"
    once = partial(update, policy, optimizer, batches, objective, parallel, step_names=STEPS, grad_clip=1.0, dump=dump)
    before = weights()
    metrics = once()
    step = weights() - before
    return Outcome(step, metrics["train/grad_norm"], lab.elapsed_ms(once))


def against(case: Case) -> Found:
    """Hold a case to the eager loss on the device, if it is not the eager loss itself, and to fp32 on the CPU. Raises Skip if
    the kernel cannot run there."""
    lab.needs_backend(case.impl, torch.empty(0, VOCAB, dtype=getattr(torch, case.dtype), device=case.device))
    got = outcome(case)
    exact = outcome(Case("cpu", dtype="float32", top_k=case.top_k))
    bars = {"fp32 on the CPU": (exact, EXACT_BAR)}
    rival: dict[str, Any] = {}
    if case.impl != "reference":
        eager = outcome(replace(case, impl="reference", inputs="logits", checkpointing=False))
        bars["eager"] = (eager, EAGER_BAR)
        rival = {"rival": eager.ms, "rival_of": "eager"}
    figures, wrong = [], []
    for name, (other, bar) in bars.items():
        turned = abs(1 - float(torch.nn.functional.cosine_similarity(got.step.double(), other.step.double(), dim=0)))
        norm = abs(got.grad_norm / other.grad_norm - 1)
        figures += [figure(f"1 - cosine of the step, {name}", turned, "", bar=bar)]
        figures += [figure(f"error of the gradient's norm, {name}", norm, "", bar=NORM_BAR)]
        wrong += [name] if not (turned <= bar and norm <= NORM_BAR) else []
    if wrong or not math.isfinite(got.grad_norm):
        raise Wrong(f"the step differs from {' and '.join(wrong)}", figures=figures)
    return {"figures": [*figures, figure("update", got.ms, "ms", **rival)]}


def main() -> None:
    device, cases = lab.device().type, {}
    for top_k in (None, 50):
        for impl in ("reference", *lab.implementations()):
            for inputs in ("logits", "hidden"):
                name = f"{impl}, {inputs}{f', top {top_k}' if top_k else ''}"
                cases[name] = Case(device, impl=impl, inputs=inputs, top_k=top_k)
    cases["auto, checkpointing"] = Case(device, impl="auto", checkpointing=True)
    cases["auto, fp32"] = Case(device, dtype="float32", impl="auto")
    lab.run({name: partial(against, case) for name, case in cases.items()} | {"leave": leave})


def leave() -> Found:
    """Close the process group."""
    from srpo.policy.parallel import Parallel

    Parallel(0, 1, 0, lab.device()).close()
    return None
