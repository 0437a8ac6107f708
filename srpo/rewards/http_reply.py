"""Parsing of untrusted replies of a judge's server (texts, errors, waiting times), and checks of its address and key."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import socket
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from html.entities import html5
from typing import Any
from urllib.parse import urlsplit

from srpo.core.errors import UserError

MAX_REPLY_BYTES = 1 << 20  # of one reply; a longer one is no verdict
MAX_PAUSE_S = 60.0  # between two attempts; caps the server's Retry-After
MAX_READ = 4000  # characters of a server's message that are read
MAX_SHOWN = 300  # characters of it that our messages show
NO_ADDRESS = "reward.judge_url is not the address of a server: set it to one like http://127.0.0.1:8000/v1"

_TOO_LONG = re.compile(
    r"context[ _]length|context window|too long|too large|max_model_len|maximum (?:model |input |prompt )?length"
)


class NotAReply(ValueError):
    """The reply does not have the form of the API."""


def read_text(data: bytes, api: str, key: str = "") -> str | None:
    """Return the text of a reply of the API "chat" or "completions"; None if its text is null (a refusal) or no string.

    Reads the first choice only. Raises nothing but NotAReply: for no JSON, and for JSON without a choice of the API's form. `key`
    is the secret that no message shows.
    """
    choices = _json_object(data, key).get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise NotAReply(f"a reply without choices: {server_message(data, key)}")
    holder, name = (choices[0].get("message"), "content") if api == "chat" else (choices[0], "text")
    if not isinstance(holder, dict) or name not in holder:
        raise NotAReply(f"a reply that does not have the form of the {api} API (reward.judge_api): {server_message(data, key)}")
    return holder[name] if isinstance(holder[name], str) else None


def read_models(data: bytes, key: str = "") -> list[str]:
    """Return the model names in a reply to /models. Raises NotAReply."""
    models = _json_object(data, key).get("data")
    if not isinstance(models, list):
        raise NotAReply(f"a reply without models: {server_message(data, key)}")
    return [model["id"] for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)]


def _json_object(data: bytes, key: str) -> dict[str, Any]:
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError) as error:  # bad text or a number with a million digits; a million brackets
        raise NotAReply(f"a reply that is not JSON: {server_message(data, key)}") from error
    if not isinstance(reply, dict):
        raise NotAReply(f"a reply that is not a JSON object: {server_message(data, key)}")
    return reply


def server_message(data: bytes, key: str = "") -> str:
    """Return the error message of a reply, else the start of the reply: one printable line in quotes, at most MAX_READ long."""
    text = data.decode("utf-8", "replace")
    try:
        reply = json.loads(data)
        error = reply.get("error", reply) if isinstance(reply, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        text = message if isinstance(message, str) else text
    except (ValueError, RecursionError):
        pass
    return f"'{printable(text, key)}'"


def redacted(text: str, key: str) -> str:
    """Return a server's text without the key, each character of it as it is, or as JSON, a URL or HTML spell it. Call it before
    the text is cut: a part of a key would not be found."""
    return _spellings(key).sub("***", text) if key else text


@lru_cache(maxsize=1)
def _spellings(key: str) -> re.Pattern[str]:
    return re.compile("".join(map(_spellings_of_one, key)))


def _spellings_of_one(character: str) -> str:
    """A pattern of the ways to write a character."""
    code, url = ord(character), "".join(f"%{byte:02x}" for byte in character.encode())
    names = [f"&{name}" for name, meant in html5.items() if meant == character and name.endswith(";")]
    ways = map(re.escape, dict.fromkeys([character, json.dumps(character)[1:-1], f"\\{character}", *names]))
    numbers = [rf"\\u(?i:{code:04x})", f"(?i:{url})", f"&#0*{code};", f"&#[xX]0*(?i:{code:x});"]
    return f"(?:{'|'.join([*ways, *numbers])})"


def printable(text: str, key: str = "") -> str:
    """Return at most MAX_READ characters of `text` on one line, without control characters and the key."""
    return " ".join("".join(c if c.isprintable() else " " for c in redacted(text, key)[:MAX_READ]).split())


def safe(text: str, key: str) -> str:
    """Return a server's text without the key and then shortened to MAX_SHOWN, in this order, so that no part of a key is left."""
    text = redacted(text, key)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def says_too_long(status: int, data: bytes) -> bool:
    """Whether an error reply states that the prompt does not fit into the judge's context."""
    return status in (400, 413, 422) and bool(_TOO_LONG.search(data[:MAX_READ].decode("utf-8", "replace").casefold()))


def retry_after_s(header: str | None, now: datetime | None = None) -> float:
    """Return the seconds of a Retry-After header (a number or a date), clipped to 0..MAX_PAUSE_S; 0 if it is unreadable."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except (ValueError, OverflowError):
            return 0.0
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - (now or datetime.now(UTC))).total_seconds()
    return min(max(seconds, 0.0), MAX_PAUSE_S) if math.isfinite(seconds) else 0.0


def pause_s(attempt: int, first_s: float, draw: float) -> float:
    """Return the seconds between attempt number `attempt` (from 1) and the next.

    Exponential backoff: first_s * 2^(attempt - 1), at most MAX_PAUSE_S, times a factor 0.5..1 from `draw` in [0, 1).
    """
    return min(first_s * 2 ** min(attempt - 1, 32), MAX_PAUSE_S) * (0.5 + draw / 2)


def checked_url(url: str) -> str:
    """Return the base address in one normal form, which all later code uses: scheme and host in lower case, no trailing slash,
    dot of the host, `?` or `#`. Raises UserError, without showing the address, if it is not usable.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        raise UserError(NO_ADDRESS) from None
    # `urlsplit` drops some control characters, and parsers differ on the others, so none may be there.
    strange = not (url.isascii() and url.isprintable()) or not {" ", "\\"}.isdisjoint(url)
    whole = all(host.split(".")) or ":" in host  # no empty label; IPv6 has colons
    if strange or parts.scheme not in ("http", "https") or not whole or "%" in host or port == 0:
        raise UserError(NO_ADDRESS)
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UserError(
            "reward.judge_url holds more than an address (a user, a password, or a part after ? or #): settings are written to "
            "files, so give the plain address, and put the key into the environment variable OPENAI_API_KEY"
        )
    path = parts.path.rstrip("/")
    if path.endswith(("/completions", "/models")):
        raise UserError("reward.judge_url ends with the path of a call: give the part before it, like http://127.0.0.1:8000/v1")
    netloc = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{netloc}{'' if port is None else f':{port}'}{path}"


def is_loopback(url: str) -> bool:
    """Whether the host is this machine: localhost, a loopback address in any spelling (127.1, ::ffff:127.0.0.1), or 0."""
    host = (urlsplit(url).hostname or "").removesuffix(".")
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host if ":" in host else socket.inet_aton(host))
    except (OSError, ValueError):  # a name
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def checked_key(key: str) -> str:
    """Return an API key without surrounding white space. Raises UserError, without showing the key, if no header can hold it."""
    key = key.strip()
    if not all(33 <= ord(c) < 127 for c in key):
        raise UserError("the key in OPENAI_API_KEY has characters that are not allowed in an HTTP header: set it again")
    return key
