"""On two ranks (policy_ranks.py): `load_to_shard` of the checkpoints of `write_checkpoints`. Each rank writes its results to
rank<r>.pt."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import policy_lab as lab
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from srpo.policy.critic import Critic
from srpo.policy.loading import load_to_shard
from srpo.policy.model import Policy, make_tiny
from srpo.policy.parallel import Parallel, iter_full_params, to_local, unwrap
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine

PROMPTS = [(5, 6, 7), (8, 9)]
PARAMS = SamplingParams(max_new_tokens=6, group_size=2)


def write_checkpoints(folder: Path) -> None:
    """Write the checkpoints. Numbers of experts and of tokens are odd, so that two ranks get unequal shards."""
    config = replace(lab.CONFIG, num_experts=5)
    make_tiny(lab.tokenizer(51), config, 1).save_pretrained(folder / "untied")
    tied = make_tiny(lab.tokenizer(51), config, 2)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(folder / "tied")
    make_tiny(lab.tokenizer(51), config, 3).save_pretrained(folder / "wrongly_tied")
    settings = json.loads((folder / "wrongly_tied" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "wrongly_tied" / "config.json").write_text(json.dumps(settings))
    lab.biased(51).save_pretrained(folder / "with_bias")


class Broadcasts:
    """Replaces `dist.broadcast`; `most` is the largest number of whole parameters in memory at a time."""

    def __init__(self) -> None:
        self.most, self._sent, self._broadcast = 0, [], dist.broadcast

    def __call__(self, tensor: torch.Tensor, src: int) -> None:
        self._sent = [sent for sent in self._sent if sent() is not None] + [weakref.ref(tensor)]
        self.most = max(self.most, len(self._sent))
        self._broadcast(tensor, src=src)


def of_policy(model: nn.Module) -> dict[str, Any]:
    """Unsharded parameters, this rank's shards, and buffers of a sharded policy."""
    return {
        "whole": {name: tensor.clone() for name, tensor in iter_full_params(model)},
        "parts": {name: to_local(p.detach()).clone() for name, p in unwrap(model).named_parameters()},
        "buffers": {name: b.clone() for name, b in unwrap(model).named_buffers()},
    }


def case(folder: Path, parallel: Parallel) -> dict[str, Any]:
    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", wraps=AutoModelForCausalLM.from_pretrained) as reads:
        model = load_to_shard(folder, parallel)
    results: dict[str, Any] = {"num_reads": reads.call_count, "on_meta": [p.is_meta for p in model.parameters()]}
    engine = LocalEngine(model) if folder.name in ("untied", "tied") else None
    before_sync = ""
    if engine is not None and not parallel.is_main:
        try:
            engine.generate(PROMPTS, PARAMS, seed=1)
        except AssertionError as error:
            before_sync = str(error)
    with mock.patch.object(dist, "broadcast", Broadcasts()) as broadcasts:
        policy = parallel.shard(Policy(model))
    results |= of_policy(policy) | {"before_sync": before_sync, "most": broadcasts.most}
    if engine is not None:
        engine.sync_weights(policy, 1)
        results["samples"] = [sample.response_ids for sample in engine.generate(PROMPTS, PARAMS, seed=1)]
    head = getattr(policy.model, "lm_head", None)
    results["tied"] = head.weight is policy.model.get_input_embeddings().weight if head is not None else None
    return results


def main(folder: Path, parallel: Parallel) -> None:
    results: dict[str, Any] = {name: case(folder / name, parallel) for name in ("untied", "tied", "with_bias")}
    critic = Critic(load_to_shard(folder / "untied", parallel))
    critic._head().weight.data.fill_(parallel.rank + 1)  # the head has fewer rows than there are ranks
    results["critic"] = of_policy(parallel.shard(critic))
    try:
        load_to_shard(folder / "wrongly_tied", parallel)
    except ValueError as error:
        results["refused"] = str(error)
    torch.save(results, folder / f"rank{parallel.rank}.pt")
