"""The engine that a configuration asks for."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from srpo.config import Config
from srpo.policy.parallel import Parallel
from srpo.rollout.engine import Engine
from srpo.rollout.local import LocalEngine
from srpo.rollout.sharing import open_shared
from srpo.rollout.vllm_engine import VllmEngine


def open_engine(cfg: Config, model: nn.Module, parallel: Parallel) -> Engine:
    """The engine of `rollout.engine` on this rank's device: each rank samples its own share of the prompts. Collective where
    ranks share a vLLM.

    model: the policy as it was loaded, not yet sharded; vLLM reads the same checkpoint, `policy.path`, by itself.
    Raises ValueError for settings that cannot work, ImportError where the engine is not installed.
    """
    dtype = getattr(torch, cfg.policy.dtype)
    if cfg.rollout.engine == "vllm":
        config, routing = cfg.rollout.vllm, cfg.rollout.routing == "replay"
        shared = config.tensor_parallel_size != 1
        open_vllm = partial(open_shared, parallel=parallel) if shared else partial(VllmEngine, device=parallel.device)
        return open_vllm(cfg.policy.path, dtype=dtype, max_context=cfg.policy.max_context, config=config, routing=routing)
    return LocalEngine(model, device=parallel.device, dtype=dtype, max_context=cfg.policy.max_context)
