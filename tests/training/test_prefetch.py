"""Whole runs that cut groups, score during sampling, or prefetch one step off-policy."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small
import torch

import srpo.train
import srpo.training.collect
from srpo.core.batch import Rollout, read_rollouts
from srpo.core.config.train import Config, StageConfig
from srpo.data.curriculum import Curriculum
from srpo.policy.checkpoint_folders import latest_checkpoint
from srpo.rollout.local import LocalEngine
from srpo.train import train

PREFETCH = {"rollout": {"off_policy_steps": 1}, "loss": {"importance": "truncate"}}


def changes(*several: dict[str, Any]) -> dict[str, Any]:
    """Settings merged section by section."""
    merged: dict[str, Any] = {}
    for one in several:
        for key, value in one.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def steps_of(run_dir: Path) -> dict[int, list[Rollout]]:
    steps: dict[int, list[Rollout]] = {}
    for step, rollout in read_rollouts(run_dir / "rollouts.jsonl"):
        steps.setdefault(step, []).append(rollout)
    return steps


def files_of(run_dir: Path) -> list[bytes]:
    return [(run_dir / name).read_bytes() for name in ("metrics.jsonl", "rollouts.jsonl", "policy/model.safetensors")]


# ---- scoring in parallel with sampling -----------------------------------------------------------------------------------------


def test_scored_meanwhile_or_afterwards_it_is_the_same_run(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with several waves, a slow judge, and refill rounds."""
    threads: Counter[bool] = Counter()
    original = srpo.training.collect.score_rollouts

    def slowly(*args: Any) -> list[Rollout]:
        threads[threading.current_thread() is threading.main_thread()] += 1
        time.sleep(0.01)
        return original(*args)

    monkeypatch.setattr(srpo.training.collect, "score_rollouts", slowly)
    monkeypatch.setattr(LocalEngine.__init__, "__kwdefaults__", {**(LocalEngine.__init__.__kwdefaults__ or {}), "max_rows": 8})
    runs = []
    for overlap in ("off", "on"):
        threads.clear()
        # None of the compared files contains the folder of its run.
        train(
            world.config(tmp_path / overlap, num_steps=2, rollout={"overlap": overlap}, sampler={"refill": 1}),
            small.ONE,
        )
        runs.append(files_of(tmp_path / overlap))
        assert set(threads) == {overlap == "off"}
    assert runs[0] == runs[1]


# ---- cut groups ----------------------------------------------------------------------------------------------------------------


def test_the_last_groups_are_cut_and_their_prompts_come_back(world: Any, tmp_path: Path) -> None:
    """Of six prompts the first four to finish are kept: on this engine the shortest, because all fit one wave of 256 rows."""
    drawn: list[list[str]] = []
    original = Curriculum.next

    def spying(self: Curriculum, n: int) -> Any:
        examples = original(self, n)
        drawn.append([e.example_id for e in examples])
        return examples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curriculum, "next", spying)
        cfg = world.config(tmp_path / "run", rollout={"oversample": 0.5}, sampler={"difficulty_high": 2.0})
        train(cfg, small.ONE)
    lines, steps = small.metrics_of(tmp_path / "run"), steps_of(tmp_path / "run")
    assert [line["rollout/num_cut_groups"] for line in lines] == [2, 2, 2]
    assert [line["rollout/num_groups"] for line in lines] == [4, 4, 4]
    for number, names in enumerate(drawn, start=1):
        assert len(set(names)) == 6
        rollouts = steps[number]
        assert [r.group for r in rollouts] == [g for g in range(4) for _ in range(4)]
        kept = list(dict.fromkeys(r.example_id for r in rollouts))
        assert kept == [name for name in names if name in kept]  # in the order in which they were drawn
        lengths = {r.example_id: len(r.prompt_ids) for r in rollouts}
        cut = set(names) - set(kept)
        assert len(cut) == 2 and len(lengths) == 4
        if number < len(drawn):
            assert cut <= set(drawn[number])  # cut prompts are drawn again in the next step


