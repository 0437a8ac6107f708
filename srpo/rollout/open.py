"""The engine that a configuration asks for."""

from __future__ import annotations

import torch
from torch import nn

from srpo.config import Config
from srpo.policy.parallel import Parallel
from srpo.rollout.local import LocalEngine
from srpo.rollout.vllm_engine import VllmEngine


def open_engine(cfg: Config, model: nn.Module, parallel: Parallel) -> LocalEngine | VllmEngine:
    """The engine of `rollout.engine` on this rank's device: each rank samples its own share of the prompts.

    model: the policy as it was loaded, not yet sharded; vLLM reads the same checkpoint, `policy.path`, by itself.
    Raises ValueError for settings that cannot work, ImportError where the engine is not installed.
    """
    dtype = getattr(torch, cfg.policy.dtype)
    if cfg.rollout.engine == "vllm":
        return VllmEngine(
            cfg.policy.path, device=parallel.device, dtype=dtype, max_context=cfg.policy.max_context, config=cfg.rollout.vllm
        )
    return LocalEngine(model, device=parallel.device, dtype=dtype, max_context=cfg.policy.max_context)
