"""Loads a checkpoint for all ranks: rank 0 reads the weights, the others build the model with parameters on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedModel

from srpo.core.config.train import PolicyConfig
from srpo.core.errors import UserError
from srpo.policy.attention import head_widths, registered_attention
from srpo.policy.experts import check_sizes, registered_name
from srpo.policy.folder import check_folder, read_config
from srpo.policy.model import load_policy
from srpo.policy.parallel import Parallel
from srpo.policy.varlen_kernels import check_widths


def load_to_shard(path: str | Path, parallel: Parallel, settings: PolicyConfig | None = None) -> PreTrainedModel:
    """`load_policy` in fp32, to be followed by `Parallel.shard`. Rank 0 has all weights; the other ranks have parameters on the
    meta device and rank 0's buffers. In a run of one process it equals `load_policy`. Collective.

    settings: experts, attention, and the dtype of the forwards. Raises UserError on every rank: as `load_policy` does, and for
    sizes of the model that the kernels of these settings cannot compute on this device.
    """
    check_folder(path)
    model, error = None, None
    settings = settings or PolicyConfig()
    try:
        load = load_policy if parallel.is_main else _without_weights
        model = load(path, experts=settings.experts, attention=settings.attention)
        check_widths(settings.attention, head_widths(model), parallel.device)
        check_sizes(model, settings.experts, parallel.device, getattr(torch, settings.dtype))
    except UserError as refused:  # the other ranks would wait for this one
        error = refused
    refusal = next((text for text in parallel.all_gather_object(None if error is None else str(error)) if text), None)
    if refusal is not None:
        raise UserError(refusal) from error
    assert model is not None
    if parallel.world_size == 1:
        return model
    layout = _layout(model)
    main_layout, buffers = parallel.broadcast_object((layout, dict(model.named_buffers())))
    differing = [name for name in {**main_layout, **layout} if main_layout.get(name) != layout.get(name)]
    differing = next((names for names in parallel.all_gather_object(differing) if names), [])
    if differing:
        raise UserError(
            f"the weights in {str(path)!r} do not fit their config.json: they differ in {len(differing)} parameters or buffers, "
            f"first {differing[0]}. Correct config.json (tie_word_embeddings: whether the head shares the embedding's weight)"
        )
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # some buffers are stored in the checkpoint, others are computed
            buffer.copy_(buffers[name])
    return model


def _layout(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Shape and dtype of every parameter and buffer. Tied parameters appear once, so the names also show which ones are tied."""
    return {name: (tuple(t.shape), t.dtype) for name, t in (*model.named_parameters(), *model.named_buffers())}


def _without_weights(path: str | Path, *, experts: str, attention: str) -> PreTrainedModel:
    """The model of `load_policy` with its parameters on the meta device; buffers are computed on the CPU as usual."""
    config = read_config(path)
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=registered_attention(attention),
            experts_implementation=registered_name(experts),
            trust_remote_code=False,
        )
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device when a module registers it: before its initialization, so it never uses memory."""

    def to_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tied parameter must stay the same object
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        handle.remove()


def model_size(path: str | Path) -> tuple[str, int]:
    """(class, number of parameters) of the model in a folder, from its config.json alone. UserError as `load_policy`."""
    check_folder(path)
    model = _without_weights(path, experts="loop", attention="torch")
    return type(model).__name__, sum(parameter.numel() for parameter in model.parameters())
