"""Routing of the tokens of a forward to experts: recorded from the routers of a model, or given to them (routing replay).

A router's own forward runs; only the result of its top-k is replaced by the given experts. So gate weights remain the model's
function of its own logits (normalisation, scaling, dtype), gradients flow as through the router's own choice, and a forward
without given experts keeps every bit.
Letters: T tokens, D decoder layers, K experts of a token, E experts to choose from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from srpo.core.errors import UserError
from srpo.policy.parallel import decoder_layers

UNKNOWN = -1  # entry of a table of experts: the router of this layer keeps its own choice for this token
_TOPK: tuple[Callable[..., Any], ...] = (torch.topk, torch.Tensor.topk)


class Routing:
    """Routing of one forward: the experts given to its routers, and the experts that the routers chose themselves.

    given: [T, D, K] integers; for a row that contains UNKNOWN the router keeps its own choice. None: all routers do.
    `own`: {layer: [T, K]} experts that the routers chose themselves, recorded if `keep_own`.
    `flips`: [2] float64, number of (token, layer) pairs given another set of experts than the router's own, and given any.
    """

    def __init__(self, given: torch.Tensor | None = None, *, keep_own: bool = False) -> None:
        self.given = given
        self.keep_own = keep_own
        self.own: dict[int, torch.Tensor] = {}
        self.flips: torch.Tensor | None = None

    def answer(self, layer: int, scores: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(scores, ids), both [T, K], of the experts given to this layer; None to keep its own choice [T, K]. scores: [T, E]."""
        if self.keep_own:
            self.own[layer] = own
        if self.given is None:
            return None
        given = self.given[:, layer].to(own.dtype)
        known = (given >= 0).all(-1)
        other = known & (given.sort(-1).values != own.sort(-1).values).any(-1)
        counts = torch.stack([other.sum(), known.sum()]).double()
        self.flips = counts if self.flips is None else self.flips + counts
        ids = torch.where(known[:, None], given, own)
        return scores.gather(-1, ids), ids

    def table(self, num_layers: int) -> torch.Tensor:
        """[T, D, K] int16, the routers' own choices; UNKNOWN in layers without experts."""
        first = next(iter(self.own.values()))
        table = torch.full((len(first), num_layers, first.shape[1]), UNKNOWN, dtype=torch.int16, device=first.device)
        for layer, ids in self.own.items():
            table[:, layer] = ids
        return table


class Routers:
    """The routers of a model. After `open` its forward takes `routing=Routing(...)` and passes it to each decoder layer as an
    argument, so that a layer recomputed by activation checkpointing gets the same routing.

    model: a transformers causal LM, not yet sharded. `num_layers` is D, `top_k` is K. Raises UserError for a model without
    experts, and for routers that do not choose by a single top-k over all experts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = decoder_layers(model)
        routers = [(i, layer, _router_of(layer)) for i, layer in enumerate(layers)]
        self._layers = [_Layer(i, layer, router) for i, layer, router in routers if router is not None]
        if not self._layers:
            raise UserError(
                f"rollout.routing is 'replay', but {type(model).__name__} has no experts to route to: set rollout.routing to "
                "'recompute'"
            )
        self.num_layers, self.top_k = len(layers), self._layers[0].top_k

    def open(self) -> Routers:
        """Replace the forwards of layers and routers, and return self."""
        for layer in self._layers:
            layer.open()
        return self

    def replay(self, given: torch.Tensor) -> Routing:
        """Routing to the given experts [T, D, K] of a batch. Raises UserError if D or K are those of another model."""
        if given.shape[1:] != (self.num_layers, self.top_k):
            raise UserError(
                f"the engine reports experts [layers, experts per token] of {list(given.shape[1:])}, the policy has "
                f"{[self.num_layers, self.top_k]}: start both from one checkpoint, or set rollout.routing to 'recompute'"
            )
        return Routing(given)


def _router_of(layer: nn.Module) -> nn.Module | None:
    """The router of a decoder layer: its first module with a weight and integers `top_k` and `num_experts`; None without one."""

    def is_router(module: nn.Module) -> bool:
        counts = (getattr(module, name, None) for name in ("top_k", "num_experts"))
        return all(isinstance(count, int) for count in counts) and isinstance(getattr(module, "weight", None), nn.Parameter)

    return next((module for module in layer.modules() if is_router(module)), None)


class _Layer:
    """A decoder layer and its router. The layer's forward takes `routing` out of its arguments for the router's forward."""

    def __init__(self, number: int, layer: nn.Module, router: Any) -> None:
        self.number, self.top_k, self.num_experts = number, int(router.top_k), int(router.num_experts)
        self._layer, self._router = layer, router
        self._layer_forward, self._router_forward = layer.forward, router.forward
        self._routing: Routing | None = None
        with torch.no_grad():  # a router that cannot be replayed fails here, before anything is sampled
            self._route(torch.zeros(1, router.weight.shape[-1]).to(router.weight), Routing())

    def open(self) -> None:
        self._layer.forward, self._router.forward = self._in_layer, self._in_router

    def _in_layer(self, *args: Any, routing: Routing | None = None, **kwargs: Any) -> Any:
        self._routing = routing
        try:
            return self._layer_forward(*args, **kwargs)
        finally:
            self._routing = None

    def _in_router(self, hidden: torch.Tensor) -> Any:
        return self._router_forward(hidden) if self._routing is None else self._route(hidden, self._routing)

    def _route(self, hidden: torch.Tensor, routing: Routing) -> Any:
        with _Choice(self, routing) as choice:
            out = self._router_forward(hidden)
        if choice.count != 1:
            raise UserError(
                f"{type(self._router).__name__} does not choose its experts by one top-k over all of them, so its choice "
                "cannot be replayed: set rollout.routing to 'recompute'"
            )
        return out


class _Choice(TorchFunctionMode):
    """Replaces the result of the top-k within one router's forward."""

    def __init__(self, layer: _Layer, routing: Routing) -> None:
        super().__init__()
        self._layer, self._routing = layer, routing
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in _TOPK or out.indices.shape[-1] != self._layer.top_k or args[0].shape[-1] != self._layer.num_experts:
            return out
        if args[0].ndim != 2:  # a top-k over groups of experts, not over experts
            return out
        self.count += 1
        answer = self._routing.answer(self._layer.number, args[0], out.indices)
        return out if answer is None else torch.return_types.topk(answer)
