"""Transport of weights to an engine: entries of buckets, bit sums, shared memory."""

from __future__ import annotations

import gc
import itertools
import math
import os
from collections.abc import Iterable, Iterator

import pytest
import torch

from srpo.core.config.demo import TinyConfig
from srpo.policy.checkpoint_names import Block, Layouts, Part, iter_checkpoint_blocks, iter_checkpoint_params
from srpo.policy.model import load_policy, make_tiny
from srpo.rollout.weights.buckets import (
    ALIGNMENT,
    Bucket,
    Packer,
    add_sums,
    bit_sum,
    copy_and_sum,
    differing_groups,
    group_of,
    place_sum,
)
from srpo.rollout.weights.shared_memory import WeightStore, map_segment


@pytest.fixture
def params() -> list[tuple[str, torch.Tensor]]:
    """Tensors of many sizes; one is larger than the tests' buckets, one is empty."""
    torch.manual_seed(torch.seed() % 2**31)
    sizes = [(3,), (7, 5), (64, 33), (1,), (), (0, 4), (16,), (5000,), (2, 3, 4)]
    return [(f"model.layers.{i % 3}.w{i}", torch.randn(size)) for i, size in enumerate(sizes)]


def blocks(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Block]:
    """One block per tensor."""
    return ((tensor, (Part(name, 0, tuple(tensor.shape)),)) for name, tensor in named)


def read(store: WeightStore, buckets: list[Bucket]) -> dict[str, torch.Tensor]:
    """The tensors as another mapping of the same memory sees them."""
    tensors = {}
    for bucket in buckets:
        fd = store.descriptor(bucket)
        buffer = map_segment(fd, os.fstat(fd).st_size)
        tensors |= {entry.name: entry.view(buffer).clone() for entry in bucket.entries}
    return tensors


def test_what_is_written_is_read_from_another_mapping(params):
    store = WeightStore(4096, torch.float32)
    buckets = list(store.write(blocks(params), 7))
    tensors = read(store, buckets)
    assert list(tensors) == [name for name, _ in params] and all(torch.equal(tensors[name], tensor) for name, tensor in params)
    assert store.version == 7 and store.num_bytes == sum(tensor.nbytes for _, tensor in params)
    store.close()


def test_places_are_aligned_and_never_overlap(params):
    store = WeightStore(4096, torch.float32)
    for bucket in store.write(blocks(params), 0):
        ends = [(entry.offset, entry.offset + entry.num_bytes) for entry in bucket.entries]
        assert all(begin % ALIGNMENT == 0 for begin, _ in ends)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
        assert ends[-1][1] <= 4096 or len(ends) == 1
    store.close()


def test_a_bucket_is_given_away_before_the_next_tensor_is_written(params):
    """The trainer gathers bucket by bucket: when a bucket is yielded, at most one more tensor has been requested."""
    requested = []

    def requesting():
        for name, tensor in params:
            requested.append(name)
            yield name, tensor

    store, done = WeightStore(256, torch.float32), 0
    for bucket in store.write(blocks(requesting()), 0):
        done += len(bucket.entries)
        assert len(requested) <= done + 1
    assert done == len(params)
    store.close()


def test_segments_are_used_again_and_their_descriptors_go_with_them(params):
    before = len(os.listdir("/proc/self/fd"))
    store = WeightStore(1024, torch.float32)
    first = list(store.write(blocks(params), 0))
    num_descriptors = len(os.listdir("/proc/self/fd"))
    changed = [(name, tensor + 1) for name, tensor in params]
    for version in range(1, 5):
        assert list(store.write(blocks(changed), version)) == first
    assert len(os.listdir("/proc/self/fd")) == num_descriptors
    assert torch.equal(read(store, first)[params[2][0]], params[2][1] + 1)
    store.close()
    gc.collect()  # a mapping ends with the last tensor that views it
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_mapping_outlives_the_store(params):
    """The engine may still read after the trainer has closed the store."""
    store = WeightStore(1 << 20, torch.float32)
    (bucket,) = store.write(blocks(params), 0)
    fd = store.descriptor(bucket)
    buffer = map_segment(fd, os.fstat(fd).st_size)
    store.close()
    gc.collect()
    assert torch.equal(bucket.entries[2].view(buffer), params[2][1])


def test_an_interrupted_write_leaves_no_version(params):
    def breaking():
        yield from params[:4]
        raise RuntimeError("the gather failed")

    store = WeightStore(256, torch.float32)
    list(store.write(blocks(params), 3))
    with pytest.raises(RuntimeError, match="gather"):
        list(store.write(blocks(breaking()), 4))
    assert store.version is None
    with pytest.raises(ValueError, match="twice"):
        list(store.write(blocks([params[0], params[0]]), 5))
    store.close()


