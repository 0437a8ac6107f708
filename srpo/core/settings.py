"""Read settings from sparse TOML files and command-line flags into frozen dataclasses; write the resolved settings as TOML.

    python -m srpo.train @ configs/base.toml @ mine.toml --loss.kl-coef 0

Files come first, later ones win; flags win over files. Every field needs a default, so a TOML file holds only changes.
A field that holds a tuple of dataclasses (`curriculum`) is an array of tables: a file replaces it as a whole, and it has no flag.
A dataclass may name a field REST, a dict of dataclasses: tables of other names (`[steps.verdict]`) go there, value by value.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from srpo.core.arguments import KINDS, describe, nearest, nearest_option, refused_in_one_line, unknown_argument
from srpo.core.errors import UserError, explain_os_error
from srpo.core.interrupts import end_at_signals, ended_by_signals
from srpo.core.ranges import check_ranges, field_types

T = TypeVar("T")

DEBUG = "SRPO_DEBUG"  # environment variable: 1 shows the traceback of a user error
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]


def load(cls: type[T], argv: Sequence[str] | None = None, prog: str | None = None) -> T:
    """An instance of the dataclass `cls` from `[@ file.toml]... [--flag value]...` (`sys.argv[1:]` if `argv` is None).

    Raises UserError in one line for a missing or malformed file, an unknown key or flag (with the nearest known one), a missing
    value and one of the wrong type or out of its range (with file and key, or the flag). `-h` prints the help and exits with
    code 0.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if strange := [arg for arg in argv if not arg.isascii() and arg != arg.encode("utf-8", "replace").decode()]:
        raise UserError(f"{strange[0]!r} is not UTF-8: rename the file, or type it again")
    config = cls()
    while argv and argv[0].startswith("@"):
        path = argv.pop(0)[1:]
        if not path and not argv:
            raise UserError("`@` is not followed by a file: write `@ file.toml`")
        config = apply_toml(config, Path(path or argv.pop(0)))
    if "@" in argv:
        raise UserError("`@ file.toml` comes after a flag: put files first, then flags")
    registry = ConstructorRegistry()
    registry.struct_rule(_no_flags_for_tables)
    hints = {_flag(key, hint): hint for key, hint, _ in _leaves(cls()) if not _tables(hint)}
    with registry, refused_in_one_line(argv, hints):
        named = (tyro.conf.PositionalMetavarFromFieldName,)
        config, unknown = tyro.cli(cls, args=argv, default=config, prog=prog, config=named, return_unknown_args=True)
    if unknown:
        raise UserError(unknown_argument(unknown[0], hints))
    check_ranges(config)
    getattr(config, "schema", None)  # steps and grades may come from several files: checked when all are read
    return config


