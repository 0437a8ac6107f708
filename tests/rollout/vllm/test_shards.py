"""Bit sums of a model that is split over several processes. For the real vLLM see test_real.py."""

from __future__ import annotations

import pytest
import torch

from srpo.rollout.vllm.reload import STALE
from srpo.rollout.vllm.shards import DIFFERS, add_shards, repeated
from srpo.rollout.weights.buckets import bit_sum, differing_groups, place_sum

LAYER = "model.layers.0"


def shards_of(generator: torch.Generator, size: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """(a checkpoint, the shard of each of `size` workers): split by rows, by columns, a norm on all, a padded vocabulary."""
    whole = {
        f"{LAYER}.self_attn.q_proj.weight": torch.randn(8 * size, 6, generator=generator),
        f"{LAYER}.mlp.down_proj.weight": torch.randn(6, 8 * size, generator=generator),
        f"{LAYER}.input_layernorm.weight": torch.randn(6, generator=generator),
        "model.embed_tokens.weight": torch.randn(5 * size - 1, 6, generator=generator),
    }
    rows, columns, norm, vocabulary = whole.values()
    padded = torch.cat((vocabulary, torch.zeros(1, 6)))
    parts = [rows.chunk(size), columns.chunk(size, 1), [norm] * size, padded.chunk(size)]
    return whole, [{name: part[i] for name, part in zip(whole, parts, strict=True)} for i in range(size)]


def sums_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: bit_sum(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shards_add_up_to_the_checkpoint_and_a_change_anywhere_is_seen(size):
    seed = int(torch.randint(1 << 30, ()))
    whole, shards = shards_of(torch.Generator().manual_seed(seed), size)
    once = repeated([{name: place_sum(tensor) for name, tensor in shard.items()} for shard in shards])
    assert once == {f"{LAYER}.input_layernorm.weight"}
    expected = add_shards([sums_of(whole)], frozenset())
    assert expected.keys() == {LAYER, "model.embed_tokens"}
    assert differing_groups(expected, add_shards([sums_of(shard) for shard in shards], once)) == [], seed
    for name in whole:
        for number in range(size):
            changed = [dict(shard) for shard in shards]
            changed[number][name] = changed[number][name] * 2
            assert differing_groups(expected, add_shards([sums_of(shard) for shard in changed], once)), (seed, name, number)


def test_what_is_on_all_shards_has_to_be_the_same_on_all():
    once = frozenset({f"{LAYER}.norm.weight"})
    norm = {f"{LAYER}.norm.weight": 5}
    assert add_shards([norm, norm], once) == {LAYER: 5}
    assert add_shards([norm, {f"{LAYER}.norm.weight": 6}], once) == {f"{LAYER}.norm.weight{DIFFERS}": 6}
    assert add_shards([norm, {}], once) == {f"{LAYER}.norm.weight{DIFFERS}": 5}


def test_a_kernel_that_stayed_behind_on_one_shard_is_a_group_that_no_trainer_has():
    stale = {f"{LAYER}.norm.weight": 5, f"lm_head.weight{STALE}": 7}
    assert f"lm_head.weight{STALE}" in add_shards([{f"{LAYER}.norm.weight": 5}, stale], frozenset())
