"""Loads new weights directly into a running vLLM on its CPU backend: kernels are made from the memory that the trainer wrote.

vLLM's own reload passes every tensor through its loader twice and copies it three times before a kernel is made from it. Here, if
the trainer wrote the tensors of a layer in the layer's own layout (all experts in one block; q, k and v in a row), nothing is
copied. Then vLLM's own preparation of the layer (`process_weights_after_loading`) runs, as when the model was first loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|w1|up_proj|w3|down_proj|w2)\.weight$")
_HALF = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}


class UnknownLayoutError(Exception):
    """The model has a tensor that cannot be assigned to a layer here; vLLM's own reload has to load it."""


@dataclass
class Slot:
    """A weight of vLLM's model before its kernel is made: one or more checkpoint tensors, one after another."""

    layer: Any
    attribute: str
    places: dict[str, int]  # checkpoint name -> index of its first element in the weight
    shape: tuple[int, ...]
    arrived: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.arrived) == len(self.places)

    def take(self) -> torch.Tensor:
        """The arrived tensors as one tensor, without a copy if they already lie one after another in memory."""
        tensors = [self.arrived[name] for name in self.places]
        self.arrived = {}
        first = tensors[0]
        base, memory = first.storage_offset(), first.untyped_storage().data_ptr()
        if all(
            tensor.untyped_storage().data_ptr() == memory and tensor.storage_offset() == base + place and tensor.is_contiguous()
            for tensor, place in zip(tensors, self.places.values(), strict=True)
        ):
            return first.as_strided(self.shape, _strides(self.shape))
        weight = first.new_empty(self.shape)
        for tensor, place in zip(tensors, self.places.values(), strict=True):
            weight.view(-1)[place : place + tensor.numel()].view(tensor.shape).copy_(tensor)
        return weight


