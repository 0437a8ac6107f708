"""Pairs of a prompt and its response, both texts: the JSON Lines that `srpo.sft` trains on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from srpo.core.errors import UserError
from srpo.core.files import whole_file


def write_pairs(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write (prompt, response) texts as JSON Lines, the format of `data` of `srpo.sft`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        for prompt, response in pairs:
            file.write(json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False) + "\n")


def read_pairs(path: str | Path) -> Iterator[tuple[str, str]]:
    """(prompt, response) texts of a file of pairs. Raises UserError with file and line for a malformed pair, or for no pairs."""
    empty = True
    with Path(path).open("rb") as file:  # bytes, so that a line that is not UTF-8 has a number too
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                prompt, response = row["prompt"], row["response"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'{path}, line {number}: write {{"prompt": "...", "response": "..."}} ({error})') from error
            if not (isinstance(prompt, str) and isinstance(response, str) and prompt and response):
                raise UserError(f"{path}, line {number}: prompt and response must be strings that are not empty")
            empty = False
            yield prompt, response
    if empty:
        raise UserError(f"{path} has no pairs: write one JSON object per line")
