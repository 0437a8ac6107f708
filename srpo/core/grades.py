"""The grades of a query-item pair: their names from the worst to the best, and how the data spell them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from srpo.core.errors import UserError
from srpo.core.mappings import Texts
from srpo.core.ranges import Finite
from srpo.core.text import fold

PAPER_GRADES = ("L1", "L2", "L3", "L4")  # 1 Irrelevant, 2 Mismatch, 3 Related, 4 Excellent (5.1.2)
_ESCI = {"E": 4, "S": 3, "C": 2, "I": 1}  # the labels of ESCI (exact, substitute, complement, irrelevant)


@dataclass(frozen=True)
class Grades:
    """An ordered scale of 2 to 10 grades. A grade is its name; class numbers go from 1, the worst.

    Raises UserError, with the fix in its text, for a scale that cannot work.
    """

    names: tuple[str, ...] = PAPER_GRADES  # grades from the worst to the best: the answers of the last step, such as no and yes
    good: tuple[str, ...] = ()  # grades that count as good in Good F1 and the goodrates; empty: the upper half
    # Other spellings in the data and the grade of each, such as "0" = "Irrelevant"; names need none, nor do class
    # numbers from 1, which hold as long as no name or label is a number
    labels: Texts = field(default_factory=dict)
    gains: tuple[Finite, ...] = ()  # gain of each grade in NDCG, from the worst; empty: 0, 1, 2, ...

    def __post_init__(self) -> None:
        names = self.names
        if not 2 <= len(names) <= 10:
            raise UserError(f"grades.names has {len(names)} names: give 2 to 10, from the worst to the best")
        if bad := [name for name in names if not re.fullmatch(r"\w(?:[^\n\r;,\"{}*\\]*\w)?", name)]:
            raise UserError(
                f"grades.names has {bad[0]!r}: a name is on one line, begins and ends with a letter or digit, and has none of "
                ', ; " { } * \\'
            )
        if len({*map(_key, names)}) < len(names):
            raise UserError(f"grades.names is {', '.join(names)}: the names must differ by more than case and spaces")
        for key, named in (("good", self.good), ("labels", tuple(self.labels.values()))):
            if unknown := [name for name in named if name not in names]:
                raise UserError(f"grades.{key} has {unknown[0]!r}: name some of {', '.join(names)}")
        meant = {_key(name): name for name in names}
        for label, name in self.labels.items():
            if meant.setdefault(_key(label), name) != name:
                raise UserError(f"grades.labels says that {label!r} is {name}, but it is {meant[_key(label)]}: keep one of them")
        if set(self.good) == set(names):
            raise UserError("grades.good has all grades: leave out those that are not good")
        if self.gains and (len(self.gains) != len(names) or list(self.gains) != sorted(self.gains)):
            raise UserError(f"grades.gains is {list(self.gains)}: give one rising number for each of {', '.join(names)}")

    @property
    def good_classes(self) -> tuple[int, ...]:
        """Indices, from 0, of the grades that count as good."""
        half = range((len(self.names) + 1) // 2, len(self.names))
        return tuple(i for i, name in enumerate(self.names) if name in self.good) if self.good else tuple(half)

    @property
    def gain(self) -> tuple[float, ...]:
        """Gain of each grade in NDCG."""
        return self.gains or tuple(map(float, range(len(self.names))))

    def index(self, name: str | None) -> int | None:
        """Index, from 0, of a grade by its name, in any case and spacing; None for any other text."""
        return None if name is None else self._indices.get(fold(name).strip(" ."))

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {fold(name): i for i, name in enumerate(self.names)}

    @cached_property
    def _spellings(self) -> dict[str, str]:
        """The grade of each spelling that `read` knows, by `_key`."""
        known: dict[str, str] = {}
        if not any(map(_is_number, (*self.names, *self.labels))):
            known |= {str(number): name for number, name in enumerate(self.names, 1)}
            if self.names == PAPER_GRADES and not self.labels:
                known |= {_key(letter): self.names[number - 1] for letter, number in _ESCI.items()}
        return known | {_key(label): name for label, name in self.labels.items()} | {_key(name): name for name in self.names}

    def read(self, value: Any) -> str | None:
        """The grade that a value of the data means, None for any other value: its name, a spelling of `labels`, else its class
        number (unless a name or a label is a number itself); on the paper's grades without labels E, S, C and I, too.

        2.0 is 2, as in a column of pandas with nulls, and true and false are texts.
        """
        text = spelled(value)
        if text is None:
            return None
        if named := self._spellings.get(fold(text)):
            return named
        index = self.index(text)
        return None if index is None else self.names[index]

    def expected(self, shown: Any) -> str:
        """The end of a message on a value that `read` does not know: the grades, and the nearest spelling."""
        text = spelled(shown) or ""
        known = [*map(str.lower, (*self.names, *self.labels))]
        near = [] if text.isdigit() else difflib.get_close_matches(text.lower(), known, n=1)
        nearest = f"; the nearest is {near[0]!r}" if near else ""
        example = f"--grades.labels {text or 'VALUE'}={self.names[0]}"
        if re.fullmatch(r"\d+", text):
            first = " ".join(f"{i}={name}" for i, name in enumerate(self.names))
            example = f"--grades.labels {first}; without it numbers count from 1, and not at all if a name or label is one"
        labels = f", also spelled {', '.join(self.labels)}" if self.labels else ""
        return f"the grades are {', '.join(self.names)}{labels}{nearest}; give other spellings in grades.labels ({example})"

    def title(self, index: int) -> str:
        """The grade in a table: its class number on the paper's scale, else its name."""
        return str(index + 1) if self.names == PAPER_GRADES else self.names[index]


def of_options(options: Sequence[str]) -> Grades:
    """The scale whose grades are the options of a step, from the worst to the best; the paper's without options."""
    return Grades(tuple(options)) if options else Grades()


def spelled(value: Any) -> str | None:
    """A value of the data as the text that names a grade; None for one that cannot, such as NaN or a list."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return None if not math.isfinite(value) else str(int(value)) if value == int(value) else str(value)
    if isinstance(value, (int, str)):
        text = str(value).strip()
        return re.sub(r"(?<=\d)\.0+$", "", text) if text.endswith("0") else text or None
    return None


def _key(text: str) -> str:
    """The text as spellings are compared."""
    return fold(spelled(text) or "")


def _is_number(name: str) -> bool:
    return re.fullmatch(r"-?\d+(?:\.\d+)?", name.strip()) is not None
