"""The engine that a configuration asks for, and the sampling settings of its behaviour policy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srpo.core.config.train import Config, VllmConfig
from srpo.data.checkpoint_tokens import stop_ids
from srpo.policy.parallel import Parallel
from srpo.rollout.engine import Engine, SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.rollout.vllm.engine import VllmEngine
from srpo.rollout.vllm.shared_start import open_shared


def open_engine(cfg: Config, model: nn.Module, parallel: Parallel) -> Engine:
    """The engine that `rollout.engine` names, on this rank's device; each rank samples its own share of the prompts.

    Collective if ranks share one vLLM (`rollout.vllm.tensor_parallel_size` above 1).
    model: the policy as loaded, not yet sharded; vLLM itself reads the checkpoint in `policy.path`. A model without weights
    (`srpo.policy.loading`) is enough if the engine is synced before it samples.
    Raises UserError for settings that cannot work, MissingPackage if the engine is not installed.
    """
    dtype = getattr(torch, cfg.policy.dtype)
    if cfg.rollout.engine == "vllm":
        path, config, routing = cfg.policy.path, cfg.rollout.vllm, cfg.rollout.routing == "replay"
        return open_vllm(path, parallel, dtype=dtype, max_context=cfg.policy.max_context, config=config, routing=routing)
    return LocalEngine(model, device=parallel.device, dtype=dtype, max_context=cfg.policy.max_context)


def open_vllm(
    path: str | Path, parallel: Parallel, *, dtype: torch.dtype, max_context: int, config: VllmConfig, routing: bool = False
) -> Engine:
    """A vLLM engine with the weights of the checkpoint in `path`: this rank's own, or one shared by several ranks if
    `config.tensor_parallel_size` is above 1.

    Raises like `open_engine`.
    """
    shared = config.tensor_parallel_size != 1
    start = partial(open_shared, parallel=parallel) if shared else partial(VllmEngine, device=parallel.device)
    return start(path, dtype=dtype, max_context=max_context, config=config, routing=routing)


def sampling_params(cfg: Config, tokenizer: Any) -> SamplingParams:
    """Sampling settings of the behaviour policy (5.1.5)."""
    return SamplingParams(
        max_new_tokens=cfg.rollout.max_new_tokens,
        temperature=cfg.rollout.temperature,
        top_k=cfg.rollout.top_k,
        group_size=cfg.rollout.group_size,
        stop_ids=stop_ids(tokenizer),
        support=cfg.rollout.support == "replay",
        routing=cfg.rollout.routing == "replay",
    )
