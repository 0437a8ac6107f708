from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import policy_lab as lab
import pytest
import torch
from srpo_kernels import token_logprobs, topk_support

from srpo.core.batch import Batch
from srpo.core.config.train import LossConfig, RolloutConfig
from srpo.core.metrics import check_key
from srpo.policy.model import Policy
from srpo.training.update import NonFiniteError, Objective, optimizer_step, read_dump, update, with_logprobs


def run(
    policy: Policy, parts: list[Batch], objective: Objective, tmp_path: Path, reference: Policy | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """(gradients, metrics) of `update` on batches as they are."""
    recorder = lab.Recorder(policy)
    metrics = update(
        policy,
        recorder,
        parts,
        objective,
        lab.one_process(),
        step_names=lab.STEPS,
        grad_clip=0.0,
        dump=tmp_path / "dump.pt",
        reference=reference,
    )
    return recorder.gradients, metrics


def labelled(
    batch: Batch, policy: Policy, temperature: float, top_k: int | None, support_of: Policy | None = None
) -> torch.Tensor:
    """Log-probabilities of the labels, computed directly, [R]. support_of: the policy whose top-k support is used."""
    with torch.no_grad():
        logits = policy(batch)
        kept = topk_support((support_of or policy)(batch), top_k) if top_k else None
        return token_logprobs(logits, batch.rows()[1].labels, temperature=temperature, kept_ids=kept, impl="reference")[0]


def test_objective_reads_the_config() -> None:
    filtered = Objective.from_config(LossConfig(clip_eps_high=0.3, num_updates=2), RolloutConfig(temperature=0.7, top_k=20))
    assert (filtered.options.clip_eps_high, filtered.num_updates, filtered.options.temperature) == (0.3, 2, 0.7)
    assert (filtered.top_k, filtered.sampling_top_k) == (20, 20)
    unfiltered = Objective.from_config(LossConfig(), RolloutConfig(top_k=20, ratio="unfiltered"))
    assert (unfiltered.top_k, unfiltered.sampling_top_k) == (None, 20)
    assert Objective.from_config(LossConfig(), RolloutConfig(top_k=0)).sampling_top_k is None


def test_one_update_needs_no_old_logprobs() -> None:
    policy, reference = Policy(lab.tiny(1)), Policy(lab.tiny(2))
    (filtered,) = with_logprobs(lab.batches(0), policy, reference, lab.ON_POLICY, lab.one_process())
    assert filtered.old_logprobs is None and filtered.kept_ids is None and filtered.ref_logprobs is None
    objective = replace(lab.ON_POLICY, top_k=None)
    (unfiltered,) = with_logprobs(lab.batches(0), policy, reference, objective, lab.one_process())
    index, _ = unfiltered.rows()
    assert unfiltered.old_logprobs is None and unfiltered.ref_logprobs is not None
    assert torch.allclose(unfiltered.ref_logprobs[index], labelled(unfiltered, reference, 0.9, None), atol=1e-6)


def test_several_updates_fix_old_support_and_reference() -> None:
    policy, reference = Policy(lab.tiny(1)), Policy(lab.tiny(2))
    objective = replace(lab.ON_POLICY, num_updates=2)
    (batch,) = with_logprobs(lab.batches(0), policy, reference, objective, lab.one_process())
    index, rows = batch.rows()
    assert rows.kept_ids is not None and rows.old_logprobs is not None and rows.ref_logprobs is not None
    assert torch.equal(rows.kept_ids, topk_support(policy(batch), 10))
    assert torch.allclose(rows.old_logprobs, labelled(batch, policy, 0.9, 10), atol=1e-6)
    assert torch.allclose(rows.ref_logprobs, labelled(batch, reference, 0.9, 10, support_of=policy), atol=1e-6)
    ignored = torch.ones(len(batch.labels), dtype=torch.bool).index_fill(0, index, False)
    assert batch.old_logprobs is not None and not batch.old_logprobs[ignored].any()
    assert batch.ref_logprobs is not None and not batch.ref_logprobs[ignored].any()


@pytest.mark.parametrize("top_k", [None, 10])
@pytest.mark.parametrize("estimator", ["k3", "full"])
def test_first_of_several_updates_equals_the_only_one(top_k: int | None, estimator: str, tmp_path: Path) -> None:
    """Old log-probabilities computed in advance equal those of the update's own forward."""
    results = []
    for num_updates in (1, 2):
        objective = lab.changed(lab.ON_POLICY, top_k=top_k, kl_estimator=estimator, num_updates=num_updates)
        results.append(lab.gradients(lab.batches(4, 30), lab.one_process(), tmp_path / "dump.pt", objective))
    (grads, metrics), (grads_ahead, metrics_ahead) = results
    assert metrics == pytest.approx(metrics_ahead, rel=1e-5, abs=1e-6)
    assert metrics["policy/kl"] > 0.01
    for name, grad in grads.items():
        assert (grad - grads_ahead[name]).norm() <= 1e-4 * grad.norm(), name


def test_metrics_are_declared_and_right(tmp_path: Path) -> None:
    policy, parts = Policy(lab.tiny(1)), lab.batches(5, 30)
    objective = lab.changed(lab.ON_POLICY, kl_coef=0.0)
    _, metrics = run(policy, parts, objective, tmp_path)
    for key in metrics:
        check_key(key)
    gap = torch.cat([labelled(b, policy, 0.9, 10) - b.rows()[1].sampling_logprobs for b in parts]).double()
    assert metrics["train/num_tokens"] == len(gap)
    assert metrics["rollout/mismatch_kl"] == pytest.approx(float((gap.exp() - 1 - gap).mean()), rel=1e-5)
    assert metrics["rollout/mismatch_max"] == pytest.approx(float(gap.abs().max()), rel=1e-5)
    assert metrics["policy/ratio"] == pytest.approx(1.0) and metrics["policy/clip_frac"] == 0
    assert 0 < metrics["policy/entropy"] < 2.31  # log 10: the filtered distribution's


@pytest.mark.parametrize("num_updates", [1, 2])
@pytest.mark.parametrize("top_k", [None, 10])
def test_no_mismatch_where_the_engine_sampled_what_the_trainer_computes(
    num_updates: int, top_k: int | None, tmp_path: Path
) -> None:
    policy = Policy(lab.tiny(1))
    parts = []
    for batch in lab.batches(6, 30):  # the engine filters, even if ratios are unfiltered
        index, _ = batch.rows()
        exact = torch.zeros(len(batch.labels)).index_copy(0, index, labelled(batch, policy, 0.9, 10))
        parts.append(batch.with_(sampling_logprobs=exact))
    objective = lab.changed(lab.ON_POLICY, top_k=top_k, num_updates=num_updates, kl_coef=0.0)
    ready = with_logprobs(parts, policy, None, objective, lab.one_process())
    _, metrics = run(policy, ready, objective, tmp_path)
    assert metrics["rollout/mismatch_max"] < 1e-5
    assert abs(metrics["rollout/mismatch_kl"]) < 1e-9


def test_step_goes_down_the_gradient_after_the_clip(tmp_path: Path) -> None:
    policy = Policy(lab.tiny(1))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    objective = lab.changed(lab.ON_POLICY, kl_coef=0.0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    arguments = {"step_names": lab.STEPS, "grad_clip": 0.01, "dump": tmp_path / "dump.pt"}
    metrics = update(policy, optimizer, lab.batches(0), objective, lab.one_process(), **arguments)
    moved = torch.stack([(p.detach() - before[name]).norm() for name, p in policy.named_parameters()]).norm()
    assert metrics["train/grad_norm"] > 0.01
    assert float(moved) == pytest.approx(0.01, rel=1e-3)
    again = update(policy, optimizer, lab.batches(0), objective, lab.one_process(), **arguments)
    assert again["train/grad_norm"] > 0.01  # gradients did not pile up or vanish
    assert all(p.grad is None for p in policy.parameters())


def test_kl_without_a_reference_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kl_coef"):
        run(Policy(lab.tiny()), lab.batches(0), lab.ON_POLICY, tmp_path)


@pytest.mark.parametrize("poison", ["weights", "parameter"])
def test_non_finite_stops_before_the_step_with_a_dump_that_reproduces_it(poison: str, tmp_path: Path) -> None:
    policy, parts = Policy(lab.tiny(1)), lab.batches(3, 30)
    if poison == "weights":
        parts[1] = parts[1].with_(weights=parts[1].weights * float("inf"))
    else:
        policy.model.lm_head.weight.data[4, 2] = float("nan")
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    objective = lab.changed(lab.ON_POLICY, kl_coef=0.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    dump = tmp_path / "deep" / "dump.pt"
    arguments = {"step_names": lab.STEPS, "grad_clip": 1.0, "dump": dump}
    with pytest.raises(NonFiniteError, match=str(dump)):
        update(policy, optimizer, parts, objective, lab.one_process(), info={"step": 12}, **arguments)
    assert all(torch.equal(p.nan_to_num(7), before[name].nan_to_num(7)) for name, p in policy.named_parameters())

    state = read_dump(dump)
    assert state["info"]["step"] == 12
    again = Policy(lab.tiny(9))
    again.load_state_dict(state["parameters"])
    assert state["info"]["objective"] == objective
    arguments["dump"] = tmp_path / "again.pt"
    with pytest.raises(NonFiniteError):
        update(again, torch.optim.AdamW(again.parameters()), state["batches"], objective, lab.one_process(), **arguments)
    assert str(read_dump(tmp_path / "again.pt")["losses"]) == str(state["losses"])


def test_non_finite_on_one_rank_stops_all_and_each_dumps(two_ranks: Path) -> None:
    assert json.loads((two_ranks / "results.json").read_text())["stopped"] == [True, True]
    assert torch.isnan(read_dump(two_ranks / "dump.rank1.pt")["batches"][0].weights).any()
    assert not torch.isnan(read_dump(two_ranks / "dump.pt")["batches"][0].weights).any()


def test_optimizer_step_takes_any_loss(tmp_path: Path) -> None:
    """The loss of SFT falls after some steps."""
    policy, (batch,) = Policy(lab.tiny(1)), lab.batches(2)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)

    def loss_of(batch: Batch) -> torch.Tensor:
        return -token_logprobs(policy(batch), batch.rows()[1].labels, temperature=1.0)[0].mean()

    results = [
        optimizer_step(policy, optimizer, [batch], loss_of, lab.one_process(), grad_clip=1.0, dump=tmp_path / "dump.pt")
        for _ in range(8)
    ]
    assert results[-1].loss < 0.8 * results[0].loss
