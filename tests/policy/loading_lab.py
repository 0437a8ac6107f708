"""Under torchrun: `load_to_shard` on two ranks. `python loading_lab.py FOLDER` with one checkpoint in each subfolder that
test_loading.py names; each rank writes rank<r>.pt with what it has found."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from srpo.policy.critic import Critic
from srpo.policy.loading import load_to_shard
from srpo.policy.model import Policy
from srpo.policy.parallel import Parallel, init_parallel, iter_full_params, to_local, unwrap
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine

PROMPTS = [(5, 6, 7), (8, 9)]
PARAMS = SamplingParams(max_new_tokens=6, group_size=2)


class Broadcasts:
    """Stands for `dist.broadcast`; `most` whole parameters were there at a time."""

    def __init__(self) -> None:
        self.most, self._sent, self._broadcast = 0, [], dist.broadcast

    def __call__(self, tensor: torch.Tensor, src: int) -> None:
        self._sent = [sent for sent in self._sent if sent() is not None] + [weakref.ref(tensor)]
        self.most = max(self.most, len(self._sent))
        self._broadcast(tensor, src=src)


def of_policy(model: nn.Module) -> dict[str, Any]:
    """Whole parameters, this rank's parts of them, and buffers of a sharded policy."""
    return {
        "whole": {name: tensor.clone() for name, tensor in iter_full_params(model)},
        "parts": {name: to_local(p.detach()).clone() for name, p in unwrap(model).named_parameters()},
        "buffers": {name: b.clone() for name, b in unwrap(model).named_buffers()},
    }


def case(folder: Path, parallel: Parallel) -> dict[str, Any]:
    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", wraps=AutoModelForCausalLM.from_pretrained) as reads:
        model = load_to_shard(folder, parallel)
    found: dict[str, Any] = {"num_reads": reads.call_count, "on_meta": [p.is_meta for p in model.parameters()]}
    engine = LocalEngine(model) if folder.name in ("untied", "tied") else None
    before_sync = ""
    if engine is not None and not parallel.is_main:
        try:
            engine.generate(PROMPTS, PARAMS, seed=1)
        except AssertionError as error:
            before_sync = str(error)
    with mock.patch.object(dist, "broadcast", Broadcasts()) as broadcasts:
        policy = parallel.shard(Policy(model))
    found |= of_policy(policy) | {"before_sync": before_sync, "most": broadcasts.most}
    if engine is not None:
        engine.sync_weights(policy, 1)
        found["samples"] = [sample.response_ids for sample in engine.generate(PROMPTS, PARAMS, seed=1)]
    head = getattr(policy.model, "lm_head", None)
    found["tied"] = head.weight is policy.model.get_input_embeddings().weight if head is not None else None
    return found


def main(folder: Path) -> None:
    parallel = init_parallel()
    found: dict[str, Any] = {name: case(folder / name, parallel) for name in ("untied", "tied", "with_bias")}
    critic = Critic(load_to_shard(folder / "untied", parallel))
    critic._head().weight.data.fill_(parallel.rank + 1)  # fewer rows than ranks
    found["critic"] = of_policy(parallel.shard(critic))
    try:
        load_to_shard(folder / "wrongly_tied", parallel)
    except ValueError as error:
        found["refused"] = str(error)
    torch.save(found, folder / f"rank{parallel.rank}.pt")
    parallel.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
