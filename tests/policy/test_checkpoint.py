from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from srpo.core.digests import COMPLETE
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.checkpoint_folders import latest_checkpoint, sweep
from srpo.policy.model import Policy


def trained(tmp_path: Path, seed: int = 1) -> tuple[Policy, torch.optim.Optimizer]:
    policy = Policy(lab.tiny(seed))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(2):
        lab.adam_update(policy, optimizer, step, lab.one_process(), tmp_path / "dump.pt")
    return policy, optimizer


def fresh() -> tuple[Policy, torch.optim.Optimizer]:
    policy = Policy(lab.tiny(99))
    return policy, torch.optim.AdamW(policy.parameters(), lr=123.0)


def test_round_trip_is_bit_exact_and_training_continues_alike(tmp_path: Path) -> None:
    parallel = lab.one_process()
    policy, optimizer = trained(tmp_path)
    extra = {"rng": torch.get_rng_state(), "sampler": {"seen": [1, 2], "score": 0.25, "by": {"a": (1, None)}}}
    path = save_checkpoint(tmp_path / "c", 2, policy, optimizer, extra, parallel)
    before = lab.train_state(policy, optimizer)
    other, other_optimizer = fresh()
    loaded = load_checkpoint(path, other, other_optimizer, parallel)
    assert torch.equal(loaded["rng"], extra["rng"]) and loaded["sampler"] == extra["sampler"]
    assert other_optimizer.param_groups[0]["lr"] == 0.01
    assert lab.same_bits(lab.train_state(other, other_optimizer), before)
    assert any(key.endswith("/exp_avg_sq") for key in before)
    for model, optim in ((policy, optimizer), (other, other_optimizer)):
        lab.adam_update(model, optim, 5, parallel, tmp_path / "dump.pt")
    assert lab.same_bits(lab.train_state(policy, optimizer), lab.train_state(other, other_optimizer))


def test_saving_does_not_change_what_is_saved(tmp_path: Path) -> None:
    policy, optimizer = fresh()  # before the first step the optimizer has no state, and saving must not create any
    path = save_checkpoint(tmp_path, 0, policy, optimizer, {}, lab.one_process())
    assert not optimizer.state
    other, other_optimizer = trained(tmp_path)
    load_checkpoint(path, other, other_optimizer, lab.one_process())
    assert not other_optimizer.state
    assert lab.same_bits(lab.train_state(other, other_optimizer), lab.train_state(policy, optimizer))


def test_two_ranks_round_trip(two_ranks: Path) -> None:
    results = json.loads((two_ranks / "results.json").read_text())
    assert results["loaded_bits"] == [True, True] and results["continued_bits"] == [True, True]
    assert results["extra"] == [{"rank": 0}, {"rank": 1}]


def test_another_number_of_ranks_is_refused(two_ranks: Path) -> None:
    path = latest_checkpoint(two_ranks / "checkpoints")
    assert path is not None
    with pytest.raises(ValueError, match="written by 2 ranks"):
        load_checkpoint(path, *fresh(), lab.one_process())


def test_incomplete_ones_are_never_chosen_and_are_cleared_away(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    policy, optimizer = fresh()
    path = save_checkpoint(tmp_path, 3, policy, optimizer, {}, lab.one_process())
    aside = tmp_path / "step_000009.tmp-17"
    aside.mkdir()
    (aside / COMPLETE).write_text("{}")
    unmarked = tmp_path / "step_000008"
    unmarked.mkdir()
    (tmp_path / "step_notes").mkdir()
    assert latest_checkpoint(tmp_path) == path
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load_checkpoint(unmarked, policy, optimizer, lab.one_process())
    assert save_checkpoint(tmp_path, 8, policy, optimizer, {}, lab.one_process()) == latest_checkpoint(tmp_path)
    assert not aside.exists()


def test_killed_at_any_file_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the process before each rename, fsync and removal of a save: a complete checkpoint always remains."""

    class Killed(BaseException):
        pass

    operations = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal operations
            if operations == 0:
                raise Killed
            operations -= 1
            return real(*args, **options)

        return call

    policy, optimizer = fresh()
    save_checkpoint(tmp_path, 1, policy, optimizer, {"at": 1}, lab.one_process(), keep=1)
    loaded = []
    for allowed in range(100):
        operations, done = allowed, False
        with monkeypatch.context() as patch:
            for name in ("rename", "fsync", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                save_checkpoint(tmp_path, 2, policy, optimizer, {"at": 2}, lab.one_process(), keep=1)
                done = True
            except (Killed, CheckpointException):  # torch wraps exceptions of its writer
                pass
        newest = latest_checkpoint(tmp_path)
        assert newest is not None
        loaded.append(load_checkpoint(newest, policy, optimizer, lab.one_process())["at"])
        if done:
            break
    assert done and loaded == sorted(loaded) and loaded.count(1) > 5 and loaded.count(2) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_keeps_the_newest(tmp_path: Path) -> None:
    policy, optimizer = fresh()
    for step in (1, 2, 10, 3):
        save_checkpoint(tmp_path, step, policy, optimizer, {}, lab.one_process(), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000003", "step_000010"]
    save_checkpoint(tmp_path, 10, policy, optimizer, {"second": True}, lab.one_process(), keep=1)
    (only,) = tmp_path.iterdir()
    assert load_checkpoint(only, policy, optimizer, lab.one_process()) == {"second": True}


def test_another_model_names_the_first_parameter_that_differs(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *fresh(), {}, lab.one_process())
    wider = Policy(lab.tiny(config=replace(lab.CONFIG, expert_size=24)))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj is \(4, 32, 32\) there and \(4, 48,"):
        load_checkpoint(path, wider, torch.optim.AdamW(wider.parameters()), lab.one_process())
    shorter = Policy(lab.tiny(config=replace(lab.CONFIG, num_layers=1)))
    with pytest.raises(ValueError, match=r"model\.layers\.1\..* and absent in this run"):
        load_checkpoint(path, shorter, torch.optim.AdamW(shorter.parameters()), lab.one_process())


def test_extra_that_could_not_be_read_back_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain Python values"):
        save_checkpoint(tmp_path, 1, *fresh(), {"what": lab.CONFIG}, lab.one_process())
    assert latest_checkpoint(tmp_path) is None


def test_what_killed_runs_have_left_is_swept(tmp_path: Path) -> None:
    for name in ("step_000001", "step_000002", "step_000003", "step_000004", "step_000005"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for step in (1, 3, 4):
        (tmp_path / f"step_{step:06d}" / "COMPLETE").touch()
    for name in ("step_000002.tmp-17", "step_000001.tmp-17-old", "step_000002.kept", "other"):
        (tmp_path / name).mkdir()
    sweep(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step_000003",
        "step_000004",
        "step_000005",
        "step_000002.kept",
        "other",
    }
    sweep(tmp_path / "nothing", keep=1)
