"""The stratum of an example: the values of some of its tags, over which selection and sampling are balanced (4.1.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from srpo.core.errors import UserError
from srpo.data.examples import Example


def stratum(example: Example, names: Sequence[str]) -> tuple[str, ...]:
    """Values of the tags `names` of `example`, in that order; () for no names.

    Without a tag "grade" the gold verdict is used. UserError, listing the tags of the example, for a tag that is
    missing or empty.

    Paper: 4.1.2 balances query types and relevance grades and does not say where a type comes from; here it is a tag of the data.
    """
    return values_of(tags_with_grade(example), names, example.shown)


def tags_with_grade(example: Example) -> dict[str, str]:
    """The tags of `example` that `stratum` reads: a missing tag "grade" is taken from the gold verdict."""
    if example.grade is None or example.tags.get("grade"):
        return dict(example.tags)
    return {**example.tags, "grade": example.grade}


def values_of(tags: Mapping[str, str], names: Sequence[str], shown: str) -> tuple[str, ...]:
    """`stratum` from the `tags_with_grade` of an example; `shown`: the example in an error message."""
    for name in names:
        if not tags.get(name):
            raise UserError(
                f"{shown} has no tag {name!r} (its tags: {', '.join(sorted(tags)) or 'none'}): "
                "name tags that all examples have, or add the missing one to the data (docs/data.md)"
            )
    return tuple(tags[name] for name in names)
