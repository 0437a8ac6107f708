"""Direct loading into a model that is built like vLLM's, with kernels that keep the values they were made from."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from srpo.rollout.vllm.direct_load import DirectLoader, UnknownLayoutError

EXPERTS, HIDDEN, INNER, VOCAB = 3, 4, 2, 5


class Packing:
    """Makes a kernel from the weight and discards the weight, as vLLM's linear layers do."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.kernel = layer.weight.detach().clone()
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Repacking:
    """Prepares a layer of experts: permutes its weights, or (plain) leaves them as they are."""

    def __init__(self, plain: bool) -> None:
        self.plain = plain

    def process_weights_after_loading(self, layer: Any) -> None:
        for name in () if self.plain else ("w13_weight", "w2_weight"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).flip(-1).contiguous(), requires_grad=False))


def module(**parameters: torch.Tensor) -> Any:
    new = nn.Module()
    for name, tensor in parameters.items():
        new.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return new


def build(plain: bool = False) -> tuple[Any, list[tuple[nn.Module, Any]]]:
    """A model as vLLM has it: q, k and v in one weight, experts in two, the vocabulary padded by three rows."""
    model: Any = nn.Module()
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    model.embed = module(weight=torch.zeros(VOCAB + 3, HIDDEN))
    model.attn = nn.Module()
    model.attn.qkv_proj = module(weight=torch.empty(0), bias=torch.zeros(8))
    model.attn.qkv_proj.quant_method = Packing()
    model.mlp = nn.Module()
    model.mlp.experts = nn.Module()
    routed = module(w13_weight=torch.zeros(EXPERTS, 2 * INNER, HIDDEN), w2_weight=torch.zeros(EXPERTS, HIDDEN, INNER))
    model.mlp.experts.routed = routed
    return model, [(routed, Repacking(plain))]


def checkpoint() -> dict[str, torch.Tensor]:
    named = {"embed.weight": torch.randn(VOCAB, HIDDEN)}
    for name, rows in (("v", 2), ("q", 4), ("k", 2)):  # not in the order that vLLM wants
        named |= {f"attn.{name}_proj.weight": torch.randn(rows, HIDDEN), f"attn.{name}_proj.bias": torch.randn(rows)}
    for e in reversed(range(EXPERTS)):
        named |= {f"mlp.experts.{e}.{n}_proj.weight": torch.randn(INNER, HIDDEN) for n in ("up", "gate")}
        named[f"mlp.experts.{e}.down_proj.weight"] = torch.randn(HIDDEN, INNER)
    return named


def load(loader: DirectLoader, named: dict[str, torch.Tensor]) -> None:
    """Load the tensors one by one, in random order."""
    items = list(named.items())
    random.shuffle(items)
    loader.begin()
    for item in items:
        loader.load([item])
    loader.finish()


def arrived(model: Any, named: dict[str, torch.Tensor], plain: bool = False) -> bool:
    turned = (lambda x: x) if plain else (lambda x: x.flip(-1))
    layers = [[named[f"mlp.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")] for e in range(EXPERTS)]
    pairs = {
        "w13": (model.mlp.experts.routed.w13_weight, turned(torch.stack([torch.cat(layer[:2]) for layer in layers]))),
        "w2": (model.mlp.experts.routed.w2_weight, turned(torch.stack([layer[2] for layer in layers]))),
        "qkv": (model.attn.qkv_proj.kernel, torch.cat([named[f"attn.{n}_proj.weight"] for n in "qkv"])),
        "bias": (model.attn.qkv_proj.bias, torch.cat([named[f"attn.{n}_proj.bias"] for n in "qkv"])),
        "embed": (model.embed.weight, torch.cat([named["embed.weight"], torch.zeros(3, HIDDEN)])),
    }
    return all(torch.equal(loaded, expected) for loaded, expected in pairs.values())


@pytest.mark.parametrize("plain", [False, True])
def test_every_tensor_gets_to_its_place_in_whatever_order_it_comes(plain):
    model, fused = build(plain)
    named = checkpoint()
    loader = DirectLoader(model, {name: tensor.shape for name, tensor in named.items()}, fused)
    for _ in range(3):
        load(loader, named := checkpoint())
        assert arrived(model, named, plain)
    assert loader.written == {id(model.embed.weight), id(model.attn.qkv_proj.bias)}
    for tensor in named.values():
        before = tensor.clone()
        tensor.zero_()  # the trainer writes its next weights: no loaded weight is a view of its memory
        tensor.copy_(before).mul_(2)
    assert not arrived(model, named, plain) and arrived(model, {k: t / 2 for k, t in named.items()}, plain)


def test_what_lies_as_the_layer_wants_it_is_not_copied(monkeypatch):
    model, fused = build()
    named = checkpoint()
    whole = torch.randn(EXPERTS, 2 * INNER, HIDDEN)
    for e in range(EXPERTS):
        named[f"mlp.experts.{e}.gate_proj.weight"], named[f"mlp.experts.{e}.up_proj.weight"] = whole[e].split(INNER)
    loader = DirectLoader(model, {name: tensor.shape for name, tensor in named.items()}, fused)
    seen = []
    monkeypatch.setattr(Repacking, "process_weights_after_loading", lambda self, layer: seen.append(layer.w13_weight.data_ptr()))
    load(loader, named)
    assert seen == [whole.data_ptr()]
    assert model.mlp.experts.routed.w13_weight.data_ptr() != whole.data_ptr()  # this kernel does not repack, so it keeps a copy
    assert torch.equal(model.mlp.experts.routed.w13_weight, whole)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("attn.o_proj.weight", (4, 4), "o_proj"),
        ("mlp.other.experts.0.up_proj.weight", (2, 4), "other"),
        ("embed.scale", (1,), "no scale"),
        ("embed.weight", (9, 4), r"has shape \(8, 4\), the checkpoint's \(9, 4\)"),
        ("embed.weight", (5, 3), r"has shape \(8, 4\), the checkpoint's \(5, 3\)"),
        ("embed.number", (), "single number"),
    ],
)
def test_a_model_that_it_does_not_know_is_left_alone(name, shape, message):
    model, fused = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shapes = {k: v.shape for k, v in checkpoint().items()} | {name: torch.Size(shape)}
    with pytest.raises(UnknownLayoutError, match=message):
        DirectLoader(model, shapes, fused)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_half_a_layer_and_a_stranger_are_errors():
    model, fused = build()
    named = checkpoint()
    loader = DirectLoader(model, {name: tensor.shape for name, tensor in named.items()}, fused)
    with pytest.raises(RuntimeError, match=r"no parameter embed\.bias"):
        loader.load([("embed.bias", torch.zeros(4))])
    loader.begin()
    loader.load(list({k: v for k, v in named.items() if "experts.1.up" not in k}.items()))
    with pytest.raises(RuntimeError, match=r"8 tensors arrived without the rest of their layers, first mlp\.experts\.0\.down"):
        loader.finish()
    load(loader, named)
    assert arrived(model, named)
