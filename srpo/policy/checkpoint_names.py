"""Parameters under the names of a Hugging Face checkpoint, which the loaders of other engines expect.

Transformers keeps the experts of a layer in one parameter; a checkpoint has separate tensors for each expert. The conversion is
the one of transformers' `save_pretrained`, applied to one parameter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from srpo.policy.adapters import iter_merged_params
from srpo.policy.parallel import unwrap


@torch.no_grad()
def iter_checkpoint_params(policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, whole tensor) of every parameter, one parameter gathered at a time; tied parameters once. An adapter is
    added to the weights.

    Collective for a sharded model: every rank must iterate to the end. Tensors may share memory with the parameters: copy a
    tensor that must outlive the next update.
    """
    model = unwrap(policy)
    for name, tensor in iter_merged_params(policy):
        yield from revert_weight_conversion(model, {name: tensor}).items()


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor inside a larger tensor: contiguous, with shape `shape`, from flat element `first` on."""

    name: str
    first: int
    shape: tuple[int, ...]


# A tensor and the checkpoint tensors that it consists of, without gaps.
Block = tuple[torch.Tensor, Sequence[Part]]
# Transformers' parameter name -> its checkpoint tensors; None if the parameter is not a plain concatenation of them.
Layouts = dict[str, tuple[Part, ...] | None]


@torch.no_grad()
def iter_checkpoint_blocks(policy: nn.Module, layouts: Layouts) -> Iterator[Block]:
    """Like `iter_checkpoint_params`, but tensors that a checkpoint only slices out of one parameter (a layer's experts) come as
    one block.

    layouts: pass an empty dict; it is filled here and can be passed again for the same model. A layout is found by comparing with
    the actual conversion, so no order of experts, or of gate and up projections, is assumed.
    """
    model = unwrap(policy)
    for name, tensor in iter_merged_params(policy):
        if name not in layouts:
            layouts[name] = _layout(model, name, tensor)
        parts = layouts[name]
        if parts is not None:
            yield tensor, parts
            continue
        for converted_name, converted in revert_weight_conversion(model, {name: tensor}).items():
            yield converted, (Part(converted_name, 0, tuple(converted.shape)),)


def _layout(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> tuple[Part, ...] | None:
    """The parts of a parameter, found by converting row numbers in its place and confirmed by comparing the converted values."""
    converted = revert_weight_conversion(model, {name: tensor})
    if len(converted) == 1:
        ((only, value),) = converted.items()
        same = value.shape == tensor.shape and torch.equal(value, tensor)
        return (Part(only, 0, tuple(tensor.shape)),) if same else None
    width = tensor.shape[-1]
    rows = torch.arange(math.prod(tensor.shape[:-1])).view(*tensor.shape[:-1], 1)
    parts, flat = [], tensor.reshape(-1)
    for part_name, numbers in revert_weight_conversion(model, {name: rows}).items():
        value, numbers = converted[part_name], numbers.flatten()
        first = int(numbers[0]) * width
        consecutive = torch.equal(numbers, torch.arange(len(numbers)) + numbers[0])
        if not consecutive or not torch.equal(value.reshape(-1), flat[first : first + value.numel()]):
            return None
        parts.append(Part(part_name, first, tuple(value.shape)))
    parts.sort(key=lambda part: part.first)
    ends = [0, *(part.first + math.prod(part.shape) for part in parts)]
    gapless = [part.first for part in parts] == ends[:-1] and ends[-1] == tensor.numel()
    return tuple(parts) if gapless else None
