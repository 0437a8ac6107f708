"""Training state on disk: folders `step_000123/` of torch.distributed.checkpoint files, renamed to that name when complete.

A folder counts as a checkpoint only under its final name and with its COMPLETE file, which is written last. So a run that is
killed while saving resumes from the previous checkpoint. Policy and optimizer state are stored under transformers' parameter
names, independently of the number of ranks; `extra` (generators, sampler, counters) is stored per rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from srpo.core.errors import UserError
from srpo.policy.parallel import Parallel, unwrap

COMPLETE = "COMPLETE"
_NAME = re.compile(r"step_(\d{6,})")


def save_checkpoint(
    root: str | Path, step: int, policy: nn.Module, optimizer: Optimizer, extra: dict[str, Any], parallel: Parallel, keep: int = 2
) -> Path:
    """Write `root/step_<step>`, remove all but the newest `keep` complete checkpoints and return the new folder. Collective.

    extra: this rank's own state: plain Python values (numbers, strings, lists, tuples, dicts) and tensors. Any other type raises
    UserError, so that the error comes at saving and not at resume. `load_checkpoint` restores every bit.
    """
    if keep < 1:
        raise UserError(f"train.keep_checkpoints is {keep}: set it to 1 or more")
    root = Path(root)
    final = root / f"step_{step:06d}"
    aside = root / f"{final.name}.tmp-{parallel.broadcast_object(os.getpid())}"
    if parallel.is_main:
        for left in root.glob("step_*.tmp-*"):  # left by killed runs
            shutil.rmtree(left)
        aside.mkdir(parents=True)
    parallel.barrier()
    with _one_process_is_fine():
        state = {**_policy_state(policy), **_optimizer_state(policy, optimizer)}
        dcp.save(state, checkpoint_id=aside, no_dist=not dist.is_initialized())
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    _save_plain({"extra": extra, "param_groups": groups}, _rank_file(aside, parallel.rank))
    parallel.barrier()
    if parallel.is_main:
        (aside / COMPLETE).write_text(json.dumps({"step": step, "world_size": parallel.world_size}) + "\n")
        for path in (*aside.rglob("*"), aside):
            _fsync(path)
        if final.exists():
            _remove(final)
        aside.rename(final)
        _fsync(root)
        for _, old in sorted(_complete(root))[:-keep]:
            _remove(old)
    parallel.barrier()
    return final


def latest_checkpoint(root: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in `root`; None if there is none."""
    return max(_complete(Path(root)), default=(0, None))[1]


def load_checkpoint(path: str | Path, policy: nn.Module, optimizer: Optimizer, parallel: Parallel) -> dict[str, Any]:
    """Load policy and optimizer in place and return this rank's `extra`. Collective.

    Raises UserError if the folder is no complete checkpoint, holds another model (the message names the first parameter that
    differs), or was written by another number of ranks.
    """
    path = Path(path)
    if not (path / COMPLETE).is_file():
        raise UserError(f"{path} is not a complete checkpoint (no {COMPLETE} file): resume from another, or start a new run_dir")
    world_size = json.loads((path / COMPLETE).read_text())["world_size"]
    if world_size != parallel.world_size:
        raise UserError(
            f"{path} was written by {world_size} ranks, this run has {parallel.world_size}: start {world_size} processes"
        )
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = _policy_state(policy)
    _check_same_model(path, state, stored)
    plain = torch.load(_rank_file(path, parallel.rank), weights_only=True)
    state |= _empty_optimizer_state(policy, optimizer, stored)
    with _one_process_is_fine():
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    parameters = dict(unwrap(policy).named_parameters())
    optimizer.state.clear()
    for key, value in state.items():
        kind, name, *field = key.split("/")
        if kind == "optimizer":
            optimizer.state[parameters[name]][field[0]] = value
    for group, values in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        group.update(values)
    return plain["extra"]


@contextlib.contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Suppress torch's warning about the missing process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        yield


def _policy_state(policy: nn.Module) -> dict[str, Any]:
    """Parameters and persistent buffers under transformers' names, sharing memory with the policy."""
    return {f"policy/{name}": value for name, value in unwrap(policy).state_dict().items()}


def _optimizer_state(policy: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Every tensor of the optimizer, as `optimizer/<parameter>/<field>`; empty before its first step."""
    state = {}
    for name, parameter in unwrap(policy).named_parameters():
        for field, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer/{name}/{field}"] = value
    return state


def _empty_optimizer_state(policy: nn.Module, optimizer: Optimizer, stored: dict[str, Any]) -> dict[str, Any]:
    """Empty tensors to read the stored optimizer state into, each with the device and sharding of its parameter."""
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    parameters = dict(unwrap(policy).named_parameters())
    state = {}
    for key, meta in stored.items():
        kind, name, *_ = key.split("/")
        if kind != "optimizer" or not isinstance(meta, TensorStorageMetadata):
            continue
        parameter, dtype = parameters[name], meta.properties.dtype
        if meta.size == parameter.shape and parameter.ndim > 0:
            state[key] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:  # the step count, which torch keeps on the CPU unless the optimizer is fused or capturable
            on_device = group_of[parameter].get("fused") or group_of[parameter].get("capturable")
            state[key] = torch.empty(meta.size, dtype=dtype, device=parameter.device if on_device else "cpu")
    return state


def _check_same_model(path: Path, state: dict[str, Any], stored: dict[str, Any]) -> None:
    theirs = {key: tuple(getattr(meta, "size", ())) for key, meta in stored.items() if key.startswith("policy/")}
    ours = {key: tuple(value.shape) for key, value in state.items()}
    for key in (*ours, *theirs):
        if ours.get(key) != theirs.get(key):
            have, want = (shapes.get(key, "absent") for shapes in (theirs, ours))
            raise UserError(
                f"{path} is a checkpoint of another model: {key.removeprefix('policy/')} is {have} there and {want} in this run. "
                "Set policy.path to the model that the run started from, or start a new run_dir"
            )


def _complete(root: Path) -> list[tuple[int, Path]]:
    if not root.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return [(int(match[1]), path) for match, path in named if match and (path / COMPLETE).is_file()]


def _rank_file(path: Path, rank: int) -> Path:
    return path / f"rank_{rank}.pt"


def _save_plain(value: dict[str, Any], path: Path) -> None:
    torch.save(value, path)
    try:
        torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"a checkpoint's extra state must consist of plain Python values and tensors: {error}") from error


def _remove(path: Path) -> None:
    """Delete a checkpoint: rename it first, so that a half-deleted folder is never taken for a complete checkpoint."""
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}-old")
    path.rename(aside)
    shutil.rmtree(aside)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
