"""`python -m srpo.select` as real processes: kill -9, torchrun with two ranks, one process that continues after a kill of two."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small

from srpo.core.config.selection import Criteria, SelectConfig
from srpo.core.config.train import PolicyConfig, VllmConfig
from srpo.data.tokenizer import load_tokenizer
from srpo.policy.model import make_tiny
from srpo.select import records_dir
from srpo.selection.shards import finished_shards, read_shard

pytestmark = pytest.mark.slow


def settings(world: Any, folder: Path) -> SelectConfig:
    base = world.config(folder / "run", rollout={"group_size": 3})
    return SelectConfig(**vars(base), shard_examples=8, records_dir=str(folder / "records"))


def files(cfg: SelectConfig) -> dict[str, bytes]:
    """The Parquet files of records and selection."""
    return {str(p.relative_to(records_dir(cfg))): p.read_bytes() for p in records_dir(cfg).rglob("*.parquet")}


@pytest.fixture(scope="module")
def never_killed(world: Any, tmp_path_factory: pytest.TempPathFactory) -> SelectConfig:
    folder = tmp_path_factory.mktemp("whole")
    cfg = settings(world, folder)
    small.Program("srpo.select", cfg, folder).finish()
    assert len(finished_shards(records_dir(cfg))) == 8 and len(files(cfg)) == 9
    return cfg


def killed_after(program: Any, cfg: SelectConfig, num_shards: int) -> frozenset[int]:
    """Kill -9 the program when `num_shards` shards exist. Returns the shards that exist then."""
    until = time.monotonic() + 120
    while len(finished_shards(records_dir(cfg))) < num_shards and program.running() and time.monotonic() < until:
        time.sleep(0.002)
    program.kill()
    return finished_shards(records_dir(cfg))


def test_killed_by_the_system_and_resumed(world: Any, never_killed: SelectConfig, tmp_path: Path) -> None:
    cfg = settings(world, tmp_path)
    done = killed_after(small.Program("srpo.select", cfg, tmp_path), cfg, 2)
    assert 2 <= len(done) < 8, "the kill came too late to say anything"
    times = {n: (records_dir(cfg) / f"records-{n:06d}.parquet").stat().st_mtime_ns for n in done}
    small.Program("srpo.select", cfg, tmp_path).finish()
    assert {n: (records_dir(cfg) / f"records-{n:06d}.parquet").stat().st_mtime_ns for n in done} == times
    assert files(cfg) == files(never_killed)


def test_two_ranks_equal_one(world: Any, never_killed: SelectConfig, tmp_path: Path) -> None:
    cfg = settings(world, tmp_path)
    small.Program("srpo.select", cfg, tmp_path, num_ranks=2).finish()
    assert files(cfg) == files(never_killed)
    assert "shards sampled 8/8" in (tmp_path / "output.txt").read_text()


def test_one_process_goes_on_where_two_were_killed(world: Any, never_killed: SelectConfig, tmp_path: Path) -> None:
    cfg = settings(world, tmp_path)
    done = killed_after(small.Program("srpo.select", cfg, tmp_path, num_ranks=2), cfg, 2)
    assert 2 <= len(done) < 8, "the kill came too late to say anything"
    small.Program("srpo.select", cfg, tmp_path).finish()
    assert files(cfg) == files(never_killed)


@pytest.mark.vllm
def test_two_ranks_with_a_vllm_each(world: Any, tmp_path: Path) -> None:
    """With the real vLLM. The policy is untrained, so the criteria keep every example."""
    tokenizer = load_tokenizer(world.policy)
    make_tiny(tokenizer, replace(small.TINY, head_dim=32), 0).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    cfg = settings(world, tmp_path)
    vllm = VllmConfig(kv_cache_mib=64, max_num_seqs=16, timeout_s=120)
    cfg = replace(
        cfg,
        policy=PolicyConfig(path=str(tmp_path / "policy")),
        rollout=replace(cfg.rollout, engine="vllm", max_new_tokens=16, vllm=vllm),
        select=Criteria(difficulty_low=-1, difficulty_high=2, uniform="keep"),
    )
    small.Program("srpo.select", cfg, tmp_path, num_ranks=2).finish(timeout=400)
    records = [record for number in range(8) for record in read_shard(records_dir(cfg), number)]
    assert [record.example_id for record in records] == [example.example_id for example in world.examples()]
    assert all(record.num_responses == 3 and record.num_different > 1 for record in records)
    assert "64 of 64 examples written" in (tmp_path / "output.txt").read_text()
