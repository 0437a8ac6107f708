"""Helpers of the tests of adapters, and their part on two ranks (`main`, called by policy_ranks.py), of which rank 0 writes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import policy_lab as lab
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from srpo.core.batch import Batch
from srpo.core.config.train import LoraConfig, PolicyConfig
from srpo.policy.adapters import add_adapter, iter_merged_params, save_adapter
from srpo.policy.attention import ATTENTION
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.checkpoint_folders import latest_checkpoint
from srpo.policy.loading import _parameters_on_meta
from srpo.policy.model import Policy, Start
from srpo.policy.parallel import Parallel
from srpo.training.update import Objective, update, with_logprobs

RANK = 3
# Cases of `gradients`: (objective, options).
CASES: dict[str, tuple[Objective, dict[str, Any]]] = {
    "logits": (lab.ON_POLICY, {}),
    "hidden": (replace(lab.ON_POLICY, inputs="hidden", impl="auto"), {"activation_checkpointing": True}),
    "hidden_full": (lab.changed(lab.ON_POLICY, inputs="hidden", kl_estimator="full"), {}),
    "several_updates": (replace(lab.ON_POLICY, num_updates=2), {}),
}


def settings(path: Any = "base", **lora: Any) -> PolicyConfig:
    return PolicyConfig(path=str(path), lora=LoraConfig(**{"rank": RANK, **lora}))


def experts(seed: int) -> Any:
    """A model whose tokens go to all experts: no router is near a tie, which rounding would decide."""
    return lab.tiny(seed, replace(lab.CONFIG, experts_per_token=lab.CONFIG.num_experts, initializer_range=0.15))


def dense(seed: int, hidden: int = 32, num_layers: int = 2) -> Qwen3ForCausalLM:
    """A model without experts; its head shares the embedding's weight."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=lab.VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=64,
        initializer_range=hidden**-0.5,
        tie_word_embeddings=True,
        attn_implementation=ATTENTION,  # pyright: ignore[reportCallIssue]
    )
    return Qwen3ForCausalLM(config).eval()


def adapted(model: Any, cfg: PolicyConfig | None = None, *, moved: bool = True, seed: int = 0) -> Any:
    """The model with an adapter. moved: with random values in B, too, as after some steps."""
    add_adapter(model, cfg or settings(), seed)
    if moved:
        generator = torch.Generator().manual_seed(seed + 1)
        for name, p in model.named_parameters():
            if ".lora_B.default." in name and not p.is_meta:
                p.data.normal_(0, 0.1, generator=generator)
    return model


def trained(policy: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


class Recorder(torch.optim.SGD):
    """An optimizer that records gradients and changes no parameter."""

    def __init__(self, policy: Any) -> None:
        super().__init__(trained(policy).values(), lr=0.0)
        self.policy, self.gradients = policy, {}

    def step(self, closure: Any = None) -> None:
        named = self.policy.named_parameters()
        self.gradients = {name: lab.full(p.grad).clone() for name, p in named if p.grad is not None}


def gradients(
    parts: Sequence[Batch], parallel: Parallel, dump: Path, objective: Objective, reference: Any = None, **options: bool
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """(unsharded gradients, metrics) of one update with the reference (None: the policy itself, as it started)."""
    with nullcontext() if parallel.is_main else _parameters_on_meta():  # as `load_to_shard` does
        model = experts(1)
    policy = parallel.shard(Policy(adapted(model), **options))
    recorder, reference = Recorder(policy), reference or Start(policy)
    ready = with_logprobs(parts, policy, reference, objective, parallel)
    metrics = update(
        policy, recorder, ready, objective, parallel, step_names=lab.STEPS, grad_clip=0.0, dump=dump, reference=reference
    )
    return recorder.gradients, metrics


def main(out: Path, parallel: Parallel) -> None:
    """The part for two ranks."""
    saved: dict[str, Any] = {}
    uneven = slice(0, 6) if parallel.is_main else slice(6, 8)
    for name, (objective, options) in CASES.items():
        saved[name] = gradients(lab.batches(7, 23, uneven), parallel, out / "unused.pt", objective, **options)
    policy = parallel.shard(Policy(adapted(experts(1))))
    optimizer = torch.optim.AdamW(trained(policy).values(), lr=1e-2)
    lab.adam_update(policy, optimizer, 0, parallel, out / "unused.pt")
    save_checkpoint(out / "checkpoints", 1, policy, optimizer, {}, parallel)
    other = parallel.shard(Policy(adapted(experts(1), moved=False, seed=5)))
    other_optimizer = torch.optim.AdamW(trained(other).values(), lr=1.0)
    path = latest_checkpoint(out / "checkpoints")
    assert path is not None
    load_checkpoint(path, other, other_optimizer, parallel)
    for each, its in ((policy, optimizer), (other, other_optimizer)):
        lab.adam_update(each, its, 1, parallel, out / "unused.pt")
    same = lab.same_bits(lab.train_state(policy, optimizer), lab.train_state(other, other_optimizer))
    saved["continued_bits"] = parallel.all_gather_object(same)
    save_adapter(policy, out / "adapter")
    parallel.barrier()
    with nullcontext() if parallel.is_main else _parameters_on_meta():
        model = experts(1)
    start = settings(out / "no base", rank=0, start=str(out / "adapter"))
    again = parallel.shard(Policy(add_adapter(model, start, 0)))  # rank 1 has no values before it is sharded
    (batch,) = lab.batches(3)
    with torch.no_grad():
        same = [torch.equal(each(batch), policy(batch)) for each in (again, Start(again))]
    saved["started_bits"] = parallel.all_gather_object(same)
    saved["merged"] = {name: tensor.clone() for name, tensor in iter_merged_params(policy)}
    if parallel.is_main:
        torch.save(saved, out / "tensors.pt")
