"""Training state on disk: folders `step_000123/` of torch.distributed.checkpoint files, renamed to that name when complete.

`srpo.policy.checkpoint_folders` finds and removes them. COMPLETE has the digest of every file, and all are checked before one is
read. Policy and optimizer state are stored under transformers' parameter names, independently of the number of ranks; frozen
parameters are not stored, they are those of the starting checkpoint. `extra` (generators, sampler, counters) is stored per rank.
Nothing is unpickled that could run code: torch's index of a checkpoint is a pickle, which may only name the types that such an
index consists of.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from srpo.core.digests import COMPLETE, damage, digests_of, read_mark, write_mark
from srpo.core.errors import UserError, naming
from srpo.core.files import binary_file, fsync
from srpo.core.logs import Written
from srpo.policy.checkpoint_folders import keep_newest, remove_checkpoint, way_on
from srpo.policy.parallel import Parallel, to_local, unwrap

_MARK = ("step", "world_size", "logs")  # values of COMPLETE
# The names that torch's index of a checkpoint may use. BytesStorageMetadata is none of them: torch unpickles such entries.
_INDEX = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
_INDEX_TYPES = ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")
_INDEX |= {("torch.distributed.checkpoint.metadata", name) for name in (*_INDEX_TYPES, "_MEM_FORMAT_ENCODING")}


def save_checkpoint(
    root: str | Path,
    step: int,
    policy: nn.Module,
    optimizer: Optimizer,
    extra: dict[str, Any],
    parallel: Parallel,
    keep: int = 2,
    logs: Mapping[str, Written] | None = None,
    protected: Collection[int] = (),
) -> Path:
    """Write `root/step_<step>`, remove all but the newest `keep` complete checkpoints and return the new folder. Collective.

    protected: optimizer steps whose checkpoints stay, however old.

    extra: this rank's own state: plain Python values (numbers, strings, lists, tuples, dicts) and tensors. Any other type raises
    UserError, so that the error comes at saving and not at resume. `load_checkpoint` restores every bit.
    logs: what the run's logs are at this step, on rank 0 (`checkpoint_logs` returns it).
    Raises UserError if a parameter is not finite, so that a ruined model never replaces a checkpoint that can be trained on.
    """
    if keep < 1:
        raise UserError(f"train.keep_checkpoints is {keep}: set it to 1 or more")
    _check_finite(policy, step, parallel)
    root = Path(root)
    final = root / f"step_{step:06d}"
    aside = root / f"{final.name}.tmp-{parallel.broadcast_object(os.getpid())}"
    parallel.on_main(lambda: _make_room(root, aside))
    try:
        _write_state(aside, policy, optimizer, extra, parallel)
        own = [path.name for path in aside.iterdir() if _is_own(path.name, parallel.rank)]
        for name in own:
            fsync(aside / name)
        files = {name: digest for part in parallel.all_gather_object(digests_of(aside, own)) for name, digest in part.items()}
        mark = {"step": step, "world_size": parallel.world_size, "logs": dict(logs or {}), "files": files}
        parallel.on_main(lambda: _finish(root, final, aside, mark, keep, protected))
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk: make room
        raise
    return final


def _make_room(root: Path, aside: Path) -> None:
    for left in root.glob("step_*.tmp-*"):  # by killed runs
        shutil.rmtree(left)
    aside.mkdir(parents=True)


def _write_state(aside: Path, policy: nn.Module, optimizer: Optimizer, extra: dict[str, Any], parallel: Parallel) -> None:
    with _one_process_is_fine(), _torch_os_errors(aside):
        state = {**_policy_state(policy), **_optimizer_state(policy, optimizer)}
        writer = dcp.FileSystemWriter(aside)
        writer.fs = _Files()
        dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    _save_plain({"extra": extra, "param_groups": groups}, _rank_file(aside, parallel.rank))
    parallel.barrier()


def _is_own(name: str, rank: int) -> bool:
    """Whether this rank has written the file of a checkpoint."""
    return name.startswith(f"__{rank}_") or name == f"rank_{rank}.pt" or (rank == 0 and name == ".metadata")


def _finish(root: Path, final: Path, aside: Path, mark: dict[str, Any], keep: int, protected: Collection[int]) -> None:
    write_mark(aside, mark)
    for path in (aside / COMPLETE, aside):
        fsync(path)
    if final.exists():
        remove_checkpoint(final)
    aside.rename(final)
    fsync(root)
    keep_newest(root, keep, protected)


def _check_finite(policy: nn.Module, step: int, parallel: Parallel) -> None:
    names, parameters = zip(*((name, p) for name, p in policy.named_parameters() if p.requires_grad), strict=True)
    counts = torch.stack([(~to_local(parameter.detach()).isfinite()).sum() for parameter in parameters])
    for name, count in zip(names, parallel.all_reduce_sum(counts).tolist(), strict=True):
        if count:
            raise UserError(
                f"{name} has values that are not finite after optimizer step {step}, so no checkpoint of it is written: start "
                "the same run with a lower optimizer.lr, and it goes on from its last checkpoint"
            )


def load_checkpoint(
    path: str | Path, policy: nn.Module, optimizer: Optimizer, parallel: Parallel, of: Path | None = None
) -> dict[str, Any]:
    """Load policy and optimizer in place and return this rank's `extra`. Collective.

    of: the checkpoint of the run that `path`, its critic's, belongs to. Raises UserError if the folder is no complete
    checkpoint, if a file is not as it was written (the message names it, and the older checkpoint that the run can go on from),
    if it holds another model (named is the first parameter that differs), or was written by another number of ranks.
    """
    path = Path(path)
    mark = _checked_mark(path, parallel, way_on(of or path))
    world_size = mark["world_size"]
    if world_size != parallel.world_size:
        raise UserError(
            f"{path} was written by {world_size} ranks, this run has {parallel.world_size}: start {world_size} processes"
        )
    reader = _Reader(path)
    stored = reader.read_metadata().state_dict_metadata
    state = _policy_state(policy)
    _check_same_model(path, state, stored)
    plain = _load_plain(_rank_file(path, parallel.rank))
    state |= _empty_optimizer_state(policy, optimizer, stored)
    _read(path, state, reader)
    parameters = dict(unwrap(policy).named_parameters())
    optimizer.state.clear()
    for key, value in state.items():
        kind, name, *field = key.split("/")
        if kind == "optimizer":
            optimizer.state[parameters[name]][field[0]] = value
    for group, values in zip(optimizer.param_groups, plain["param_groups"], strict=True):
        group.update(values)
    return plain["extra"]


def load_parameters(path: Path, policy: nn.Module, parallel: Parallel, remedy: str) -> None:
    """Load the policy of a checkpoint in place, without its optimizer, whatever number of ranks wrote it. Collective.

    Raises UserError, which ends in `remedy`, as `load_checkpoint` does.
    """
    _checked_mark(path, parallel, remedy)
    reader, state = _Reader(path), _policy_state(policy)
    _check_same_model(path, state, reader.read_metadata().state_dict_metadata)
    _read(path, state, reader)


def parameter_names(path: Path, remedy: str) -> set[str]:
    """Names of the policy's parameters in a checkpoint. Raises UserError, which ends in `remedy`, if its index is damaged."""
    _check_file(path, ".metadata", remedy)
    keys = _Reader(path).read_metadata().state_dict_metadata
    return {key.removeprefix("policy/") for key in keys if key.startswith("policy/")}