class DirectLoader:
    """Loads tensors by checkpoint name into `model`.

    shapes: of all tensors of the checkpoint. fused: each layer of experts with its kernel.
    Raises UnknownLayoutError, before anything is changed, for a tensor that fits no layer of the model.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, Sequence[int]], fused: Iterable[tuple[nn.Module, Any]]) -> None:
        self._fused = {id(layer): kernel for layer, kernel in fused}
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._slots: dict[str, Slot] = {}  # by checkpoint name
        self._by_layer: dict[int, list[Slot]] = {}
        self.written: set[int] = set()  # ids of the parameters written in place since `begin`
        slots: dict[tuple[int, str], Slot] = {}
        packed = {part: (module, parts) for module, parts in _packed(model).items() for part in parts}
        for name, shape in sorted(self._shapes.items(), key=lambda item: _order(item[0], packed)):
            layer, attribute, (rows, *rest) = self._find(model, name, shape, packed)
            slot = slots.setdefault((id(layer), attribute), Slot(layer, attribute, {}, (0,)))
            slot.places[name] = math.prod(slot.shape)
            slot.shape = (slot.shape[0] + rows, *rest)
            self._slots[name] = slot
        for slot in slots.values():
            if id(slot.layer) in self._fused:  # w13 [experts, 2 I, H] holds gate and up of each expert, w2 [experts, H, I] down
                experts = 1 + max(int(m[2]) for name in slot.places if (m := _EXPERT.match(name)))
                slot.shape = (experts, slot.shape[0] // experts, *slot.shape[1:])
            self._check(slot)
            self._by_layer.setdefault(id(slot.layer), []).append(slot)

    def _find(
        self, model: nn.Module, name: str, shape: tuple[int, ...], packed: Mapping[str, tuple[str, Sequence[str]]]
    ) -> tuple[Any, str, tuple[int, ...]]:
        """(layer, attribute, shape of the rows that the tensor appends to that weight)."""
        if not shape:
            raise UnknownLayoutError(f"{name} is a single number")
        expert = _EXPERT.match(name)
        if expert is not None:
            try:
                block = model.get_submodule(expert[1])
            except AttributeError as error:
                raise UnknownLayoutError(f"{name}: {error}") from error
            layers = [layer for layer in block.modules() if id(layer) in self._fused]
            if len(layers) != 1:
                raise UnknownLayoutError(f"{name}: {expert[1]} has {len(layers)} layers of experts in vLLM's model, not one")
            return layers[0], "w13_weight" if expert[3] in _HALF else "w2_weight", shape
        path, _, attribute = name.rpartition(".")
        parent, _, last = path.rpartition(".")
        if last in packed and attribute in ("weight", "bias"):
            path = f"{parent}.{packed[last][0]}"
        try:
            return model.get_submodule(path), attribute, shape
        except AttributeError as error:
            raise UnknownLayoutError(f"{name}: {error}") from error

    def _check(self, slot: Slot) -> None:
        parameter = getattr(slot.layer, slot.attribute, None)
        if not isinstance(parameter, torch.Tensor):
            kind = type(slot.layer).__name__
            raise UnknownLayoutError(f"{next(iter(slot.places))}: vLLM's {kind} has no {slot.attribute}")
        in_place = id(slot.layer) not in self._fused and parameter.numel()
        rows = parameter.shape[0] if parameter.ndim else 1
        # vLLM may pad a vocabulary at its end.
        if in_place and (parameter.shape[1:] != slot.shape[1:] or rows < slot.shape[0]):
            shape = tuple(parameter.shape)
            raise UnknownLayoutError(f"{next(iter(slot.places))}: vLLM's weight has shape {shape}, the checkpoint's {slot.shape}")

    def begin(self) -> None:
        """Discard the tensors left by an interrupted sync."""
        self.written.clear()
        for slot in self._slots.values():
            slot.arrived = {}

    @torch.no_grad()
    def load(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take some tensors, which must not change before `finish`. A layer is rebuilt once all of its tensors have arrived."""
        for name, tensor in named:
            slot = self._slots.get(name)
            if slot is None or tuple(tensor.shape) != self._shapes[name]:
                raise RuntimeError(f"the checkpoint that vLLM was started from has no parameter {name} {tuple(tensor.shape)}")
            slot.arrived[name] = tensor
            layer_slots = self._by_layer[id(slot.layer)]
            if all(other.complete for other in layer_slots):
                self._renew(layer_slots)
                for other in layer_slots:
                    other.arrived = {}

    def _renew(self, slots: Sequence[Slot]) -> None:
        layer = slots[0].layer
        kernel = self._fused.get(id(layer))
        prepare = kernel is not None
        for slot in slots:
            old = getattr(layer, slot.attribute)
            if kernel is None and old.numel():
                old.data.view(-1)[: math.prod(slot.shape)].view(slot.shape).copy_(slot.take())
                self.written.add(id(old))
                continue
            new = nn.Parameter(slot.take(), requires_grad=False)
            vars(new).update(vars(old))
            setattr(layer, slot.attribute, new)
            prepare = True
        if not prepare:
            return
        memories = {slot.attribute: getattr(layer, slot.attribute).untyped_storage().data_ptr() for slot in slots}
        if kernel is not None:
            kernel.process_weights_after_loading(layer)
        else:
            layer.quant_method.process_weights_after_loading(layer)
        for attribute, memory in memories.items():
            prepared = getattr(layer, attribute)
            if prepared.numel() and id(prepared) not in self.written and prepared.untyped_storage().data_ptr() == memory:
                prepared.data = prepared.data.clone()  # this kernel reads the arrived memory, which the trainer will overwrite

    def finish(self) -> None:
        """Raises RuntimeError if only a part of a layer's tensors has arrived."""
        waiting = sorted(name for slot in self._by_layer.values() for s in slot for name in s.arrived)
        if waiting:
            raise RuntimeError(f"{len(waiting)} tensors arrived without the rest of their layers, first {waiting[0]}")


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _packed(model: nn.Module) -> dict[str, list[str]]:
    """Name of each module that vLLM packs from several modules of the checkpoint -> their names, in order."""
    return dict(getattr(model, "packed_modules_mapping", None) or {})


def _order(name: str, packed: Mapping[str, tuple[str, Sequence[str]]]) -> tuple[int, int]:
    """Sort key: the position of a tensor within its slot."""
    expert = _EXPERT.match(name)
    if expert is not None:
        return int(expert[2]), _HALF.get(expert[3], 0)
    module = name.rpartition(".")[0].rpartition(".")[2]
    return (packed[module][1].index(module), 0) if module in packed else (0, 0)
