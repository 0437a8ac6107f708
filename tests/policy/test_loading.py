"""`load_to_shard`: rank 0 reads a checkpoint, and after `Parallel.shard` every rank has its shards of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
import torch

from srpo.policy.loading import _parameters_on_meta, load_to_shard
from srpo.policy.model import load_policy
from srpo.policy.parallel import named_stored
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine

CASES = ("untied", "tied", "with_bias")


@pytest.fixture(scope="module")
def folder(ranks: Path) -> Path:
    """The folder with the checkpoints and the results that two ranks have written."""
    return ranks / "loading_lab"


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """The results of each rank."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_checkpoint(name: str, folder: Path, results: list[dict[str, Any]]) -> None:
    model = load_policy(folder / name)
    want, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    whole = dict(named_stored(model))
    assert buffers.keys() >= {"model.rotary_emb.inv_freq"} and len(whole) == len(want) + (name == "with_bias")
    for rank, result in enumerate(results):
        assert lab.same_bits(result[name]["whole"], whole)
        assert lab.same_bits(result[name]["buffers"], buffers)
        for key, part in result[name]["parts"].items():
            assert torch.equal(part, want[key].chunk(2)[rank])


def test_the_biased_routers_have_buffers_of_the_checkpoint(results: list[dict[str, Any]]) -> None:
    biases = [b for name, b in results[1]["with_bias"]["buffers"].items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 1 and bool((biases[0] >= 1).all())


@pytest.mark.parametrize("name", CASES)
def test_only_rank_0_reads_weights_and_has_memory_for_them(name: str, results: list[dict[str, Any]]) -> None:
    assert [result[name]["num_reads"] for result in results] == [1, 0]
    assert not any(results[0][name]["on_meta"]) and all(results[1][name]["on_meta"])
    # Parameters are sent one at a time; each of gloo's two threads may still hold the last one that it sent.
    assert 1 <= results[1][name]["most"] <= 3 < len(results[1][name]["on_meta"]) / 4
    assert [result[name]["tied"] for result in results] == [name == "tied"] * 2


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_the_local_engine_starts_without_weights(name: str, folder: Path, results: list[dict[str, Any]]) -> None:
    assert "sync_weights comes first" in results[1][name]["before_sync"]
    engine = LocalEngine(load_policy(folder / name))
    samples = engine.generate([(5, 6, 7), (8, 9)], SamplingParams(max_new_tokens=6, group_size=2), seed=1)
    want = [sample.response_ids for sample in samples]
    assert [result[name]["samples"] for result in results] == [want, want]


def test_a_head_that_every_rank_made_is_that_of_rank_0(folder: Path, results: list[dict[str, Any]]) -> None:
    backbone = load_policy(folder / "untied").base_model.state_dict()
    for result in results:
        parameters = dict(result["critic"]["whole"])
        assert torch.equal(parameters.pop("value_head.weight"), torch.ones(1, 32))
        assert torch.equal(parameters.pop("value_head.bias"), torch.zeros(1))
        assert parameters.keys() == backbone.keys() and all(torch.equal(parameters[name], backbone[name]) for name in backbone)
    assert [result["critic"]["parts"]["value_head.weight"].shape[0] for result in results] == [1, 0]


def test_a_config_that_ties_what_differs_is_refused_on_every_rank(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "differ in 1 parameters or buffers, first lm_head.weight" in result["refused"]


def test_one_process_loads_as_ever(folder: Path) -> None:
    model = load_to_shard(folder / "tied", lab.one_process())
    assert lab.same_bits(model.state_dict(), load_policy(folder / "tied").state_dict())
    with pytest.raises(ValueError, match=r"no model in .*config\.json"):
        load_to_shard(folder / "absent", replace(lab.one_process(), rank=1, world_size=2))


def test_modules_made_later_have_memory_again() -> None:
    with _parameters_on_meta():
        assert torch.nn.Linear(2, 3).weight.is_meta
    assert not torch.nn.Linear(2, 3).weight.is_meta
