"""The best checkpoint and the early end of a run: the same ones when it is killed and started again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import small_world as small
from same_numbers import digests

import srpo.train
import srpo.training.run
from srpo.core.config.train import Config
from srpo.core.metrics import read_metrics
from srpo.policy.checkpoint_folders import checkpoints
from srpo.train import train
from srpo.training.run import Run

NAME = "eval/macro_f1"
SHORT = {"num_prompts": 2, "group_size": 4, "max_new_tokens": 32}


def config(world: Any, run_dir: Path, **changes: Any) -> Config:
    """Evaluates after each of 6 optimizer steps; the length does not change the learning rate."""
    train = {"eval_every": 1, "eval_examples": 2, "checkpoint_every": 2, "keep_checkpoints": 1, "best": NAME}
    cfg = world.config(run_dir, num_steps=6, data={"eval": str(world.eval)}, rollout=SHORT, train=train)
    cfg = small.changed(cfg, {"optimizer": {"schedule": "constant"}, "sampler": {"difficulty_low": -1, "difficulty_high": 2}})
    return small.changed(cfg, changes)


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The values of the score by optimizer step, from 1, in place of the measured ones; the test fills it."""
    values: list[float] = []
    real = srpo.train.evaluate_now
    monkeypatch.setattr(srpo.train, "evaluate_now", lambda run, step: real(run, step) | {NAME: values[step - 1]})
    return values


def differing(a: Path, b: Path) -> set[str]:
    """Files of two run folders that differ, or that only one has; their settings have other paths."""
    first, second = digests(a), digests(b)
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)} - {"config.toml"}


@contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int) -> Iterator[None]:
    """Within it the call of that number stops a run, if the run gets there."""
    original, calls = getattr(place, name), 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(place, name, stopping)
        yield


def test_killed_anywhere_it_keeps_the_same_best(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    scores += [random.choice([0.2, 0.3, 0.4]) for _ in range(5)] + [0.2]  # the last one is never the best
    best = scores.index(max(scores)) + 1
    train(config(world, tmp_path / "whole"), small.ONE)
    assert f"best {NAME}: {max(scores):.4f} at optimizer step {best}, in " in capsys.readouterr().out
    assert set(checkpoints(tmp_path / "whole" / "checkpoints")) == {best, 6}
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [line["best/step"] for line in lines] == [scores.index(max(scores[:n])) + 1 for n in range(1, 7)]
    assert [line["best/value"] for line in lines] == [max(scores[:n]) for n in range(1, 7)]

    train(config(world, tmp_path / "short", num_steps=best, train={"best": ""}), small.ONE)
    parameters = [small.parameters_of(tmp_path / name) for name in ("whole/policy-best", "short/policy", "whole/policy")]
    assert small.same_bits(*parameters[:2]) and not small.same_bits(*parameters[1:])

    killed = config(world, tmp_path / "killed")
    moments: list[tuple[Any, str]] = [(srpo.train, "evaluate_now"), (Run, "save"), (srpo.training.run, "save_policy")]
    moments += [(Run, "save_policies"), (srpo.training.run, "save_checkpoint"), (srpo.train, "policy_update")]
    for place, name in random.sample(moments, len(moments)):
        with stopped_at(monkeypatch, place, name, random.randint(1, 2)):
            train(killed, small.ONE)
    train(killed, small.ONE)
    assert differing(tmp_path / "killed", tmp_path / "whole") == set()


def test_it_ends_when_the_score_no_longer_rises_and_goes_on_only_when_told(
    world: Any, tmp_path: Path, scores: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    first = random.uniform(0.3, 0.9)
    scores += [first, first, first / 2, 0.95, 0.96, 0.0]  # a tie is no rise
    cfg = config(world, tmp_path / "run", train={"patience": 2})
    for _ in range(2):  # the second start changes nothing
        train(cfg, small.ONE)
        out = capsys.readouterr().out
        assert f"ended after optimizer step 3 of 6: {NAME} has not risen in 2 evaluations" in out
        assert f"best {NAME}: {first:.4f} at optimizer step 1" in out
        lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert [line["best/num_stalled"] for line in lines] == [0, 1, 2]
        assert set(checkpoints(tmp_path / "run" / "checkpoints")) == {1, 3}
    train(config(world, tmp_path / "three", num_steps=3), small.ONE)
    assert differing(tmp_path / "run", tmp_path / "three") == set()

    train(small.changed(cfg, {"num_steps": 7}), small.ONE)  # a longer run has still no better evaluation
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
    train(small.changed(cfg, {"train": {"patience": 3}}), small.ONE)
    train(config(world, tmp_path / "six"), small.ONE)
    assert differing(tmp_path / "run", tmp_path / "six") == {"changes.jsonl"}  # of the two lengths
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["best/step"] == 5


def test_a_score_may_be_set_changed_and_taken_away_later(
    world: Any, tmp_path: Path, scores: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    scores += [0.9, 0.5, 0.6, 0.6, 0.1, 0.2]
    cfg = config(world, tmp_path / "run", num_steps=4, train={"best": "", "checkpoint_every": 1, "keep_checkpoints": 3})
    train(cfg, small.ONE)
    assert not (tmp_path / "run" / "policy-best").exists()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    train(small.changed(cfg, {"train": {"best": NAME}}), small.ONE)
    out = capsys.readouterr().out
    assert "the best evaluation so far with a checkpoint is that of step 3" in out and "0.6000 at optimizer step 3" in out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    train(small.changed(cfg, {"num_steps": 6, "train": {"best": NAME, "keep_checkpoints": 1}}), small.ONE)
    assert set(checkpoints(tmp_path / "run" / "checkpoints")) == {3, 6}
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().startswith(metrics)
    train(small.changed(cfg, {"num_steps": 6, "train": {"keep_checkpoints": 1}}), small.ONE)
    assert set(checkpoints(tmp_path / "run" / "checkpoints")) == {6}


def test_a_best_checkpoint_that_is_lost_is_named(
    world: Any, tmp_path: Path, scores: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    scores += [0.9, 0.5, 0.6]
    cfg = config(world, tmp_path / "run", num_steps=3)
    train(cfg, small.ONE)
    best = tmp_path / "run" / "checkpoints" / "step_000001"
    best.rename(tmp_path / "elsewhere")
    line = small.complaint(srpo.train.main, cfg, tmp_path, capsys)
    assert f"{best} is not a complete checkpoint" in line and 'restore it, or set train.best to ""' in line
    (tmp_path / "elsewhere").rename(best)
    train(cfg, small.ONE)


def test_an_unknown_score_is_refused_before_anything_is_written(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = small.complaint(srpo.train.main, config(world, tmp_path / "run", train={"best": "eval/makro_f1"}), tmp_path, capsys)
    assert "the nearest is 'eval/macro_f1'" in line and not (tmp_path / "run").exists()


def test_with_a_critic_its_checkpoints_follow(world: Any, tmp_path: Path, scores: list[float]) -> None:
    scores += [0.5, 0.9, 0.6, 0.7, 0.1, 0.2]
    train(config(world, tmp_path / "run", advantage={"method": "ppo"}), small.ONE)
    assert set(checkpoints(tmp_path / "run" / "checkpoints")) == {2, 6}
    assert set(checkpoints(tmp_path / "run" / "critic")) == {2, 4, 6}
