"""A run folder belongs to one configuration: it is written there once and compared with at every later start."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from srpo.core.config.train import Config
from srpo.core.settings import apply_toml, dump_toml


def claim_run_dir(run_dir: Path, cfg: Any, is_main: bool, may_change: Collection[str] = ()) -> None:
    """Make the folder and put the resolved `config.toml` into it.

    Raises ValueError where the folder already holds a run of another configuration, naming the first setting that differs: a
    resumed run has to be the run that was started. `run_dir` itself may differ, so folders can be moved, and so may the settings
    of `may_change`, dotted keys; the file keeps those that the run began with. A setting that is younger than the folder had its
    default there, where the settings have defaults.
    """
    path = run_dir / "config.toml"
    if path.is_file():
        texts = dump_toml(cfg), path.read_text(encoding="utf-8"), dump_toml(type(cfg)()) if _has_defaults(cfg) else ""
        ours, theirs, defaults = (_leaves(tomllib.loads(text)) for text in texts)
        theirs = {key: defaults[key] for key in ours.keys() & defaults.keys()} | theirs
        for key in sorted(ours.keys() | theirs.keys()):
            if key != "run_dir" and key not in may_change and ours.get(key) != theirs.get(key):
                raise ValueError(
                    f"{run_dir} holds a run with {key} = {theirs.get(key)!r}, this one has {ours.get(key)!r}: "
                    "give another run_dir, or remove the folder"
                )
    elif is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, dump_toml(cfg))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there either whole or not at all, whenever the process is killed."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _has_defaults(cfg: Any) -> bool:
    return all(field.default is not MISSING or field.default_factory is not MISSING for field in fields(cfg))


def _leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def run_settings(source: Path, config: str, say: bool = True) -> Config:
    """The settings that `source` is evaluated under; prints whence they are, where it may `say` so.

    Those of the TOML `config`; else of the training run in whose folder `source` lies (up to three folders deep); else the
    defaults.
    """
    if config:
        return apply_toml(Config(), Path(config))
    for folder in source.resolve().parents[:4]:
        path = folder / "config.toml"
        if path.is_file() and tomllib.loads(path.read_text(encoding="utf-8")).keys() >= {"steps", "rollout"}:
            if say:
                print(f"steps, prompt and lengths as in {path}")
            return apply_toml(Config(), path)
    if say:
        print("no config.toml of a training run around it: steps, prompt and lengths are the defaults")
    return Config()
