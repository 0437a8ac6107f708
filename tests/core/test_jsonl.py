"""The strict reader of JSON: what it takes, and the sentence for each kind of bad line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from srpo.core.errors import UserError
from srpo.core.jsonl import json_file, json_lines

GOOD = b'{"a": 1.5, "b": {"c": [null, "\\u00e9 \\ud83d\\ude00"]}}'
BAD = {
    b'{"a": 1, "a": 1}': "the key 'a' is given twice",
    b'{"b": [{"c": 1, "d": 2, "c": 3}]}': "the key 'c' is given twice",
    b'{"a": NaN}': "NaN is no JSON number",
    b'{"a": [-Infinity]}': "-Infinity is no JSON number",
    b'{"a": 1e999}': "1e999 is too large",
    b'{"a": ' + b"9" * 5000 + b"}": "not JSON",
    b'{"a": ' + b"[" * 100_000: "not JSON",
    b'{"a": "\\ud800"}': "half of a surrogate pair",
    b'{"\\udc00": 1}': "half of a surrogate pair",
    b'{"a": "\xff"}': "not UTF-8 at byte 7",
    b'\xef\xbb\xbf{"a": 1}': "begins with a byte order mark",
    '{"a": 1}'.encode("utf-16"): "not UTF-8 at byte 0",
    b'{"a": 1': "not JSON",
    b"[1]": "a JSON list, not an object",
    b"null": "a JSON NoneType, not an object",
}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_one_sentence_with_file_and_line(tmp_path: Path, line: bytes, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    text = GOOD + b"\n\n" + line
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    rows = json_lines(path, "an object")
    assert next(rows) == (f"{path}, line 1", {"a": 1.5, "b": {"c": [None, "\u00e9 \U0001f600"]}})
    with pytest.raises(UserError) as error:
        next(rows)
    assert str(error.value).startswith(f"{path}, line 3: {BAD[line]}") and "\n" not in str(error.value)


def test_a_whole_file_may_hold_scores_without_a_value(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{\n "a": NaN\n}\n')
    assert list(json_file(path)) == ["a"]
    path.write_text('{\n "a": ')
    with pytest.raises(UserError, match=r"results\.json: not JSON"):
        json_file(path)
