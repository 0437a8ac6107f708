"""Forward and backward in bf16 over fp32 parameters, in one process: the mixed precision of FSDP2 without its copies.

FSDP2 casts all parameters before each forward and again before each backward, and moves gradients through two more buffers.
Here each parameter has one bf16 copy, made anew only after the parameter was written. Modules hold the copies during their
forward, and the fp32 parameters at any other time: optimizer, checkpoint, weight transfer and gradient norm see these and their
fp32 `grad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

_DTYPE = torch.bfloat16


def compute_in_bf16(policy: nn.Module, layers: Sequence[nn.Module]) -> None:
    """From now on forwards of `policy` run in bf16 and add the gradient of each backward to the fp32 `grad` of the parameters.

    As under FSDP2 a layer also casts its floating inputs, buffers keep their dtype, and the gradient of one micro-batch is bf16.
    Activation checkpointing calls a layer again: so each layer puts its own copies in place.
    """
    copies = {id(param): _Copy(param) for param in policy.parameters() if param.is_floating_point()}
    inside = {id(module) for layer in layers for module in layer.modules()}
    for unit in (*layers, policy):
        modules = [module for module in unit.modules() if unit is not policy or id(module) not in inside]
        places = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None and id(p) in copies]
        hooks = _Unit([(module, name, copies[id(param)]) for module, name, param in places])
        unit.register_forward_pre_hook(hooks.enter, with_kwargs=True)
        unit.register_forward_hook(hooks.leave, always_call=True)


def has_bf16_copies(model: nn.Module) -> bool:
    """Whether `compute_in_bf16` was called for the model or a module around it."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), _Unit) for hook in hooks)


class _Copy:
    """A parameter and its bf16 copy."""

    def __init__(self, param: nn.Parameter) -> None:
        self.param = param
        self._copy = nn.Parameter(torch.empty_like(param, dtype=_DTYPE), requires_grad=param.requires_grad)
        self._written: tuple[int, int] | None = None
        if param.requires_grad:
            self._copy.register_post_accumulate_grad_hook(self._hand_over)

    @torch.no_grad()
    def current(self) -> nn.Parameter:
        """The copy, with the values that the parameter has now. Every write in place counts a tensor's version up."""
        written = (self.param.data_ptr(), self.param._version)
        if written != self._written:
            self._copy.copy_(self.param)
            self._written = written
        return self._copy

    def _hand_over(self, copy: torch.Tensor) -> None:
        """Add the gradient of a backward to that of the parameter."""
        assert copy.grad is not None
        if self.param.grad is None:
            self.param.grad = copy.grad.to(self.param.dtype)
        else:
            self.param.grad.add_(copy.grad)
        copy.grad = None


class _Unit:
    """The parameters of one decoder layer, or of all that is in none."""

    def __init__(self, places: Sequence[tuple[nn.Module, str, _Copy]]) -> None:
        self._places = places

    def enter(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        for module, name, copy in self._places:
            module._parameters[name] = copy.current()
        return tree_map_only(torch.Tensor, _cast, (args, kwargs))

    def leave(self, *_: Any) -> None:
        for module, name, copy in self._places:
            module._parameters[name] = copy.param


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(_DTYPE) if tensor.is_floating_point() else tensor
