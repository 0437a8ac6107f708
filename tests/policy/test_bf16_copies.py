"""bf16 in one process on a CPU: the gradients of FSDP2 bit for bit, while everything outside a forward sees fp32 parameters."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
import torch

from srpo.core.config.train import OptimizerConfig
from srpo.policy.bf16_copies import has_bf16_copies
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.model import Policy
from srpo.training.optim import make_optimizer
from srpo.training.update import update, with_logprobs

BF16, FP32 = torch.bfloat16, torch.float32


def policy_of(seed: int = 1, *, tied: bool = False, fsdp: bool = False, **options: bool) -> Policy:
    parallel, policy = lab.one_process(), Policy(lab.tiny(seed, tied=tied), **options)
    return parallel.fully_shard(policy, "bfloat16") if fsdp else parallel.shard(policy, dtype="bfloat16")


def gradients(batches: list[Any], dump: Path, *, fsdp: bool, frozen: str = "", **options: bool) -> dict[str, torch.Tensor]:
    """Results of one update with a reference; parameters with `frozen` in their name have none."""
    policy = Policy(lab.tiny(1, tied=options.pop("tied", False)), **options)
    for name, param in policy.named_parameters():
        param.requires_grad_(not frozen or frozen not in name)
    parallel, reference = lab.one_process(), Policy(lab.tiny(2).requires_grad_(False))
    shard = parallel.fully_shard if fsdp else parallel.shard
    policy, reference = shard(policy, dtype="bfloat16"), shard(reference, dtype="bfloat16")
    found: dict[str, torch.Tensor] = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            found.update({name: lab.full(p.grad).clone() for name, p in policy.named_parameters() if p.grad is not None})

    recorder = Recorder([p for p in policy.parameters() if p.requires_grad], lr=0.0)
    ready = with_logprobs(batches, policy, reference, lab.ON_POLICY, parallel)
    update(policy, recorder, ready, lab.ON_POLICY, parallel, step_names=lab.STEPS, grad_clip=0.0, dump=dump, reference=reference)
    return found


@pytest.mark.parametrize(
    ("options", "routed"),
    [
        ({}, False),
        ({"tied": True}, False),
        ({"activation_checkpointing": True, "tied": True}, False),
        ({"activation_checkpointing": True, "replay_routing": True}, True),
        ({"frozen": "experts"}, False),
    ],
)
def test_gradients_are_those_of_fsdp2(tmp_path: Path, options: dict[str, Any], routed: bool) -> None:
    batches = lab.batches(random.randrange(1000), 23, routed=routed)
    assert len(batches) > 1
    ours = gradients(batches, tmp_path / "dump", fsdp=False, **options)
    assert not torch.distributed.is_initialized()
    try:
        theirs = gradients(batches, tmp_path / "dump", fsdp=True, **options)
    finally:
        lab.one_process().close()
    assert len(ours) > 5 and {grad.dtype for grad in ours.values()} == {FP32}
    assert lab.same_bits(ours, theirs)


def logits(policy: Policy, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return policy(batch)


def test_a_forward_sees_every_write_of_a_parameter(tmp_path: Path) -> None:
    (batch,) = lab.batches(random.randrange(1000))
    policy = policy_of()
    optimizer = make_optimizer(policy.parameters(), OptimizerConfig(lr=0.01))
    seen = [logits(policy, batch)]
    for _ in range(2):
        policy(batch).float().logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(logits(policy, batch))
    save_checkpoint(tmp_path, 1, policy, optimizer, {}, lab.one_process())
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(2)
    seen.append(logits(policy, batch))
    assert torch.equal(seen[-1], 2 * seen[-2])
    for param in policy.parameters():
        param.data = torch.zeros_like(param)
    assert not logits(policy, batch).any()
    load_checkpoint(tmp_path / "step_000001", policy, optimizer, lab.one_process())
    assert torch.equal(logits(policy, batch), seen[2])
    assert len({float(each.double().sum()) for each in seen}) == len(seen) and seen[0].dtype == BF16


def test_outside_of_a_forward_parameters_are_fp32_and_the_same(tmp_path: Path) -> None:
    (batch,) = lab.batches(random.randrange(1000))
    plain = Policy(lab.tiny(1, tied=True))
    before = dict(plain.named_parameters(remove_duplicate=False))
    policy = lab.one_process().shard(plain, dtype="bfloat16")
    inside = []
    norm: Any = policy.model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda module, *_: inside.append((module.weight.dtype, policy.model.lm_head.weight.dtype)))
    policy(batch).float().sum().backward()
    assert inside == [(BF16, BF16)]
    after = dict(policy.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert {p.dtype for p in policy.parameters()} == {
        FP32
    } and policy.model.lm_head.weight is policy.model.model.embed_tokens.weight

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of a forward")

    norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        policy(batch)
    assert all(param is before[name] for name, param in policy.named_parameters(remove_duplicate=False))


def test_fp32_and_sharded_policies_have_no_copies() -> None:
    assert has_bf16_copies(policy_of()) and has_bf16_copies(policy_of().model)
    assert not has_bf16_copies(lab.one_process().shard(Policy(lab.tiny())))
