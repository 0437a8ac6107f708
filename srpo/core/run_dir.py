"""Run folders: each belongs to one configuration and to inputs of the same contents, which are compared at every later start."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from srpo.core.config.train import Config, PolicyConfig
from srpo.core.digests import COMPLETE
from srpo.core.errors import UserError, naming
from srpo.core.files import write_whole
from srpo.core.jsonl import json_file, json_lines
from srpo.core.logs import CHANGES
from srpo.core.settings import apply_table, apply_toml, dump_toml, toml_table

INPUTS = "inputs.json"
# Names in a folder without config.toml that a run would replace, or that make it the folder of a checkpoint.
_TAKEN = ("checkpoints", "metrics.jsonl", "timing.jsonl", "rollouts.jsonl", CHANGES, "policy", "policy-best", "adapter")
_TAKEN += ("config.json", COMPLETE)
# Everything that a run reads: {"the reference": (path, digest of the contents)}.
Inputs = Mapping[str, tuple[str, str]]


def claim_run_dir(
    run_dir: Path,
    cfg: Any,
    is_main: bool,
    may_change: Collection[str] = (),
    inputs: Inputs | None = None,
    paths: Collection[str] = (),
) -> None:
    """Make the folder and write the resolved settings into its `config.toml`, and the inputs into `inputs.json`, on rank 0.

    Raises UserError, with the first setting or input that differs, if the folder holds a run of another configuration or of other
    contents: a resumed run must be the run that was started. `run_dir` itself may differ, so folders can be moved, and so may the
    dotted keys in `may_change`, and those in `paths`, which name inputs and are known by their contents; the file keeps their
    first values. If the settings have defaults, a setting that the file lacks counts with its default: the folder is older than
    the setting. If the file of the inputs is missing, which is said, they are recorded now.
    """
    path = run_dir / "config.toml"
    if path.is_file():
        recorded = _recorded(run_dir / INPUTS) if inputs is not None else None
        free = {"run_dir", *may_change, *(paths if recorded is not None else ())}
        theirs, ours = first_settings(run_dir, cfg), settings_by_key(cfg)
        for key in sorted(ours.keys() | theirs.keys()):
            if key not in free and ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{run_dir} holds a run with {key} = {theirs.get(key)!r}, this one has {ours.get(key)!r}: "
                    "give another run_dir, or remove the folder"
                )
        if inputs is not None and recorded is not None:
            _check_inputs(run_dir, recorded, inputs)
        elif inputs is not None and is_main:
            print(f"{run_dir / INPUTS} is missing: the contents of the inputs are recorded from now on", flush=True)
            write_whole(run_dir / INPUTS, _inputs_text(inputs))
    elif taken := [name for name in _TAKEN if (run_dir / name).exists()]:
        raise UserError(
            f"{run_dir} has {taken[0]}, but no config.toml with the settings of a run: restore it, or give another run_dir"
        )
    elif is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        if inputs is not None:
            write_whole(run_dir / INPUTS, _inputs_text(inputs))
        write_whole(path, dump_toml(cfg))


def settings_by_key(cfg: Any) -> dict[str, Any]:
    """Settings by dotted key, as values of TOML; an array of tables (`steps`) is one value."""
    return _by_key(tomllib.loads(dump_toml(cfg)))


def first_settings(run_dir: Path, cfg: Any) -> dict[str, Any]:
    """`settings_by_key` of the folder's `config.toml`, with the defaults of `cfg` for those that it lacks."""
    ours = settings_by_key(cfg)
    defaults = settings_by_key(type(cfg)()) if _has_defaults(cfg) else {}
    return {key: defaults[key] for key in ours.keys() & defaults.keys()} | _by_key(_table(run_dir / "config.toml"))


