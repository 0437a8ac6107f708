"""The folders `step_000123/` of a run's training state: the complete ones, and those that go.

A folder counts as a checkpoint only under its final name and with its COMPLETE file, which is written last. So a run that is
killed while saving resumes from the previous checkpoint.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from srpo.core.digests import COMPLETE

_NAME = re.compile(r"step_(\d{6,})")


def checkpoints(root: str | Path) -> dict[int, Path]:
    """The complete checkpoints in `root` by optimizer step, in order."""
    root = Path(root)
    named = ((step_of(path), path) for path in root.iterdir()) if root.is_dir() else ()
    return dict(sorted((step, path) for step, path in named if step is not None and (path / COMPLETE).is_file()))


def latest_checkpoint(root: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in `root`; None if there is none."""
    return next(reversed(checkpoints(root).values()), None)


def step_of(path: Path) -> int | None:
    """The optimizer step that a folder's name says; None for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def way_on(path: Path) -> str:
    """Advice: the run of a checkpoint that cannot be loaded goes on from an older one."""
    step = step_of(path)
    older = [each for number, each in checkpoints(path.parent).items() if step is not None and number < step]
    if not older:
        return f"restore it, or remove {path.parent.parent} to start over, because there is no older checkpoint"
    return f"restore it, or remove {path}, and the run goes on from {older[-1]}"


def keep_newest(root: Path, keep: int, protected: Collection[int] = ()) -> None:
    """Remove all complete checkpoints but the newest `keep` and those of the `protected` steps."""
    for step, old in list(checkpoints(root).items())[:-keep]:
        if step not in protected:
            remove_checkpoint(old)


def sweep(root: Path, keep: int, protected: Collection[int] = ()) -> None:
    """Remove what a run that was killed, or met a full disk, has left: checkpoints before the newest `keep` complete ones, whole
    or not, without the `protected` steps, and temporary folders. A run may have nothing to save any more when it goes on."""
    newest = list(checkpoints(root))[-keep:]
    for path in root.glob("step_*"):
        step = step_of(path)
        old = step is not None and newest and step < newest[0] and step not in protected
        if ".tmp-" in path.name or old:
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint: rename it first, so that a half-deleted folder is never taken for a complete checkpoint."""
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}-old")
    path.rename(aside)
    shutil.rmtree(aside)
