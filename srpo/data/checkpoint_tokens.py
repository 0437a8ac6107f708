"""Tokens in the configuration files of a checkpoint, beside its tokenizer: ids that end a response, and the number of ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from srpo.core.errors import UserError
from srpo.core.jsonl import json_file
from srpo.data.chat import end_id

_CONFIGS = ("config.json", "generation_config.json")
_STOPS: WeakKeyDictionary[Any, tuple[int | None, tuple[int, ...]]] = WeakKeyDictionary()  # (eos_token_id, `stop_ids`)


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a response, sorted: those of the tokenizer, of its chat template, and of config.json and
    generation_config.json in its folder.

    A tokenizer that was not loaded from a folder has its own alone. The files are read once for each tokenizer. Raises UserError
    for a file whose eos_token_id is neither an id nor a list of ids.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    known = _STOPS.get(tokenizer)
    if known is None or known[0] != eos:
        known = _STOPS[tokenizer] = eos, _read_stops(tokenizer, eos)
    return tuple(sorted({*known[1], end_id(tokenizer)} - {None}))


def _read_stops(tokenizer: Any, eos: int | None) -> tuple[int, ...]:
    ids = set() if eos is None else {eos}
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
    rows, highest = num_rows(folder), highest_id(tokenizer)
    if rows is not None and highest >= rows:
        raise UserError(
            f"the tokenizer in {owner or folder} has the id {highest}, and the model in {folder} has {rows} rows (vocab_size in "
            "its config.json): give the tokenizer that the model was trained with, or resize the model's embedding"
        )


def highest_id(tokenizer: Any) -> int:
    """The highest id of the tokenizer, which may leave out lower ones."""
    return max(tokenizer.get_vocab().values(), default=0)


def num_rows(folder: str | Path) -> int | None:
    """Number of ids of the model in the folder, from its config.json; None if it has none. UserError if that does not say."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return None
    fields = json_file(file, "the file of the checkpoint")
    text = fields.get("text_config")
    rows = (text if isinstance(text, dict) else fields).get("vocab_size")
    if type(rows) is not int:
        raise UserError(f"{file}: vocab_size is {rows!r}: set it to the number of rows of the model's embedding")
    return rows


def without_end(tokenizer: Any, text: str) -> str:
    """The text of a response without the end tokens that it spells at its end, nor spaces after them, so that its target ends
    once."""
    ends = [end for i in stop_ids(tokenizer) if (end := tokenizer.decode([i]).strip())]
    while end := next((end for end in ends if text.rstrip().endswith(end)), ""):
        text = text.rstrip().removesuffix(end)
    return text
