"""srpo.rewards.http_reply: any reply of a server can be parsed, and waiting times are bounded."""

from __future__ import annotations

import html
import json
import random
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo.core.errors import UserError
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


@pytest.mark.parametrize("key", ["sk-0123456789", 'sk/0+1"2%3456'])
@pytest.mark.parametrize("limit", [MAX_SHOWN, MAX_READ])
def test_a_key_that_is_cut_is_not_shown_in_part(key: str, limit: int) -> None:
    """Wherever a message is cut, and however a server spells the key: plain, in JSON, in a URL, in HTML, in part."""
    spellings = {key, json.dumps(key)[1:-1], json.dumps(key)[1:-1].replace("/", "\\/"), quote(key, safe="")}
    spellings |= {"".join(f"%{byte:02x}" for byte in key.encode()), "".join(f"&#{ord(c)};" for c in key), html.escape(key)}
    spellings |= {"".join(f"\\u{ord(c):04X}" for c in key), "".join(f"&#x{ord(c):X};" for c in key)}
    spellings.add("".join(c if c.isalnum() else random.choice([c, quote(c, safe=""), f"&#{ord(c)};"]) for c in key))
    for before in range(limit - 25, limit + 5):
        for spelling in spellings:
            text = " " * before + spelling  # white space is removed after the cut
            message = json.dumps({"error": {"message": " " * before + key}}).encode()
            shown = [printable(text, key), server_message(text.encode(), key), server_message(message, key)]
            for data in (text.encode(), b'{"a": "' + text.encode() + b'"}', message):
                for read in (lambda d: read_text(d, "chat", key), lambda d: read_models(d, key)):
                    with pytest.raises(NotAReply) as caught:
                        read(data)
                    shown.append(str(caught.value))
            assert not any(key[:5] in line or spelling[:5] in line for line in [*shown, *(safe(line, key) for line in shown)])


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
    assert not any(is_loopback(f"http://{host}/v1") for host in ("127.0.0.1.evil.example", "10.0.0.1", "localhost.example"))


@pytest.mark.parametrize(
    "host", ["127.0.0.1:1", "localhost", "LocalHost:80", "localhost.", "[::1]:8", "127.8.8.8", "127.1", "0", "0.0.0.0", "0x7f.1",
             "2130706433", "[::ffff:127.0.0.1]", "[::]", "[0:0:0:0:0:0:0:1]"]
)  # fmt: skip
def test_this_machine_in_any_spelling(host: str) -> None:
    assert is_loopback(f"http://{host}/v1") and is_loopback(checked_url(f"HTTP://{host}/v1"))


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("HTTPS://Judge.Example/V1", "https://judge.example/V1"),
        ("Https://judge.example:443/v1///", "https://judge.example:443/v1"),
        ("http://judge.example/v1?", "http://judge.example/v1"),
        ("http://judge.example/v1/?#", "http://judge.example/v1"),
        ("http://judge.example.:8000", "http://judge.example:8000"),
        ("http://judge.example:/v1", "http://judge.example/v1"),
        ("http://[FE80::1]/v1", "http://[fe80::1]/v1"),
    ],
)
def test_an_address_has_one_form(url: str, normal: str) -> None:
    assert checked_url(url) == normal == checked_url(normal)


@pytest.mark.parametrize(
    "url",
    ["", "judge.example/v1", "ftp://judge.example", "http://", "http:///v1", "http://a b/v1", " http://a/v1", "http://a/v1\n", "http://a\t/v1",
     "http://a\x00/v1", "http://a\x7f/v1", "http://a\u200b/v1", "http://\uff11.1.1.1/v1", "http://127.0.0.1\\@evil.example/v1",
     "http://127.0.0.1%2eevil/v1", "http://user@a/v1", "http://@a/v1", "http://:pw@a/v1", "http://a:0/v1", "http://a:99999/v1",
     "http://a:x/v1", "http://[::1/v1", "http://a/v1?key=1", "http://a/v1#part", "http://a/v1/models", "http://a/v1/chat/completions/",
     "http://./v1", "http://../v1", "http://a../v1", "http://.a/v1", "http://a..b/v1"],
)  # fmt: skip
def test_what_is_no_plain_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"reward\.judge_url"):
        checked_url(url)


@given(st.text(st.sampled_from("hHtTpPsS:/@#?.[]%\\ \t\r\n\x00a1\u2024")).map(lambda tail: "http://" + tail))
def test_a_checked_address_means_the_same_to_every_parser(url: str) -> None:
    try:
        checked = checked_url(url)
    except UserError:
        return
    assert checked == checked_url(checked) and checked.isascii() and checked.isprintable() and " " not in checked
    parts, theirs = urlsplit(checked), httpx2.URL(checked)  # the client's own parser
    assert parts.scheme == "http" and parts.hostname and not {"?", "#"} & set(checked) and "@" not in parts.netloc
    assert (theirs.scheme, theirs.host, theirs.userinfo, theirs.query, theirs.fragment) == ("http", parts.hostname, b"", b"", "")
    assert theirs.port == (None if parts.port == 80 else parts.port)  # None: the scheme's own
