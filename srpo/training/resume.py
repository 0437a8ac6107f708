"""Whether a run folder can be continued: its logs and its checkpoint belong together."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from srpo.core.errors import UserError
from srpo.core.files import check_whole
from srpo.core.logs import check_logs, check_start
from srpo.core.metrics import FILES
from srpo.core.run_dir import first_settings, record_changes, settings_by_key
from srpo.policy.checkpoint import checkpoint_logs
from srpo.policy.checkpoint_folders import latest_checkpoint, sweep
from srpo.training.changes import Changes, remarks


class StoppedRun(Protocol):
    """Settings of a run that goes on."""

    @property
    def run_dir(self) -> str: ...
    @property
    def num_steps(self) -> int: ...


def check_impl(before: str | None, now: str, remedy: str = "") -> None:
    """Raise UserError if a run would go on with another kernel of the loss: equal up to rounding, but not to the bit.

    before: the kernel that the checkpoint names; None if it names none.
    """
    if before is None:
        raise UserError("the checkpoint of this run is of an earlier version of srpo, which did not save its kernel: start anew")
    if before != now:
        raise UserError(
            f"the loss of this run was computed by the kernel {before!r}, and here it would be by {now!r} (a compiler or a GPU "
            f"is missing, or new): restore what was there{remedy}"
        )


def finished_policy(run_dir: Path) -> Path:
    """The policy of a finished run, after it and the logs were compared with what was written. Raises UserError."""
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is not None:
        check_logs(run_dir, int(checkpoint.name.removeprefix("step_")), checkpoint_logs(checkpoint))
    check_whole(run_dir / "policy")
    return run_dir / "policy"


def check_resume(
    cfg: StoppedRun, checkpoint: Path | None, step: int, changes: Changes, keep: int = 1, protected: Collection[int] = ()
) -> None:
    """Compare the logs of the run folder with its checkpoint of this step (None: it has none, 0), and record changed settings.

    Prints what is dropped from the logs, and the settings among `changes.recorded` that hold from now on. Rank 0 calls it, before
    the logs are opened. keep, protected: checkpoints that stay (`sweep`). Raises UserError if a log is not as it was written, if
    no checkpoint is left of those that there were, and if `num_steps` is less than what is done.
    """
    run_dir = Path(cfg.run_dir)
    if cfg.num_steps < step:
        raise UserError(
            f"num_steps is {cfg.num_steps}, and {run_dir} has done {step} optimizer steps: set it to {step} or more, or write an "
            "earlier checkpoint as a model (python -m srpo.export)"
        )
    if checkpoint is not None:
        check_logs(run_dir, step, checkpoint_logs(checkpoint))
        sweep(run_dir / "critic", keep + 1, protected)
        sweep(run_dir / "checkpoints", keep, protected)
    every = max(settings[changes.cadence] for settings in (first_settings(run_dir, cfg), settings_by_key(cfg)))
    recorded = remarks(cfg, changes.recorded)
    lines = [check_start(run_dir, FILES, step, every), *record_changes(run_dir, cfg, recorded, step)]
    for line in filter(None, lines):
        print(line, flush=True)
