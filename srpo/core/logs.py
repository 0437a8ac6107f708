"""The logs of a run as its checkpoints know them: how many bytes each had, and their digest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from srpo.core.digests import new_digest
from srpo.core.errors import UserError, naming

CHANGES = "changes.jsonl"  # settings that changed when a run was continued
DAMAGED = ".damaged"  # a log that was renamed to this ending is given up: the run goes on with a new one
_CHUNK = 1 << 20
_TAIL = 1 << 22  # bytes at the end of a log that hold its last line


class Written(TypedDict):
    """The part of a log that a checkpoint has seen."""

    num_bytes: int
    digest: str


class LogDigests:
    """Digests of logs that grow at their ends; each call hashes only what is new."""

    def __init__(self, run_dir: Path, names: Iterable[str]) -> None:
        self._run_dir = run_dir
        self._state = {name: (0, new_digest()) for name in names}

    def sync(self) -> dict[str, Written]:
        """Bring the files to the disk and return their sizes and digests; files that do not exist are left out."""
        written: dict[str, Written] = {}
        for name, (num_bytes, digest) in self._state.items():
            path = self._run_dir / name
            if not path.exists():
                continue
            with naming(path), path.open("rb") as file:
                os.fsync(file.fileno())
                file.seek(num_bytes)
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    num_bytes += len(chunk)
            self._state[name] = num_bytes, digest
            written[name] = {"num_bytes": num_bytes, "digest": digest.hexdigest()}
        return written


def check_logs(run_dir: Path, step: int, written: Mapping[str, Written]) -> None:
    """Raise UserError if a log of the run folder no longer begins as it did at the checkpoint of this optimizer step.

    A log that does not exist passes if it was renamed to `NAME.damaged`.
    """
    for name, part in written.items():
        path = run_dir / name
        given_up = path.with_name(name + DAMAGED)
        if not path.is_file() and (given_up.is_file() or not part["num_bytes"]):
            continue
        if not path.is_file():
            raise UserError(f"{path} is missing: restore it; to go on without it, make an empty file {given_up}")
        with naming(path):
            problem = _problem(path, part, step)
        if problem:
            raise UserError(
                f"{path} is damaged: {problem}. Restore it; to go on without it, rename it to {given_up.name}, and the log "
                f"begins anew after step {step}"
            )


def check_start(run_dir: Path, names: Iterable[str], step: int, checkpoint_every: int) -> str:
    """A sentence on the log lines that a run drops when it goes on from its checkpoint of `step` (0: it has none); "" for none.

    Raises UserError if the logs show that there was a checkpoint, but none is left: they would be emptied.
    """
    last = max((_last_step(run_dir / name) for name in names), default=0)
    if last and not step and (last > checkpoint_every or (run_dir / "policy").exists()):
        raise UserError(
            f"{run_dir} has logs up to optimizer step {last}, but no complete checkpoint: restore {run_dir / 'checkpoints'}, or "
            f"remove {run_dir} to start over"
        )
    if last <= step:
        return ""
    lines = f"the lines of step {last} are" if last == step + 1 else f"the lines of steps {step + 1} to {last} are"
    return f"{run_dir} goes on from optimizer step {step}; {lines} dropped from its logs and written again"


def _last_step(path: Path) -> int:
    """Step of the last whole line of a log; 0 if there is none."""
    if not path.is_file():
        return 0
    with naming(path), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().split(b"\n")[:-1]
    return next((number for number in map(_step, reversed(lines)) if number), 0)


def _step(line: bytes) -> int:
    """The step of a line; 0 if it is broken."""
    try:
        number = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return number if isinstance(number, int) else 0


def _problem(path: Path, part: Written, step: int) -> str:
    """The fault in the lines of optimizer steps 1 to `step`, in words; "" if they are as they were written."""
    digest, left = new_digest(), part["num_bytes"]
    with path.open("rb") as file:
        while left and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    if digest.hexdigest() == part["digest"]:
        return ""
    with path.open("rb") as file:
        steps = set(map(_step, file))
    missing = [number for number in range(1, step + 1) if number not in steps] if path.name != CHANGES else []
    if not missing:
        return f"its bytes up to optimizer step {step} are not those that were written"
    runs: list[list[int]] = []
    for number in missing:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    spans = ", ".join(f"{first} to {last}" if first < last else str(first) for first, last in runs)
    return f"it lacks the lines of optimizer steps {spans}"