def test_floats_are_written_in_the_engine_s_dtype_and_counted_in_it(params):
    store = WeightStore(1 << 20, torch.bfloat16)
    integers = ("ids", torch.arange(5))
    tensors = read(store, list(store.write(blocks([*params, integers]), 0)))
    assert all(torch.equal(tensors[name], tensor.bfloat16()) for name, tensor in params) and tensors["ids"].dtype == torch.int64
    sums: dict[str, int] = {}
    add_sums(sums, [(name, bit_sum(tensor)) for name, tensor in tensors.items()])
    assert sums == store.sums
    store.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_bit_sums_forget_the_order_and_zeros_and_nothing_else(dtype):
    x = torch.randn(50, 40).to(dtype)
    shuffled = x.flatten()[torch.randperm(2000)]
    assert bit_sum(x) == bit_sum(shuffled) == bit_sum(torch.cat((shuffled, torch.zeros(9, dtype=dtype))))
    assert place_sum(x) != place_sum(shuffled) and place_sum(x) == place_sum(x.clone())
    y = x.clone()
    y[3, 4] = torch.nextafter(x[3, 4].float(), torch.tensor(9.0)).to(dtype) if dtype == torch.float32 else x[3, 4] + 1
    assert bit_sum(x) != bit_sum(y) and place_sum(x) != place_sum(y)
    assert 0 <= bit_sum(x) < 2**64
    assert bit_sum(x.t()) == bit_sum(x)  # not contiguous


def test_long_tensors_are_summed_in_chunks(monkeypatch):
    x = torch.randint(-(2**31), 2**31 - 1, (70_000,), dtype=torch.int32)
    sums = bit_sum(x), place_sum(x)
    monkeypatch.setattr("srpo.rollout.weights.buckets._CHUNK", 999)
    assert bit_sum(x) == sums[0] == sum(x.tolist()) % 2**64
    assert place_sum(x) == sums[1] == sum(v * (i % 65521 + 1) for i, v in enumerate(x.tolist())) % 2**64


def test_groups_are_decoder_layers_on_both_sides():
    ours = ("model.layers.11.mlp.experts.3.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    theirs = ("model.layers.11.mlp.experts.routed_experts.w13_weight", *ours[1:])
    assert [group_of(n) for n in ours] == [group_of(n) for n in theirs] == [
        "model.layers.11", "model.embed_tokens", "lm_head", "model.norm"
    ]  # fmt: skip
    assert differing_groups({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 3}) == ["b", "c", "d"]


def test_packer_refuses_buckets_that_hold_nothing():
    with pytest.raises(ValueError, match="bucket_mib"):
        Packer(0)


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_values_are_those_of_a_checkpoint(tied, tmp_path, world):
    """Compared with the checkpoint that transformers writes."""
    from safetensors.torch import load_file

    from srpo.data.tokenizer import load_tokenizer

    model = make_tiny(load_tokenizer(world.policy), TinyConfig(num_layers=2, num_experts=4), seed=3)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path)
    model = load_policy(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    converted = {name: tensor.clone() for name, tensor in iter_checkpoint_params(model)}
    assert converted.keys() == saved.keys() and all(torch.equal(converted[name], saved[name]) for name in saved)
    assert ("lm_head.weight" in saved) is not tied and "model.layers.0.mlp.experts.3.up_proj.weight" in saved

    layouts: Layouts = {}
    for _ in range(2):  # the second round uses the layouts that the first has found
        pieces = list(iter_checkpoint_blocks(model, layouts))
        cut = {p.name: t.reshape(-1)[p.first : p.first + math.prod(p.shape)].view(p.shape) for t, parts in pieces for p in parts}
        assert cut.keys() == saved.keys() and all(torch.equal(cut[name], saved[name]) for name in saved)
        assert len(pieces) == sum(1 for _ in model.parameters()) < len(saved)  # a layer's experts in two pieces
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        saved = {name: 2 * tensor for name, tensor in saved.items()}


def test_a_parameter_that_is_more_than_cut_up_is_converted_every_time(monkeypatch):
    """Gate and up are interleaved, so an expert's gate is not one contiguous piece of the parameter."""
    import srpo.policy.checkpoint_names as module

    weight = torch.randn(2, 6, 4)

    def convert(model, named):
        ((_, tensor),) = named.items()
        return {f"model.layers.0.{e}.{n}": tensor[e, i::2] for e in range(2) for i, n in enumerate(("gate", "up"))}

    monkeypatch.setattr(module, "iter_merged_params", lambda policy: [("model.layers.0.gate_up", weight)])
    monkeypatch.setattr(module, "unwrap", lambda policy: policy)
    monkeypatch.setattr(module, "revert_weight_conversion", convert)
    layouts: Layouts = {}
    for _ in range(2):
        store = WeightStore(1 << 20, torch.float32)
        tensors = read(store, list(store.write(iter_checkpoint_blocks(torch.nn.Module(), layouts), 0)))
        assert len(tensors) == 4 and all(torch.equal(tensors[f"model.layers.0.{e}.up"], weight[e, 1::2]) for e in range(2))
        weight.mul_(3)
        store.close()
    assert layouts == {"model.layers.0.gate_up": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_copied_is_counted_as_it_arrives(monkeypatch, dtype):
    monkeypatch.setattr("srpo.rollout.weights.buckets._CHUNK", 999)
    source = torch.randn(70, 101).t()
    target = torch.empty(101, 70, dtype=dtype)
    assert copy_and_sum(target, source) == bit_sum(source.to(dtype)) and torch.equal(target, source.to(dtype))
