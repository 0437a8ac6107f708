"""Run folders: each belongs to one configuration, which is written once and compared at every later start."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from srpo.core.config.train import Config
from srpo.core.errors import UserError
from srpo.core.files import write_whole
from srpo.core.settings import apply_toml, dump_toml


def claim_run_dir(run_dir: Path, cfg: Any, is_main: bool, may_change: Collection[str] = ()) -> None:
    """Make the folder and write the resolved settings into its `config.toml`, on the main process.

    Raises UserError, with the first setting that differs, if the folder holds a run of another configuration: a resumed run must
    be the run that was started. `run_dir` itself may differ, so folders can be moved, and so may the dotted keys in `may_change`;
    the file keeps their first values. If the settings have defaults, a setting that the file lacks counts with its default: the
    folder is older than the setting.
    """
    path = run_dir / "config.toml"
    if path.is_file():
        texts = dump_toml(cfg), path.read_text(encoding="utf-8"), dump_toml(type(cfg)()) if _has_defaults(cfg) else ""
        ours, theirs, defaults = (_leaves(tomllib.loads(text)) for text in texts)
        theirs = {key: defaults[key] for key in ours.keys() & defaults.keys()} | theirs
        for key in sorted(ours.keys() | theirs.keys()):
            if key != "run_dir" and key not in may_change and ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{run_dir} holds a run with {key} = {theirs.get(key)!r}, this one has {ours.get(key)!r}: "
                    "give another run_dir, or remove the folder"
                )
    elif is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, dump_toml(cfg))


def _has_defaults(cfg: Any) -> bool:
    return all(field.default is not MISSING or field.default_factory is not MISSING for field in fields(cfg))


def _leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def run_settings(source: Path, config: str, say: bool = True) -> Config:
    """The settings for evaluating `source`, a checkpoint or a file; prints where they come from if `say` is true.

    They come from the TOML file `config` if it is named, else from the training run whose folder contains `source` (up to three
    folders deep), else they are the defaults.
    """
    if config:
        return apply_toml(Config(), Path(config))
    for folder in source.resolve().parents[:4]:
        path = folder / "config.toml"
        if path.is_file() and tomllib.loads(path.read_text(encoding="utf-8")).keys() >= {"steps", "rollout"}:
            if say:
                print(f"steps, prompt and lengths are those of {path}")
            return apply_toml(Config(), path)
    if say:
        print(f"{source} is not in the folder of a training run: steps, prompt and lengths are the defaults")
    return Config()
