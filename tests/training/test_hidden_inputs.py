"""The loss from hidden states is the loss from logits: gradients and metrics of updates, on one process and on two ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
import torch
from srpo_kernels import topk_support
from torch import nn

from srpo.core.config.train import LossConfig, RolloutConfig
from srpo.policy.model import Policy, check_head
from srpo.training.update import Objective, update, with_logprobs

Update = tuple[dict[str, torch.Tensor], dict[str, float]]


def same(got: Update, want: Update, tolerance: float) -> None:
    assert got[0].keys() == want[0].keys() and got[1].keys() == want[1].keys()
    for name, gradient in want[0].items():
        assert float((got[0][name] - gradient).norm()) <= tolerance * float(gradient.norm()), name
    assert got[1] == pytest.approx(want[1], rel=tolerance, abs=tolerance / 10)


def replayed(seed: int) -> list[Any]:
    """Batches with the engine's support: another policy's top ids, and the label."""
    parts, older = [], Policy(lab.tiny(7))
    for batch in lab.batches(seed, 30):
        index, rows = batch.rows()
        with torch.no_grad():
            kept = topk_support(older(batch), 9)
        kept[:, 0] = torch.where((kept == rows.labels[:, None]).any(1), kept[:, 0], rows.labels)
        table = torch.full((len(batch.labels), 9), -1).index_copy(0, index, kept)
        parts.append(batch.with_(kept_ids=table))
    return parts


class Recorder(torch.optim.SGD):
    """An optimizer that steps and keeps the gradients of all steps."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.parameters(), lr=0.02)
        self.policy = policy
        self.gradients: dict[str, torch.Tensor] = {}

    def step(self, closure: Any = None) -> None:
        number = len(self.gradients)
        named = self.policy.named_parameters()
        self.gradients |= {f"{number}/{name}": p.grad.clone() for name, p in named if p.grad is not None}
        super().step(closure)


def updates(parts: list[Any], objective: Objective, folder: Path, *, tied: bool, double: bool) -> Update:
    """(gradients of two updates, metrics of both), the second one off-policy where it can be."""
    policy, reference = (Policy(lab.tiny(seed, tied=tied)) for seed in (1, 2))
    if double:
        policy, reference = policy.double(), reference.double()
    optimizer = Recorder(policy)
    ready = with_logprobs(parts, policy, reference, objective, lab.one_process())
    metrics: dict[str, float] = {}
    for i in range(2):
        result = update(
            policy,
            optimizer,
            ready,
            objective,
            lab.one_process(),
            step_names=lab.STEPS,
            grad_clip=0.0,
            dump=folder / "dump.pt",
            reference=reference,
        )
        metrics |= {f"{i}/{key}": value for key, value in result.items()}
    return optimizer.gradients, metrics


