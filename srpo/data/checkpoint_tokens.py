"""Tokens in the configuration files of a checkpoint, beside its tokenizer: ids that end a response, and the number of ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srpo.core.errors import UserError
from srpo.core.jsonl import json_file

_CONFIGS = ("config.json", "generation_config.json")


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a response: those of the tokenizer and of config.json and generation_config.json in its folder, sorted.

    A tokenizer that was not loaded from a folder has its own alone.
    """
    ids = {tokenizer.eos_token_id} - {None}
    folder = getattr(tokenizer, "name_or_path", "")
    for name in _CONFIGS if folder else ():
        file = Path(folder) / name
        said = json_file(file, "the file of the checkpoint").get("eos_token_id") if file.is_file() else None
        listed = [] if said is None else said if isinstance(said, list) else [said]
        if not all(type(token) is int for token in listed):
            raise UserError(f"{file}: eos_token_id is {said!r}: set it to an id, or to a list of ids")
        ids |= set(listed)
    return tuple(sorted(ids))


def check_rows(tokenizer: Any, folder: str | Path, owner: str = "") -> None:
    """Raise UserError if the tokenizer has an id that the model in `folder` has no row for. A model may have more rows.

    owner: folder of the tokenizer, if it is another one.
    """
    rows, highest = num_rows(folder), max(tokenizer.get_vocab().values(), default=0)
    if rows is not None and highest >= rows:
        raise UserError(
            f"the tokenizer in {owner or folder} has the id {highest}, and the model in {folder} has {rows} rows (vocab_size in "
            "its config.json): give the tokenizer that the model was trained with, or resize the model's embedding"
        )


def num_rows(folder: str | Path) -> int | None:
    """Number of ids of the model in the folder, from its config.json; None if the folder does not say."""
    file = Path(folder) / "config.json"
    fields = json_file(file, "the file of the checkpoint") if file.is_file() else {}
    text = fields.get("text_config")
    rows = (text if isinstance(text, dict) else fields).get("vocab_size")
    return rows if isinstance(rows, int) else None


def without_end(tokenizer: Any, text: str) -> str:
    """The text of a response without the end tokens that it spells at its end, so that its target ends once."""
    end = tokenizer.eos_token
    while end and text.endswith(end):
        text = text.removesuffix(end)
    return text
