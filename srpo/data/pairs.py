"""Pairs of a prompt and its response, both texts: the JSON Lines that `srpo.sft` trains on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from srpo.core.errors import UserError
from srpo.core.files import whole_file
from srpo.core.jsonl import json_lines


def write_pairs(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write (prompt, response) texts as JSON Lines, the format of `data` of `srpo.sft`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        for prompt, response in pairs:
            file.write(json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False) + "\n")


def read_pairs(path: str | Path) -> Iterator[tuple[str, str]]:
    """(prompt, response) texts of a file of pairs. Raises UserError with file and line for a malformed pair, or for no pairs."""
    want = '{"prompt": "...", "response": "..."}'
    where = ""
    for where, row in json_lines(path, want):
        prompt, response = (text_of(row, key, where, want) for key in ("prompt", "response"))
        yield prompt, response
    if not where:
        raise UserError(f"{path} has no pairs: write one JSON object per line, {want}")


def text_of(row: dict[str, Any], key: str, where: str, want: str) -> str:
    """The text at `key`. UserError if it is missing, empty or no string."""
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        got = f"{key} is {json.dumps(text)[:80]}" if key in row else f"{key!r} is missing"
        raise UserError(f"{where}: {got}: write {want} with texts that are not empty")
    return text