def stored_extra(path: Path, remedy: str) -> dict[str, Any]:
    """The `extra` that rank 0 has saved. Raises UserError, which ends in `remedy`, if its file is damaged."""
    file = _rank_file(path, 0)
    _check_file(path, file.name, remedy)
    return _load_plain(file)["extra"]


def _check_file(path: Path, name: str, remedy: str) -> None:
    written = read_mark(path, _MARK)["files"].get(name, "")
    if problem := damage({name: written}, digests_of(path, [name] if (path / name).is_file() else [])):
        raise UserError(f"{path / problem}: {remedy}")


def checkpoint_logs(path: Path) -> dict[str, Written]:
    """Sizes and digests of the run's logs when the checkpoint was saved."""
    return read_mark(path, _MARK)["logs"]


def _read(path: Path, state: dict[str, Any], reader: _Reader) -> None:
    """Read the tensors of `state` in place. Collective."""
    with _one_process_is_fine(), _torch_os_errors(path):
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())


def _checked_mark(path: Path, parallel: Parallel, remedy: str) -> dict[str, Any]:
    """The values of COMPLETE, after all files were compared with their digests, which the ranks share. Collective.

    Raises UserError, which ends in `remedy`.
    """
    if not (path / COMPLETE).is_file():
        raise UserError(f"{path} is not a complete checkpoint (no {COMPLETE} file): {remedy}")
    try:
        mark = read_mark(path, _MARK)
    except UserError:
        raise UserError(f"{path / COMPLETE} is damaged, or of an earlier version of srpo: {remedy}") from None
    if path.name != f"step_{mark['step']:06d}":
        raise UserError(f"{path} holds the checkpoint of step {mark['step']}: rename it")
    names = sorted(name for name in mark["files"] if (path / name).is_file())
    own = names[parallel.rank :: parallel.world_size]
    found = {name: digest for part in parallel.all_gather_object(digests_of(path, own)) for name, digest in part.items()}
    if problem := damage(mark["files"], found):
        raise UserError(f"{path / problem}: {remedy}")
    return mark


class _Files(FileSystem):
    """Torch's access to files, with errors of writing as they were."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with binary_file(Path(path)) if mode == "wb" else super().create_stream(path, mode) as stream:
            yield stream


class _Reader(dcp.FileSystemReader):
    """Torch's reader, which reads the index of a checkpoint without running code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with naming(path), path.open("rb") as file:
                metadata = _IndexUnpickler(file).load()
            metadata.storage_meta.load_id = self.load_id
            assert all(isinstance(value, TensorStorageMetadata) for value in metadata.state_dict_metadata.values())
        except (pickle.UnpicklingError, AssertionError, AttributeError, EOFError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no index of a checkpoint ({error}): do not trust this folder") from error
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if not is_dtype and (module_name, global_name) not in _INDEX:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


@contextlib.contextmanager
def _torch_os_errors(path: Path) -> Iterator[None]:
    """The OSError of a rank instead of torch's exception around it."""
    try:
        with naming(path):
            yield
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                with naming(path):
                    raise failure from error
        raise


@contextlib.contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Suppress torch's warning about the missing process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        yield


def _policy_state(policy: nn.Module) -> dict[str, Any]:
    """Parameters and persistent buffers under transformers' names, sharing memory with the policy; only the parameters that train
    if some do not."""
    model = unwrap(policy)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return {f"policy/{name}": value for name, value in model.state_dict().items() if name in trained or not frozen}


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


def _rank_file(path: Path, rank: int) -> Path:
    return path / f"rank_{rank}.pt"


def _save_plain(value: dict[str, Any], path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"a checkpoint's extra state must consist of plain Python values and tensors: {error}") from error
    with naming(path):
        path.write_bytes(buffer.getvalue())


def _load_plain(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} holds more than plain values and tensors ({reason}): do not trust this folder") from error