CASES: dict[str, dict[str, Any]] = {
    "one_update": {},
    "several_updates": {"num_updates": 2, "clip_eps_low": 0.02, "clip_eps_high": 0.02},
    "full": {"kl_estimator": "full"},
    "full_unfiltered": {"kl_estimator": "full", "top_k": None, "num_updates": 2},
    "k1": {"kl_estimator": "k1", "num_updates": 2},
    "unfiltered": {"kl_estimator": "k2", "top_k": None, "importance": "truncate"},
    "no_kl": {"kl_coef": 0.0, "importance": "mask"},
    "importance": {"importance": "truncate", "num_updates": 2, "top_k": None},
    "sequence": {"ratio_over": "sequence", "num_updates": 2, "clip_eps_low": 0.01, "clip_eps_high": 0.01},
    "step": {"ratio_over": "step", "num_updates": 2, "clip_form": "cispo"},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_from_logits(tmp_path: Path, case: str, tied: bool) -> None:
    parts = lab.batches(4, 30)
    objective = lab.changed(lab.ON_POLICY, **CASES[case])
    want = updates(parts, objective, tmp_path, tied=tied, double=True)
    got = updates(parts, replace(objective, inputs="hidden"), tmp_path, tied=tied, double=True)
    same(got, want, 1e-7)
    if objective.num_updates > 1 and objective.options.clip_eps_low < 0.1:
        assert want[1]["1/policy/clip_frac"] > 0.02


@pytest.mark.parametrize("case", ["several_updates", "no_kl", "unfiltered"])
def test_the_fastest_implementation_too(tmp_path: Path, case: str) -> None:
    parts = lab.batches(4, 30)
    objective = lab.changed(lab.ON_POLICY, **CASES[case], impl="auto")
    want = updates(parts, objective, tmp_path, tied=False, double=False)
    same(updates(parts, replace(objective, inputs="hidden"), tmp_path, tied=False, double=False), want, 1e-4)


@pytest.mark.parametrize("num_updates", [1, 2])
def test_a_replayed_support_is_used(tmp_path: Path, num_updates: int) -> None:
    objective = replace(lab.ON_POLICY, top_k=9, sampling_top_k=9, num_updates=num_updates)
    parts = replayed(3)
    want = lab.gradients(parts, lab.one_process(), tmp_path / "dump.pt", objective)
    same(lab.gradients(parts, lab.one_process(), tmp_path / "dump.pt", replace(objective, inputs="hidden")), want, 1e-5)


@pytest.mark.parametrize("case", ["untied", "tied", "idle_rank", "several_updates", "full"])
def test_two_ranks_are_one_process_from_logits(two_ranks: Path, tmp_path: Path, case: str) -> None:
    objective, options = lab.HIDDEN[case]
    plain = replace(objective, inputs="logits", impl="reference")
    want = lab.gradients(lab.batches(7), lab.one_process(), tmp_path / "dump.pt", plain, **options)
    same(torch.load(two_ranks / "tensors.pt")["updates"][f"hidden_{case}"], want, 1e-5)


def test_bfloat16_is_as_near_to_fp32_as_from_logits(two_ranks: Path, tmp_path: Path) -> None:
    gradients, _ = torch.load(two_ranks / "tensors.pt")["updates"]["hidden_bfloat16"]
    want, _ = lab.gradients(lab.batches(7), lab.one_process(), tmp_path / "dump.pt", tied=True)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    got, exact = (torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (gradients, want))
    assert 1e-4 < (got - exact).norm() / exact.norm() < 0.15


def test_an_update_never_calls_the_head(tmp_path: Path) -> None:
    """With inputs "hidden" no code path computes logits through the head."""
    policy, reference = Policy(lab.tiny(1)), Policy(lab.tiny(2))
    for model in (policy, reference):
        model.model.lm_head.forward = None  # not callable
    for num_updates in (1, 2):
        objective = replace(lab.ON_POLICY, inputs="hidden", num_updates=num_updates)
        ready = with_logprobs(lab.batches(0), policy, reference, objective, lab.one_process())
        arguments = {"step_names": lab.STEPS, "grad_clip": 0.0, "dump": tmp_path / "dump.pt", "reference": reference}
        metrics = update(policy, lab.Recorder(policy), ready, objective, lab.one_process(), **arguments)
        assert metrics["policy/kl"] > 0.01


def test_the_objective_reads_the_config() -> None:
    assert Objective.from_config(LossConfig(), RolloutConfig()).inputs == "logits"
    assert Objective.from_config(LossConfig(inputs="hidden"), RolloutConfig()).inputs == "hidden"


def test_a_head_that_is_more_than_a_matrix_is_refused() -> None:
    model = lab.tiny()
    for inputs in ("logits", "hidden"):
        check_head(model, inputs)
        check_head(lab.tiny(tied=True), inputs)
        cases = (("lm_head_multiplier", 1.0, 8.0), ("output_multiplier", 1, 0.0625), ("final_logit_softcapping", None, 30.0))
        for name, plain, other in cases:
            setattr(model.config, name, plain)
            check_head(model, inputs)
            setattr(model.config, name, other)
            with pytest.raises(ValueError, match=rf"changes its logits after the head \({name}\)"):
                check_head(model, inputs)
            setattr(model.config, name, plain)
    model.lm_head = nn.Linear(32, lab.VOCAB)
    check_head(model, "logits")
    with pytest.raises(ValueError, match=r"inputs of the loss are 'hidden'.*has a bias: set inputs to 'logits'"):
        check_head(model, "hidden")
