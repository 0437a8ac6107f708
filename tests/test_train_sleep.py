"""The engine frees its memory during the update; the next weight sync wakes it before it samples again."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import small_world as small

import srpo.train
import srpo.training.run
from srpo.rollout.local import LocalEngine
from srpo.train import train


class Sleeper(LocalEngine):
    """Records its calls, and refuses to sample after a sleep without a weight sync."""

    def __init__(self, journal: list[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.journal = journal
        self.asleep = False

    def sync_weights(self, policy: Any, version: int) -> None:
        self.journal.append("sync")
        self.asleep = False
        super().sync_weights(policy, version)

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        assert not self.asleep
        self.journal.append("sample")
        return super().stream(*args, **kwargs)

    def sleep(self) -> None:
        self.journal.append("sleep")
        self.asleep = True


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engine calls and updates of a run, in order."""
    calls: list[str] = []
    monkeypatch.setattr(
        srpo.training.run,
        "open_engine",
        lambda cfg, model, parallel: Sleeper(calls, model, device=parallel.device, max_context=cfg.policy.max_context),
    )
    update = srpo.train.policy_update

    def noting(*args: Any) -> dict[str, float]:
        calls.append("update")
        return update(*args)

    monkeypatch.setattr(srpo.train, "policy_update", noting)
    return calls


def test_sleep_update_sync_sample(world: Any, tmp_path, journal: list[str]) -> None:
    """The evaluation after the second step has a sync and samples of its own."""
    train(world.config(tmp_path / "run", num_steps=3, data={"eval": str(world.eval)}, train={"eval_every": 2}), small.ONE)
    step = ["sync", "sample", "sleep", "update"]
    evaluation = ["sync", "sample"]
    assert [name for name, _ in groupby(journal)] == [*step, *step, *evaluation, *step, *evaluation]


def test_an_engine_that_samples_ahead_stays_awake(world: Any, tmp_path, journal: list[str]) -> None:
    train(
        world.config(tmp_path / "run", num_steps=3, rollout={"off_policy_steps": 1}, loss={"importance": "truncate"}), small.ONE
    )
    assert journal.count("sleep") == 1 and journal.count("update") == 3
    assert journal[-2:] == ["sleep", "update"]  # after the last rollouts
