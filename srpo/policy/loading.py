"""A checkpoint for all ranks of a run: rank 0 reads it, the others make the same model without memory for its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from srpo.policy.attention import ATTENTION
from srpo.policy.experts import registered_name
from srpo.policy.model import check_folder, load_policy
from srpo.policy.parallel import Parallel


def load_to_shard(path: str | Path, parallel: Parallel, *, experts: str = "grouped_mm") -> PreTrainedModel:
    """`load_policy` in fp32, for `Parallel.shard`: whole on rank 0; on the others the parameters are on the meta device, and the
    buffers are rank 0's. In a run of one process it is `load_policy`. Collective.

    Raises ValueError where the folder holds no model, or one that is not what its config.json says.
    """
    model = load_policy(path, experts=experts) if parallel.is_main else _without_weights(path, experts)
    if parallel.world_size == 1:
        return model
    mine = _layout(model)
    theirs, buffers = parallel.broadcast_object((mine, dict(model.named_buffers())))
    wrong = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    wrong = next((names for names in parallel.all_gather_object(wrong) if names), [])
    if wrong:
        raise ValueError(
            f"the model in {str(path)!r} is not what its config.json makes: they differ in {len(wrong)} parameters or buffers, "
            f"first {wrong[0]}. Make config.json fit the weights (tie_word_embeddings says whether the head is the embedding)"
        )
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # some are read from the checkpoint, others computed
            buffer.copy_(buffers[name])
    return model


def _layout(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Shape and dtype of every parameter and buffer; tied ones once, so the names tell what is tied."""
    return {name: (tuple(t.shape), t.dtype) for name, t in (*model.named_parameters(), *model.named_buffers())}


def _without_weights(path: str | Path, experts: str) -> PreTrainedModel:
    """The model of `load_policy`, its parameters on the meta device; buffers are made as always, on the CPU."""
    check_folder(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=ATTENTION, experts_implementation=registered_name(experts)
        )
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules give up the memory of a parameter as soon as they have it: before it is drawn, so it was never touched."""

    def to_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # one that is tied stays the same object
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        handle.remove()
