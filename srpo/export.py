"""A model from any checkpoint of a run: `python -m srpo.export runs/demo --step best`.

Writes the policy at an optimizer step as a Hugging Face folder with its tokenizer. Runs in one process on the CPU, also for
checkpoints that several ranks saved, and while the run goes on.
"""

from __future__ import annotations

from srpo.core.config.export import ExportConfig
from srpo.core.errors import UserError
from srpo.core.settings import check_command_line, check_one_process, run_program

if __name__ == "__main__":
    check_command_line(ExportConfig)  # -h and mistakes answer before torch is imported

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from srpo.core.config.train import PolicyConfig
from srpo.core.run_dir import check_unchanged, policy_settings
from srpo.core.run_lock import hold
from srpo.data.tokenizer import load_tokenizer
from srpo.policy.adapters import adapter_folder, add_adapter, has_adapter, merged_into, save_adapter
from srpo.policy.checkpoint import load_parameters, parameter_names, stored_extra
from srpo.policy.checkpoint_folders import checkpoints
from srpo.policy.model import Policy, load_policy, save_policy
from srpo.policy.parallel import Parallel
from srpo.policy.scalar import SCALAR_HEAD, ScalarModel, save_scalar
from srpo.rewards.guidelines import kept_files
from srpo.training.inputs import model_inputs, starting_policy

EXPORT = "export.json"  # in an exported folder: its run, step and dtype
OTHER_STEP = "restore it, or give another --step"  # what to do about a damaged checkpoint


def export(config: ExportConfig) -> Path:
    """Write the model and return its folder. Raises UserError for a step that the run has not, and for a folder in use."""
    run_dir = Path(config.run_dir)
    if not config.run_dir:
        raise UserError("no run folder: name one, as in `python -m srpo.export runs/demo`")
    if not run_dir.is_dir():
        raise UserError(f"no such folder: {run_dir}")
    checkpoint = chosen_checkpoint(run_dir, config.step)
    settings = policy_settings(run_dir)
    settings = replace(settings, path=config.policy or settings.path)
    start = Path(settings.path)
    if not start.is_dir():
        raise UserError(f"{start}, the checkpoint that {run_dir} started from, is not there: say where it is with --policy DIR")
    check_unchanged(run_dir, model_inputs(starting_policy(settings)))
    out = Path(config.out) if config.out else run_dir / "export" / checkpoint.name
    check_target(out, run_dir)
    tokenizer = load_tokenizer(start, settings.bos, settings.chat)
    model = restored(checkpoint, settings)
    adapter = model if has_adapter(model) else None
    if adapter is not None and isinstance(model, Policy):  # merged in fp32, whatever the export's dtype
        model = Policy(merged_into(model, load_policy(start)))
    model = model.to(getattr(torch, config.dtype))
    about = {"run": str(run_dir), "checkpoint": checkpoint.name, "dtype": config.dtype}
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold(out.parent):
        save = save_scalar if isinstance(model, ScalarModel) else save_policy
        if adapter is not None and isinstance(model, Policy):
            save_adapter(adapter, adapter_folder(out))
        save(model, tokenizer, out, {EXPORT: json.dumps(about, indent=1) + "\n", **kept_files(run_dir)})
    print(f"{checkpoint.name} of {run_dir} is written to {out} ({config.dtype})")
    return out


def restored(checkpoint: Path, policy: PolicyConfig) -> Policy | ScalarModel:
    """The model of a checkpoint, on the CPU in fp32, with its adapter if it has one; `policy` are the settings of its run."""
    model: Any = add_adapter(load_policy(policy.path), policy, seed=0)
    scalar = any(name.startswith(f"{SCALAR_HEAD}.") for name in parameter_names(checkpoint, OTHER_STEP))
    found = ScalarModel(model) if scalar else Policy(model)
    one = Parallel(0, 1, 0, torch.device("cpu"))
    load_parameters(checkpoint, found, one, OTHER_STEP)
    return found


def chosen_checkpoint(run_dir: Path, step: str) -> Path:
    """The run's checkpoint that `step` names: a number, "last" or "best". Raises UserError, which lists those there are."""
    found = checkpoints(run_dir / "checkpoints")
    if not found:
        stages = sorted(path.parent.name for path in run_dir.glob("*/checkpoints") if checkpoints(path))
        hint = f"; here {' and '.join(stages)}" if stages else ""
        raise UserError(f"{run_dir} has no complete checkpoint: name the folder of a run (or of a stage) that has some{hint}")
    last = max(found)
    number = last if step == "last" else int(step) if step.isascii() and step.isdigit() else None
    if step == "best":
        best = stored_extra(found[last], OTHER_STEP).get("best")
        if best is None:
            raise UserError(
                f"{run_dir} knows no best step, because train.best is not set, or nothing was evaluated yet: give last or one "
                f"of {_listed(found)}"
            )
        number = best["step"]
        print(f"best {best['metric']} up to optimizer step {last}: {best['value']:.4f} at step {number}")
    if number not in found:
        raise UserError(f"{run_dir} has no checkpoint of step {step}: give last, best or one of {_listed(found)}")
    return found[number]


def check_target(out: Path, run_dir: Path) -> None:
    """Raise UserError if the folder is anything but free or an export, or lies where the run keeps its training state."""
    if out.exists() and not (out / EXPORT).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out is {out}, which exists and is no export (it has no {EXPORT}): give another folder")
    for name in ("checkpoints", "critic"):
        if out.resolve().is_relative_to((run_dir / name).resolve()):
            raise UserError(f"out is {out}, in {run_dir / name}, which the run clears: give another folder")


def _listed(steps: dict[int, Path]) -> str:
    return ", ".join(map(str, steps))


def main(config: ExportConfig) -> None:
    """Export in this process."""
    check_one_process("srpo.export", "one process reads the checkpoints of any number of ranks")
    export(config)


if __name__ == "__main__":
    run_program(main, ExportConfig)
