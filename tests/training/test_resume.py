"""Whether a run goes on: with the kernel of the loss that it was started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_world as small

import srpo.training.run
import srpo.training.supervised
from srpo.core.errors import UserError
from srpo.sft import sft
from srpo.train import train
from srpo.training.resume import check_impl

OTHER = "computed by the kernel '(cpu|reference)', and here it would be by 'other'"


def test_a_checkpoint_that_names_no_kernel_is_refused_in_words() -> None:
    check_impl("cpu", "cpu")
    with pytest.raises(UserError, match="of an earlier version of srpo, which did not save its kernel: start anew"):
        check_impl(None, "cpu")


def test_a_run_does_not_go_on_with_another_kernel_of_the_loss(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = world.config(tmp_path / "run", num_steps=1)
    train(cfg, small.ONE)
    train(cfg, small.ONE)  # a finished run ends at once
    monkeypatch.setattr(srpo.training.run, "loss_impl", lambda *_: "other")
    with pytest.raises(UserError, match=f"{OTHER}.* set loss.impl to 'other'"):
        train(cfg, small.ONE)
    train(small.changed(cfg, {"loss": {"impl": "reference"}}), small.ONE)  # asked for by name


def test_neither_does_supervised_training(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = world.sft_config(tmp_path / "sft", num_steps=1)
    sft(cfg, small.ONE)
    sft(cfg, small.ONE)
    monkeypatch.setattr(srpo.training.supervised, "loss_impl", lambda *_: "other")
    with pytest.raises(UserError, match=OTHER):
        sft(cfg, small.ONE)