def apply_toml(config: T, path: Path) -> T:
    """`config` updated with the values of a TOML file. Raises UserError that names the file and the key."""
    try:
        table = toml_table(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"; the nearest is {path.parent / near[0]}" if near else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return apply_table(config, table, str(path))


def toml_table(path: Path) -> dict[str, Any]:
    """The table that a TOML file holds. ValueError, with the reason, for one that is not TOML or not UTF-8."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("not TOML that can be read (nested too deeply)") from error


def apply_table(config: T, table: Mapping[str, Any], where: str) -> T:
    """`config` updated with the values of a table, as from a TOML file. Raises UserError that names `where` and the key."""
    config = _replace(config, table, where, "", _keys(type(config)))
    check_ranges(config, where)
    return config


def flags(cls: type) -> list[tuple[str, str, Any]]:
    """(name, type in words, default) of each command-line argument of `cls`, in order.

    A name is `--loss.kl-coef`, or `RUN-DIR` for a positional argument. A switch also has the form `--loss.no-x`.
    """
    return [(_flag(key, hint), describe(hint), default) for key, hint, default in _leaves(cls()) if not _tables(hint)]


def dump_toml(config: Any) -> str:
    """The resolved settings as TOML, without fields that are None. `load` reads it back to an equal instance."""
    return "\n".join(_dump(config, "")).strip() + "\n"


def run_program(main: Callable[[T], int | None], cls: type[T], argv: Sequence[str] | None = None) -> NoReturn:
    """Load `cls`, run `main` on it and exit with its return value (None: 0).

    A user error (`UserError`, or an error of the file system) prints the line `error: ...` and exits with code 2; SRPO_DEBUG=1
    shows its traceback. Any other exception, such as a plain ValueError, is our own bug and keeps its traceback.
    """
    with _user_errors_in_one_line(), ended_by_signals():
        sys.exit(main(load(cls, argv, _prog())) or 0)


def check_command_line(cls: type) -> None:
    """Exit if the command line has `-h` or does not load as `cls`. Programs call this before they import torch.

    From here on Ctrl-C and SIGTERM end the program with one line (`srpo.core.interrupts`).
    """
    end_at_signals()
    with _user_errors_in_one_line():
        load(cls, prog=_prog())


def _prog() -> str | None:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec else None


@contextmanager
def _user_errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (UserError, OSError) as error:
        message = str(error) if isinstance(error, UserError) else explain_os_error(error)
        if message is None or os.environ.get(DEBUG, "0") not in ("", "0"):
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def check_one_process(program: str, instead: str) -> None:
    """Raise UserError if torchrun has started more than this process. `instead` ends the message: what to do, or why."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"start {program} without torchrun: {instead}")


# ---- names ---------------------------------------------------------------------------------------------------------------------


def _tables(hint: Any) -> bool:
    """Whether a field of this type holds tables, in an array or by name."""
    return get_origin(hint) in (tuple, list, dict) and any(is_dataclass(arg) for arg in get_args(hint))


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, type, value) of every field that is not itself a dataclass."""
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, hint, value


def _flag(key: str, hint: Any) -> str:
    """The command-line name of a key."""
    name = key.replace("_", "-")
    return name.upper() if get_origin(hint) is Annotated and _POSITIONAL in get_args(hint)[1:] else "--" + name


def _keys(cls: type) -> list[str]:
    """The sections of `cls`, then all its dotted keys."""
    keys = [key for key, _, _ in _leaves(cls())]
    return list(dict.fromkeys([key.rpartition(".")[0] for key in keys if "." in key] + keys))


def _no_flags_for_tables(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro rule: an array of tables keeps its value and gets no flags."""
    return StructConstructorSpec(instantiate=lambda: info.default, fields=()) if _tables(info.type) else None


# ---- TOML in -------------------------------------------------------------------------------------------------------------------


def _replace(config: Any, table: Mapping[str, Any], where: str, prefix: str, known: Sequence[str]) -> Any:
    """`config` updated with the values of a table; a section updates the nested dataclass."""
    hints, rest = field_types(type(config)), getattr(type(config), "REST", None)
    changes: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if rest is not None and isinstance(value, dict) and (name not in hints or name == rest):
            cls = get_args(hints[rest])[1]
            named = changes.setdefault(rest, dict(getattr(config, rest)))
            named[name] = _replace(named.get(name, cls()), value, where, key + ".", [key + "." + f for f in field_types(cls)])
            continue
        if name not in hints or name == rest:
            near = nearest(key, known)
            raise UserError(f"{where}: unknown key {key!r}" + (f"; the nearest is {near!r}" if near else ""))
        old = getattr(config, name)
        if isinstance(value, list) and (instead := getattr(type(old), "NO_ARRAY", "")):
            raise UserError(f"{where}: [[{key}]] is no array of tables any more: {instead}")
        if is_dataclass(old) and isinstance(value, dict):
            changes[name] = _replace(old, value, where, key + ".", known)
        else:
            changes[name] = _convert(value, hints[name], where, key)
    return _build(lambda: replace(config, **changes), where, prefix.rstrip("."))


def _build(make: Callable[[], Any], where: str, key: str) -> Any:
    """The result of `make()`. If a dataclass's own check raises UserError, file and key are put before its message."""
    try:
        return make()
    except ValueError as error:
        raise UserError(f"{where}: {key}: {error}" if key else f"{where}: {error}") from error