def test_a_tail_is_cut_without_others_in_its_place(world: Any, tmp_path: Path) -> None:
    train(world.config(tmp_path / "run", num_steps=1, rollout={"cut_tail": 0.25, "overlap": "on"}), small.ONE)
    (line,) = small.metrics_of(tmp_path / "run")
    assert line["rollout/num_cut_groups"] == 1 and line["rollout/num_groups"] == 3 and line["rollout/num_responses"] == 12


def test_nothing_is_cut_by_default(world: Any, tmp_path: Path) -> None:
    train(world.config(tmp_path / "run", num_steps=1), small.ONE)
    assert "rollout/num_cut_groups" not in small.metrics_of(tmp_path / "run")[0]


# ---- prefetch ------------------------------------------------------------------------------------------------------------------


def test_one_step_ahead_the_samples_are_one_step_older(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 0 samples the batches of steps 1 and 2; each prompt is drawn once; sampling runs in parallel with the update."""
    beside: list[bool] = []
    running = threading.Event()
    original, sampling = srpo.train.policy_update, srpo.training.collect.generate

    def updating(*args: Any) -> dict[str, float]:
        beside.append(running.wait(20.0) if len(beside) < 3 else True)  # the next batch has begun before this update ends
        running.clear()
        return original(*args)

    def watched(*args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            running.set()
        yield from sampling(*args)

    monkeypatch.setattr(srpo.train, "policy_update", updating)
    monkeypatch.setattr(srpo.training.collect, "generate", watched)
    cfg = world.config(
        tmp_path / "run",
        **changes(PREFETCH, {"num_steps": 4, "data": {"eval": str(world.eval)}, "train": {"eval_every": 2}}),
    )
    train(cfg, small.ONE)
    steps, lines = steps_of(tmp_path / "run"), small.metrics_of(tmp_path / "run")
    assert {number: {r.policy_version for r in rollouts} for number, rollouts in steps.items()} == {
        1: {0},
        2: {0},
        3: {1},
        4: {2},
    }
    assert beside == [True] * 4
    drawn = [name for rollouts in steps.values() for name in dict.fromkeys(r.example_id for r in rollouts)]
    assert len(set(drawn)) == len(drawn) == 16
    assert lines[0]["rollout/mismatch_kl"] < 1e-6 < 1e-5 < min(line["rollout/mismatch_kl"] for line in lines[1:])
    assert all("rollout/importance_clip_frac" in line for line in lines)
    assert all(line["policy/ratio"] == pytest.approx(1.0) for line in lines)  # pi_old is the trainer's, before the update
    assert "eval/macro_f1" in lines[1] and "eval/macro_f1" in lines[3]


def test_turned_off_nothing_of_it_is_there(world: Any, tmp_path: Path) -> None:
    """The first step of a run with prefetch equals that of one without, except for the rounding that importance weights see."""
    train(world.config(tmp_path / "off", num_steps=1), small.ONE)
    train(world.config(tmp_path / "on", num_steps=1, **PREFETCH), small.ONE)
    off, on = (small.metrics_of(tmp_path / name)[0] for name in ("off", "on"))
    assert on.pop("rollout/importance_clip_frac") == 0
    assert on == pytest.approx(off, rel=1e-4, abs=1e-7)
    assert (tmp_path / "off/rollouts.jsonl").read_bytes() == (tmp_path / "on/rollouts.jsonl").read_bytes()


def test_a_killed_run_loses_no_prompt(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped during a prefetch draws the batch's prompts again, in order, and samples them with newer weights."""
    whole = world.config(tmp_path / "whole", **changes(PREFETCH, {"num_steps": 5, "sampler": {"refill": 1}}))
    train(whole, small.ONE)
    stopped = replace(whole, run_dir=str(tmp_path / "stopped"))
    original = srpo.train.policy_update

    def stopping(*args: Any) -> dict[str, float]:
        if args[2] == 3:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(srpo.train, "policy_update", stopping)
        train(stopped, small.ONE)
    assert not [t for t in threading.enumerate() if t.name.startswith(("prefetch", "score"))]  # no thread samples on
    checkpoint = latest_checkpoint(tmp_path / "stopped/checkpoints")
    assert checkpoint is not None and checkpoint.name == "step_000002"
    train(stopped, small.ONE)
    want, got = steps_of(tmp_path / "whole"), steps_of(tmp_path / "stopped")
    assert [sorted(got), got[1], got[2]] == [sorted(want), want[1], want[2]]
    first = [list(dict.fromkeys(r.example_id for r in steps[3])) for steps in (want, got)]
    assert first[0][:4] == first[1][:4]  # the prefetched batch's prompts; those of its refill may differ
    assert {r.policy_version for r in got[3][:16]} == {2} and {r.policy_version for r in want[3][:16]} == {1}
    assert {r.policy_version for r in got[4][:16]} == {2}  # and it prefetches again


def test_a_new_stage_begins_with_samples_of_its_own(world: Any, tmp_path: Path) -> None:
    """The prefetched batch belongs to the stage that has ended: it is dropped, as if it had not been drawn."""
    stages = (
        StageConfig("first", num_steps=2, tags={"grade": ("L1", "L2")}),
        StageConfig("second", tags={"grade": ("L3", "L4")}),
    )
    cfg: Config = world.config(tmp_path / "run", **changes(PREFETCH, {"num_steps": 4, "curriculum": stages}))
    train(cfg, small.ONE)
    grades = {e.example_id: e.gold[-1] for e in world.examples() if e.gold}
    steps = steps_of(tmp_path / "run")
    for number, rollouts in steps.items():
        assert {grades[r.example_id] for r in rollouts} <= ({"L1", "L2"} if number <= 2 else {"L3", "L4"}), number
    versions = {number: {r.policy_version for r in rollouts} for number, rollouts in steps.items()}
    assert versions == {1: {0}, 2: {0}, 3: {2}, 4: {2}}
    state = latest_checkpoint(tmp_path / "run/checkpoints")
    assert state is not None
    rank = torch.load(next(state.glob("rank_*.pt")), weights_only=True)
    assert rank["extra"]["sampler"]["rates"]["step"] == 4  # the clock of the estimates has not counted the batch that was dropped


def test_what_fails_beside_the_update_ends_the_run(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = srpo.training.collect.score_rollouts

    def failing(*args: Any) -> list[Rollout]:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("the judge is gone")
        return original(*args)

    monkeypatch.setattr(srpo.training.collect, "score_rollouts", failing)
    with pytest.raises(ValueError, match="the judge is gone"):
        train(world.config(tmp_path / "run", **PREFETCH), small.ONE)
    assert [line["step"] for line in small.metrics_of(tmp_path / "run")] == [1]


def test_two_ranks_sample_ahead_and_cut(world: Any, tmp_path: Path) -> None:
    settings = changes(PREFETCH, {"num_steps": 3, "rollout": {"oversample": 0.5}, "sampler": {"refill": 1}})
    small.Program("srpo.train", world.config(tmp_path / "run", **settings), tmp_path, num_ranks=2).finish()
    lines, steps = small.metrics_of(tmp_path / "run"), steps_of(tmp_path / "run")
    assert [line["rollout/num_cut_groups"] for line in lines] == [2, 2, 2]
    for number, rollouts in steps.items():
        groups = [r.group for r in rollouts]
        assert groups == [g for g in range(len(groups) // 4) for _ in range(4)]
        assert {r.policy_version for r in rollouts[:16]} == {max(0, number - 2)}


# ---- support -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_updates", [1, 2])
def test_ratios_on_the_engine_s_support(world: Any, tmp_path: Path, num_updates: int) -> None:
    """On-policy the engine's support equals the trainer's, so the run is the same except for rounding."""
    losses = {"num_updates": num_updates, "kl_coef": 0.05}
    common = {"rollout": {"top_k": 20}, "loss": losses, "num_steps": 1}
    train(world.config(tmp_path / "own", **common), small.ONE)
    train(world.config(tmp_path / "engine", **changes(common, {"rollout": {"support": "replay"}})), small.ONE)
    own, engine = (small.metrics_of(tmp_path / name)[0] for name in ("own", "engine"))
    assert engine == pytest.approx(own, rel=1e-4, abs=1e-6)
    assert (tmp_path / "own/rollouts.jsonl").read_bytes() == (tmp_path / "engine/rollouts.jsonl").read_bytes()
