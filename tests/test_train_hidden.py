"""srpo.train with loss.inputs = "hidden"."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_world as small

from srpo.train import main, train
from srpo.training import outputs


@pytest.mark.parametrize("num_updates", [1, 2])
def test_a_run_is_the_same_to_rounding(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_updates: int) -> None:
    """All other settings are the defaults: a filtered ratio, a recomputed support, and a reference that needs the support."""
    lines, calls = [], []
    for name in ("policy_loss", "linear_policy_loss"):
        op = getattr(outputs, name)
        monkeypatch.setattr(outputs, name, lambda *args, op=op, name=name, **options: calls.append(name) or op(*args, **options))
    for inputs in ("logits", "hidden"):
        loss = {"kl_coef": 0.1, "num_updates": num_updates, "inputs": inputs}
        train(world.config(tmp_path / inputs, num_steps=2, loss=loss, optimizer={"lr": 1e-4}), small.ONE)
        lines.append(small.metrics_of(tmp_path / inputs))
        assert set(calls) == {"policy_loss" if inputs == "logits" else "linear_policy_loss"}
        calls.clear()
    first, second = (line.keys() for line in lines[0])
    for plain, hidden, keys in zip(*lines, (first, second), strict=True):
        assert hidden.keys() == keys
        assert hidden == pytest.approx(plain, rel=1e-3, abs=1e-5)
    assert lines[0][1]["policy/kl"] > 1e-7  # so the reference model was evaluated


def test_a_head_that_caps_its_logits_is_refused(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = Path(shutil.copytree(world.policy, tmp_path / "policy"))
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
    for which in ({"path": str(policy)}, {"reference": str(policy)}):
        cfg = world.config(tmp_path / "run", policy=which)
        assert "changes its logits after the head (final_logit_softcapping)" in small.complaint(main, cfg, tmp_path, capsys)
    assert not (tmp_path / "run").exists()
