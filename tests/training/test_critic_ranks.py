"""Two ranks under FSDP2 compute the same advantages and critic update as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import policy_lab as lab
import ppo_lab
import pytest
import torch


@pytest.fixture(scope="module")
def saved(ranks: Path) -> dict[str, Any]:
    """The results of two ranks, from `ppo_lab`."""
    return torch.load(ranks / "ppo_lab" / "saved.pt", weights_only=True)


@pytest.mark.parametrize("name", ["uneven", "idle"])
def test_two_ranks_are_one(saved: dict[str, Any], tmp_path: Path, name: str) -> None:
    one = ppo_lab.step(lab.batches(7), lab.one_process(), tmp_path / "dump.pt")
    two = saved[name]
    torch.testing.assert_close(two["advantages"], one["advantages"], rtol=1e-4, atol=1e-5)
    assert one["advantages"].abs().max() == 1.5 and one["metrics"]["advantage/clip_frac"] > 0
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)
    for key, grad in one["gradients"].items():
        assert (two["gradients"][key] - grad).norm() <= 1e-4 * grad.norm() + 1e-8, key


def test_a_sharded_critic_goes_on_bit_for_bit(saved: dict[str, Any]) -> None:
    assert saved["same"] == [[True, True]] * 2