def _convert(value: Any, hint: Any, where: str, key: str) -> Any:
    """A TOML value as the Python type `hint`. Raises UserError that names file, key and expected type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _convert(value, args[0], where, key)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):
            raise UserError(f"{where}: {key} must be {describe(hint)}, not {_show(value)}{nearest_option(value, args)}")
        return value
    if origin in (Union, types.UnionType):
        fits = [arg for arg in args if _fits(value, arg, where, key)]
        return _convert(value, fits[0], where, key) if fits else _wrong(value, hint, where, key)
    if origin in (tuple, list):
        if not isinstance(value, list):
            return _wrong(value, hint, where, key)
        variable = origin is list or args[1:] == (Ellipsis,)
        if not variable and len(value) != len(args):
            raise UserError(f"{where}: {key} must be {describe(hint)}, not {len(value)} values")
        kinds = [args[0]] * len(value) if variable else args
        return origin(_convert(v, kind, where, f"{key}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            return _wrong(value, hint, where, key)
        entries = _dotted(value, where, key) if args[1] is str else value
        return {k: _convert(v, args[1], where, f"{key}.{k}") for k, v in entries.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return _convert_table(value, hint, where, key)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        return _wrong(value, hint, where, key)
    return value


def _dotted(table: Mapping[str, Any], where: str, key: str) -> dict[str, Any]:
    """A table of texts without tables in it: TOML reads the key `fields.brand` without quotes as a table `fields`."""
    entries: dict[str, Any] = {}
    for name, value in table.items():
        pairs = [(name, value)]
        if isinstance(value, dict):
            pairs = [(f"{name}.{rest}", entry) for rest, entry in _dotted(value, where, f"{key}.{name}").items()]
        for dotted, entry in pairs:
            if dotted in entries:
                raise UserError(f"{where}: {key}.{dotted} is given twice: keep one of them")
            entries[dotted] = entry
    return entries


def _convert_table(value: Any, cls: type, where: str, key: str) -> Any:
    """One table of an array of tables as an instance of `cls`. Raises UserError if a field without a default is missing."""
    if not isinstance(value, dict):
        return _wrong(value, cls, where, key)
    hints = field_types(cls)
    for name in value:
        if name not in hints:
            near = nearest(name, list(hints))
            raise UserError(f"{where}: unknown key '{key}.{name}'" + (f"; the nearest is '{key}.{near}'" if near else ""))
    given = {name: _convert(v, hints[name], where, f"{key}.{name}") for name, v in value.items()}
    missing = [name for name in hints if name not in given and _required(cls, name)]
    if missing:
        raise UserError(f"{where}: {key} lacks {' and '.join(missing)}")
    return _build(lambda: cls(**given), where, key)


def _required(cls: type, name: str) -> bool:
    field = next(f for f in fields(cls) if f.name == name)
    return field.default is MISSING and field.default_factory is MISSING


def _fits(value: Any, hint: Any, where: str, key: str) -> bool:
    if hint is type(None):
        return False  # TOML has no null
    try:
        _convert(value, hint, where, key)
    except ValueError:
        return False
    return True


def _wrong(value: Any, hint: Any, where: str, key: str) -> NoReturn:
    raise UserError(f"{where}: {key} must be {describe(hint)}, not {_show(value)}")


def _show(value: Any) -> str:
    """A TOML value in words: "the string 'x'"."""
    kind = KINDS.get(type(value), f"a {type(value).__name__}")
    if isinstance(value, (dict, list)):
        return kind
    return str(value).lower() if isinstance(value, bool) else f"the {kind.partition(' ')[2]} {value!r}"


# ---- TOML out ------------------------------------------------------------------------------------------------------------------


def _dump(config: Any, prefix: str) -> Iterator[str]:
    """TOML lines of `config`: plain values first, because of TOML's scoping, then sections, then arrays of tables."""
    values = {name: getattr(config, name) for name in field_types(type(config))}
    tables = {k: v for k, v in values.items() if isinstance(v, (tuple, list)) and v and all(map(is_dataclass, v))}
    rest: str = getattr(type(config), "REST", "")
    sections = {k: v for k, v in values.items() if is_dataclass(v)} | values.get(rest, {})
    for name, value in values.items():
        if name not in tables and name not in sections and name != rest and value is not None:
            yield f"{name} = {_literal(value)}"
    for name, section in sections.items():
        yield from ("", f"[{prefix}{name}]")
        yield from _dump(section, f"{prefix}{name}.")
    for name, rows in tables.items():
        for row in rows:
            yield from ("", f"[[{prefix}{name}]]")
            yield from _dump(row, f"{prefix}{name}.")


def _literal(value: Any) -> str:
    """A value as a TOML literal."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, Path)):
        if "\\" in str(value) and "'" not in str(value) and str(value).isprintable():
            return f"'{value}'"  # regular expressions stay readable
        return _quoted(str(value))
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    assert isinstance(value, dict), type(value)
    return "{" + ", ".join(f"{_quoted(k)} = {_literal(v)}" for k, v in value.items()) + "}"


def _quoted(text: str) -> str:
    """A string of TOML, as a value or a key. TOML allows no DEL in it, JSON does."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
