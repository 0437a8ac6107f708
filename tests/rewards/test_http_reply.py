"""srpo.rewards.http_reply: any reply of a server can be parsed, and waiting times are bounded."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo.rewards.http_reply import (
    MAX_PAUSE_S,
    MAX_READ,
    MAX_SHOWN,
    NotAReply,
    checked_url,
    is_loopback,
    pause_s,
    printable,
    read_models,
    read_text,
    retry_after_s,
    safe,
    says_too_long,
    server_message,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text()
    | st.sampled_from(["choices", "message", "content", "text", "error", "data"]),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["choices", "message", "content", "text", "error", "id"]), inner)
    ),
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()), st.sampled_from(["chat", "completions"]))
def test_reading_is_total(data: bytes, api: str) -> None:
    for read in (lambda: read_text(data, api), lambda: read_models(data)):
        try:
            read()
        except NotAReply as error:
            assert len(str(error)) < MAX_READ + 100
    line = server_message(data)
    assert line.isprintable() and len(safe(line, "")) <= MAX_SHOWN + 3
    says_too_long(400, data)


@given(st.text(), st.text(min_size=1))
def test_what_is_shown_is_one_printable_line_without_the_key(text: str, key: str) -> None:
    assert printable(text).isprintable() and len(printable("x" * 100_000)) <= MAX_READ
    if key not in "***..." and not set(key) & set("*."):
        assert key not in safe(text + key + text, key)


def test_a_key_that_is_cut_is_not_shown_in_part() -> None:
    for before in range(MAX_SHOWN - 20, MAX_SHOWN + 5):
        assert "sk-" not in safe("x" * before + "sk-0123456789", "sk-0123456789")


def test_how_long_a_server_may_ask_to_wait() -> None:
    now = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
    assert retry_after_s("7") == 7 and retry_after_s("0.5") == 0.5
    assert retry_after_s("Mon, 23 Nov 2026 12:00:09 GMT", now) == 9
    assert retry_after_s("Mon, 23 Nov 2026 11:00:00 GMT", now) == 0 == retry_after_s("-5")
    assert retry_after_s("86400") == MAX_PAUSE_S == retry_after_s("Mon, 23 Nov 2099 12:00:09 GMT", now)
    for odd in (None, "", "soon", "nan", "inf", "Mon, 99 Nov 2026", "1" * 400, "\x00"):
        assert 0 <= retry_after_s(odd) <= MAX_PAUSE_S


def test_pauses_double_up_to_a_bound() -> None:
    assert [pause_s(n, 1.0, 1.0) for n in range(1, 8)] == [1, 2, 4, 8, 16, 32, MAX_PAUSE_S]
    assert pause_s(3, 1.0, 0.0) == 2 and pause_s(10_000, 1.0, 1.0) == MAX_PAUSE_S and pause_s(9, 0.0, 0.5) == 0


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
        "context_length_exceeded",
        "The decoder prompt (length 300) is longer than the maximum model length of 256.",
        "prompt is too long: 300 tokens > 256 maximum",
        "`inputs` tokens + `max_new_tokens` must be <= 4096: too long",
    ],
)
def test_servers_say_in_several_ways_that_a_prompt_is_too_long(message: str) -> None:
    data = json.dumps({"error": {"message": message}}).encode()
    assert says_too_long(400, data) and not says_too_long(500, data) and not says_too_long(404, data)
    assert not says_too_long(400, b'{"error": {"message": "unknown field seed"}}')


def test_addresses() -> None:
    assert checked_url("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000/v1"
    assert checked_url("https://judge.example/a/v1") == "https://judge.example/a/v1"
    assert [is_loopback(f"http://{host}/v1") for host in ("127.0.0.1:1", "localhost", "[::1]:8", "127.8.8.8")] == [True] * 4
    assert not any(is_loopback(f"http://{host}/v1") for host in ("127.0.0.1.evil.example", "10.0.0.1", "localhost.example"))
