"""A checkpoint is loaded as it was written, or refused in a sentence; nothing in it can run code."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
import torch

from srpo.core.digests import COMPLETE, digest_of_file, read_mark, write_mark
from srpo.core.errors import UserError
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.checkpoint_folders import latest_checkpoint
from srpo.policy.model import Policy


def fresh() -> tuple[Policy, torch.optim.Optimizer]:
    policy = Policy(lab.tiny(99))
    return policy, torch.optim.AdamW(policy.parameters(), lr=123.0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("two") / "run" / "checkpoints"
    policy, optimizer = fresh()
    for step in (1, 2):
        lab.adam_update(policy, optimizer, step, lab.one_process(), root / "dump.pt")
        save_checkpoint(root, step, policy, optimizer, {"step": step}, lab.one_process(), keep=2)
    return root


def load(path: Path) -> dict[str, Any]:
    return load_checkpoint(path, *fresh(), lab.one_process())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "delete", "older"])
def test_every_file_is_checked_and_the_older_checkpoint_named(two: Path, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(two, root)
    newest = root / "step_000002"
    files = sorted(path.name for path in newest.iterdir())
    assert len(files) == 4
    for name in files:
        if (name, damage) == (COMPLETE, "delete"):
            continue  # then it is no checkpoint at all
        path = newest / name
        data = path.read_bytes()
        if damage == "flip":
            place = random.randrange(len(data))
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :])
        elif damage == "delete":
            path.unlink()
        elif damage == "older":
            shutil.copy(root / "step_000001" / name, path)
        else:
            path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
        same = path.exists() and path.read_bytes() == data
        if not same:
            with pytest.raises(UserError, match=rf"step_00000[12].*, or remove {newest}.*goes on from .*step_000001|rename it"):
                load(newest)
        path.write_bytes(data)
    assert load(newest) == {"step": 2}
    shutil.rmtree(newest)  # as the message says
    assert latest_checkpoint(root) == root / "step_000001" and load(root / "step_000001") == {"step": 1}


def test_the_last_checkpoint_that_is_damaged_has_no_older_one(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "step_000001" / "rank_0.pt").write_bytes(b"")
    with pytest.raises(UserError, match=rf"remove {tmp_path / 'run'} to start over"):
        load(tmp_path / "run" / "checkpoints" / "step_000001")


def test_a_renamed_checkpoint_is_refused(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "step_000001", tmp_path / "step_000007")
    with pytest.raises(UserError, match="holds the checkpoint of step 1: rename it"):
        load(tmp_path / "step_000007")


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [".metadata", "rank_0.pt"])
@pytest.mark.parametrize("whole", [True, False])
def test_nothing_in_a_strangers_checkpoint_runs(two: Path, tmp_path: Path, name: str, whole: bool) -> None:
    """The stranger has written the checksums, too."""
    path, trap = tmp_path / "step_000002", tmp_path / "trap"
    shutil.copytree(two / "step_000002", path)
    if whole:
        value: Any = Hostile(trap)
    else:  # deep inside what is else right
        value = pickle.loads((path / ".metadata").read_bytes()) if name == ".metadata" else {"extra": {}, "param_groups": []}
        if name == ".metadata":
            value.planner_data = Hostile(trap)
        else:
            value["extra"] = Hostile(trap)
    if name == ".metadata":
        (path / name).write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path / name)
    mark = read_mark(path)
    mark["files"][name] = digest_of_file(path / name)
    write_mark(path, mark)
    with pytest.raises(UserError, match="do not trust"):
        load(path)
    assert not trap.exists()


def test_entries_that_torch_would_unpickle_are_refused(two: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    path = tmp_path / "step_000002"
    shutil.copytree(two / "step_000002", path)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata[next(iter(metadata.state_dict_metadata))] = BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    mark = read_mark(path)
    mark["files"][".metadata"] = digest_of_file(path / ".metadata")
    write_mark(path, mark)
    with pytest.raises(UserError, match=r"names torch.distributed.checkpoint.metadata.BytesStorageMetadata.*do not trust"):
        load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_never_written(tmp_path: Path, value: float) -> None:
    policy, optimizer = fresh()
    save_checkpoint(tmp_path, 1, policy, optimizer, {}, lab.one_process(), keep=1)
    with torch.no_grad():
        policy.model.lm_head.weight[3, 4] = value
    with pytest.raises(UserError, match=r"lm_head.weight has values that are not finite after optimizer step 2"):
        save_checkpoint(tmp_path, 2, policy, optimizer, {}, lab.one_process(), keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000001" and [p.name for p in tmp_path.iterdir()] == ["step_000001"]
