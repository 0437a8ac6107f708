"""One line for a command line that tyro refuses, where tyro itself prints a box: the argument, its value and what to write."""

from __future__ import annotations

import difflib
import io
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import is_dataclass
from itertools import takewhile
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from srpo.core.errors import UserError

KINDS = {str: "a string", bool: "true or false", int: "an integer", float: "a number", dict: "a table", list: "a list"}
_FRAME = re.compile(r"\x1b\[[0-9;]*m|[^\x00-\x7f]")  # colours, and the lines of a box


@contextmanager
def refused_in_one_line(argv: Sequence[str], hints: Mapping[str, Any]) -> Iterator[None]:
    """UserError in place of the box that tyro prints before it exits with code 2. `hints` has the type of each flag."""
    _check_switches(argv, hints)
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise  # -h
        causes = list(_causes(stop))
        own = next((str(cause) for cause in causes if isinstance(cause, UserError)), None)  # of a dataclass's own check
        raise UserError(own or _bad_value(argv, hints, causes) or _text(printed.getvalue())) from None


def describe(hint: Any) -> str:
    """A type in words: "a number", "one of 'a', 'b'", "a list of 2 values (a number, a number)"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(args[0])
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args if arg is not type(None))
    if origin is list or (origin is tuple and args[1:] == (Ellipsis,)):
        return f"a list (each {describe(args[0])})"
    if origin is tuple:
        return f"a list of {len(args)} values ({', '.join(map(describe, args))})"
    if is_dataclass(hint):
        return "a table"
    return KINDS.get(hint if isinstance(hint, type) else origin, "a string")


def nearest(key: str, known: Sequence[str]) -> str | None:
    """The known dotted key closest to `key`: similar as a whole, similar in the last part, or faintly similar as a whole."""
    last = key.lstrip("-").rpartition(".")[2]
    if same := [name for name in known if name.lstrip("-").rpartition(".")[2] == last]:
        return min(same, key=len)
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if matches:
        return matches[0]
    lasts = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = difflib.get_close_matches(key.rpartition(".")[2], list(lasts), n=1, cutoff=0.75)
    return lasts[near[0]] if near else next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.3)), None)


def nearest_option(value: Any, options: Sequence[Any]) -> str:
    """ "; the nearest is 'x'" if a text is like one of the options, else ""."""
    near = difflib.get_close_matches(value, [str(option) for option in options], n=1) if isinstance(value, str) else []
    return f"; the nearest is {near[0]!r}" if near else ""


def unknown_argument(token: str, hints: Mapping[str, Any]) -> str:
    """The message for an argument that is none of the flags, whose types `hints` has."""
    if token.endswith(".toml"):
        return f"unexpected argument {token!r}: write `@ {token}`, before all flags"
    if not token.startswith("-"):
        return f"unexpected argument {token!r}: flags begin with -- (-h lists all)"
    name = token.partition("=")[0].replace("_", "-")
    near = nearest("--" + name.lstrip("-"), list(hints))
    return f"unknown flag {token!r}" + (f"; the nearest is {near}" if near else "") + " (-h lists all)"


def _check_switches(argv: Sequence[str], hints: Mapping[str, Any]) -> None:
    """Raise UserError for a switch with a value, which tyro would leave out."""
    for flag in (flag for flag, hint in hints.items() if hint is bool):
        section, dot, name = flag.removeprefix("--").rpartition(".")
        off = f"--{section}{dot}no-{name}"
        if token := next((t for t in argv if "=" in t and t.partition("=")[0].replace("_", "-") in (flag, off)), None):
            raise UserError(f"{token}: a switch takes no value: write {flag} for true or {off} for false")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors during whose handling this one was raised, the last one first."""
    while (cause := error.__context__) is not None:
        yield cause
        error = cause


def _bad_value(argv: Sequence[str], hints: Mapping[str, Any], causes: Sequence[BaseException]) -> str | None:
    """The message for the first flag whose value is missing or not of its type; None if all can be read."""
    for i, token in enumerate(argv):
        name, equals, value = token.partition("=")
        flag = name.replace("_", "-")
        hint = hints.get(flag)
        read_here = get_origin(hint) is Annotated  # a table with a reader of its own, srpo.core.mappings
        while get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        if hint is None or hint is bool:
            continue
        values = [value] if equals else list(takewhile(_is_value, argv[i + 1 :]))
        if get_origin(hint) is dict:
            if values and causes and read_here:
                return f"{flag}: {causes[-1]}"
            if len(values) % 2 or not all(_reads(entry, get_args(hint)[1]) for entry in values[1::2]):
                return f"{flag} must be pairs of a name and {describe(get_args(hint)[1])}: write {flag} NAME VALUE"
        elif not values and not _is_list(hint):
            return f"{flag} has no value: give {describe(hint)}"
        elif (wrong := _wrong(values, hint)) is not None:
            return f"{flag} must be {describe(hint)}, not {wrong!r}{nearest_option(wrong, get_args(hint))}"
    return None


def _is_value(token: str) -> bool:
    return not token.startswith("-") or _reads(token, float)


def _is_list(hint: Any) -> bool:
    """Whether a flag of this type takes any number of values."""
    args = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(map(_is_list, args))
    return get_origin(hint) is list or (get_origin(hint) is tuple and args[1:] == (Ellipsis,))


def _wrong(values: Sequence[str], hint: Any) -> str | None:
    """The part of the values that is not of this type; None if all are."""
    if get_origin(hint) is tuple and not _is_list(hint):
        kinds = get_args(hint)
        fits = len(values) >= len(kinds) and all(map(_reads, values, kinds))
        return None if fits else " ".join(values[: len(kinds)])
    if _is_list(hint):
        return next((value for value in values if not _reads(value, hint)), None)
    return None if _reads(values[0], hint) else values[0]


def _reads(text: str, hint: Any) -> bool:
    """Whether a text is a value of this type, or an entry of this list."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_reads(text, arg) for arg in args)
    if origin in (Annotated, tuple, list):
        return _reads(text, args[0])
    if origin is Literal:
        return text in map(str, args)
    if hint is type(None):
        return text == "None"
    if hint not in (int, float):
        return True
    try:
        hint(text)
    except ValueError:
        return False
    return True


def _text(box: str) -> str:
    """The words of a box in one line."""
    words = " ".join(_FRAME.sub(" ", box).split())
    return words or "the command line cannot be read: -h lists the flags"
