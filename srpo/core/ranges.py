"""Number types of settings that know their range: `lr: NonNegative = 1e-6`. Every number of a settings class has one.

`check_ranges` refuses a value outside; nan and infinity are in no range.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from srpo.core.errors import UserError

LARGEST_INT = 2**31 - 1  # what every library that gets one can hold
LARGEST_FLOAT = 1e30  # leaves torch's fp32 room for its product with other settings


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`. above: without `least` itself; below: without `most` itself."""

    least: float = -LARGEST_FLOAT
    most: float = LARGEST_FLOAT
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low and high  # never for nan

    @property
    def is_open(self) -> bool:
        """Whether `most` is only the largest number that can be held."""
        return self.most in (LARGEST_INT, LARGEST_FLOAT)

    def __str__(self) -> str:
        if self.is_open and self.least != -LARGEST_FLOAT:
            return f"a number above {self.least:g}" if self.above else f"{self.least:g} or more"
        if self.above:
            return f"a number above {self.least:g} and " + (f"below {self.most:g}" if self.below else f"at most {self.most:g}")
        return f"a number from {self.least:g} to " + (f"below {self.most:g}" if self.below else f"{self.most:g}")


Count = Annotated[int, Range(0, LARGEST_INT)]
Size = Annotated[int, Range(1, LARGEST_INT)]
Seed = Annotated[int, Range(0, LARGEST_INT)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Temperature = Annotated[float, Range(0.01, 100)]  # below, logits leave the range of fp32
Fraction = Annotated[float, Range(0, 1)]
OpenFraction = Annotated[float, Range(0, 1, above=True, below=True)]
PositiveFraction = Annotated[float, Range(0, 1, above=True)]
BelowOne = Annotated[float, Range(0, 1, below=True)]
Finite = Annotated[float, Range()]


def check_ranges(config: Any, where: str = "", prefix: str = "") -> None:
    """Raise UserError for the first number of a settings dataclass that is outside its range.

    where: begins the message, such as the file. prefix: begins each key, such as "rollout.vllm.".
    """
    for key, value, bounds in numbers(config, prefix):
        if bounds is not None and value not in bounds:
            too_large = bounds.is_open and value > bounds.most
            advice = f"at most {bounds.most:.10g}" if too_large else str(bounds)
            raise UserError(f"{where}{': ' if where else ''}{key} is {value}: set it to {advice}")


def numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, float, Range | None]]:
    """(dotted key, value, range or None) of every number in a dataclass, those in nested dataclasses, tuples and tables too."""
    for name, hint in field_types(type(config)).items():
        key = prefix.rstrip(".") if name == getattr(config, "REST", None) else prefix + name
        yield from _numbers(getattr(config, name), hint, key, None)


def _numbers(value: Any, hint: Any, key: str, bounds: Range | None) -> Iterator[tuple[str, float, Range | None]]:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from _numbers(value, args[0], key, next((a for a in args[1:] if isinstance(a, Range)), bounds))
    elif origin in (Union, types.UnionType):  # `Fraction | None`: the part that is no None
        part = next((part for part in args if part is not type(None)), None)
        yield from _numbers(value, part, key, bounds)
    elif is_dataclass(value):
        yield from numbers(value, f"{key}.")
    elif isinstance(value, (tuple, list)):
        kinds = (args[0],) * len(value) if args[1:] in ((), (Ellipsis,)) else args
        for i, (entry, kind) in enumerate(zip(value, kinds, strict=False)):
            yield from _numbers(entry, kind, f"{key}[{i}]", bounds)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _numbers(entry, args[1], f"{key}.{name}", bounds)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if origin is Union or bounds is None:  # `Fraction | None`: the bounds are in the part that is a number
            bounds = next(
                (b for part in args if get_origin(part) is Annotated for b in get_args(part) if isinstance(b, Range)), bounds
            )
        yield key, value, bounds


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The resolved type of each field of a dataclass, with its annotations."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}