def _table(path: Path) -> dict[str, Any]:
    try:
        with naming(path):
            return toml_table(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or give another run_dir") from error


def _inputs_text(inputs: Inputs) -> str:
    values = {name: {"path": path, "digest": digest} for name, (path, digest) in inputs.items()}
    return json.dumps(values, indent=1) + "\n"


def _recorded(path: Path) -> dict[str, str] | None:
    """Digests of the inputs by name; None if the file does not exist."""
    if not path.is_file():
        return None
    try:
        return {name: value["digest"] for name, value in json_file(path).items()}
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or give another run_dir") from error


def _check_inputs(run_dir: Path, recorded: Mapping[str, str], inputs: Inputs) -> None:
    for name, (path, digest) in inputs.items():
        if name not in recorded:
            raise UserError(f"{run_dir} was started without {name}, which is now {path}: leave it out, or give another run_dir")
        if recorded[name] != digest:
            raise UserError(
                f"{name} at {path} is not the one that {run_dir} was started with (its contents differ): restore it, or give "
                "another run_dir"
            )
    if gone := sorted(recorded.keys() - inputs.keys()):
        raise UserError(f"{run_dir} was started with {gone[0]}, which is not set now: set it, or give another run_dir")


def check_unchanged(run_dir: Path, inputs: Inputs) -> None:
    """Raise UserError if one of `inputs` has other contents than the one of that name that the folder was started with."""
    recorded = _recorded(run_dir / INPUTS) or {}
    names = recorded.keys() & inputs.keys()
    _check_inputs(run_dir, {name: recorded[name] for name in names}, {name: inputs[name] for name in names})


def record_changes(run_dir: Path, cfg: Any, keys: Mapping[str, str] | Collection[str], step: int) -> list[str]:
    """Settings that differ from those with which the run was last continued, as lines of text; rank 0 calls it at each start.

    keys: the settings to compare; of a mapping, with the remark that each line ends with. They are appended to `changes.jsonl`
    with the optimizer step after which they hold. Entries after `step`, of which nothing is left in the run, are dropped.
    """
    path = run_dir / CHANGES
    ours, now = settings_by_key(cfg), first_settings(run_dir, cfg)
    lines = []
    if path.is_file():
        try:
            known = [line for _, line in json_lines(path, "the line that the program wrote")]
            lines = [line for line in known if line["after_step"] <= step]
            now |= {line["setting"]: line["to"] for line in lines}
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): restore it, or give another run_dir") from error
    changed = {key: (now[key], ours[key]) for key in keys if now[key] != ours[key]}
    fresh = [{"after_step": step, "setting": key, "from": a, "to": b} for key, (a, b) in changed.items()]
    if fresh or (path.is_file() and len(lines) < len(known)):
        write_whole(path, "".join(json.dumps(line) + "\n" for line in [*lines, *fresh]))
    remarks = keys if isinstance(keys, Mapping) else {}
    return [
        f"{key}: {a} until optimizer step {step}, {b} from then on (recorded in {path}){remarks.get(key, '')}"
        for key, (a, b) in changed.items()
    ]


def check_out(out: Path, files: Iterable[str], sources: Iterable[str | Path]) -> None:
    """Raise UserError if the `files` written into the folder `out` would replace files of a run or one of the `sources`."""
    for mark in ("config.toml", "metrics.jsonl", "checkpoints", "config.json", COMPLETE):
        if (out / mark).exists():
            kind = "a checkpoint" if mark in ("config.json", COMPLETE) else "a run"
            raise UserError(f"out is {out}, the folder of {kind} ({mark} is there), whose files would be lost: give another")
    taken = {out.resolve(), *((out / name).resolve() for name in files)}
    for source in map(Path, filter(None, sources)):
        if source.resolve() in taken:
            raise UserError(f"out is {out}, where {source} is read from: give another folder")


def _has_defaults(cfg: Any) -> bool:
    return all(field.default is not MISSING or field.default_factory is not MISSING for field in fields(cfg))


def _by_key(table: dict[str, Any]) -> dict[str, Any]:
    """The values of a table by dotted key, without the length of the last curriculum stage: it ends with the run."""
    flat = _leaves(table)
    if stages := flat.get("curriculum"):
        flat["curriculum"] = [*stages[:-1], {key: value for key, value in stages[-1].items() if key != "num_steps"}]
    return flat


def _leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def policy_settings(run_dir: Path) -> PolicyConfig:
    """The settings `policy.*` of a run of srpo.train, srpo.sft or srpo.dpo. Raises UserError if the folder is none."""
    path = run_dir / "config.toml"
    table = _table(path).get("policy") if path.is_file() else None
    if not isinstance(table, dict) or not table.get("path"):
        raise UserError(
            f"{run_dir} is not the folder of a run of srpo.train, srpo.sft or srpo.dpo, whose config.toml names policy.path"
        )
    return apply_table(PolicyConfig(), table, f"{path}, [policy]")


def run_settings(source: Path, config: str, say: bool = True) -> Config:
    """The settings for evaluating `source`, a checkpoint or a file; prints where they come from if `say` is true.

    They come from the TOML file `config` if it is named, else from the training run whose folder contains `source` (up to three
    folders deep). Only steps, grades and `policy.*` come from a run of `srpo.sft` or `srpo.dpo`, which has no others. The rest
    are the defaults.
    """
    if config:
        return apply_toml(Config(), Path(config))
    warm: tuple[Path, dict[str, Any]] | None = None  # the nearest run of srpo.sft or srpo.dpo
    for folder in source.resolve().parents[:4]:
        path = folder / "config.toml"
        table = _table(path) if path.is_file() else {}
        if table.keys() >= {"steps", "rollout"}:
            if say:
                print(f"steps, prompt and lengths are those of {path}")
            return apply_toml(Config(), path)
        if warm is None and table.keys() >= {"steps", "grades", "policy"}:
            warm = path, table
    if warm is not None:
        path, table = warm
        around = "" if table.get("prompt", "{prompt}") == "{prompt}" else f" (with its prompt, {table['prompt']!r}, around them)"
        if say:
            print(
                f"steps, grades and policy are those of {path}, prompt and lengths the defaults: if its pairs were made with "
                f"others, give --config FILE with [data] prompt and guidelines{around}, [rollout] max_new_tokens, and the same "
                "[steps], [grades] and [policy]"
            )
        return apply_table(Config(), {key: table[key] for key in ("steps", "grades", "policy")}, str(path))
    if say:
        print(
            f"{source} is not in the folder of a training run: steps, prompt and lengths are the defaults; give others with "
            "--config FILE: [steps], [grades], [data] prompt and guidelines, [rollout] max_new_tokens"
        )
    return Config()
