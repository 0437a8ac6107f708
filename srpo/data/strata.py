"""The stratum of an example: the values of some of its tags, which balanced selection and sampling count by (paper 4.1.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from srpo.data.examples import Example


def stratum(example: Example, names: Sequence[str]) -> tuple[str, ...]:
    """The values of the named tags of `example`, in the order of `names`; () for no names.

    "grade" falls back on the gold verdict ("L1" to "L4") where the example has no such tag. ValueError, with the tags that the
    example has, for a tag that is missing or empty.

    Paper: 4.1.2 balances query types and relevance grades and does not say how a type is known; here it is a tag of the data.
    """
    return values_of(tags_with_grade(example), names, example.example_id)


def tags_with_grade(example: Example) -> dict[str, str]:
    """The tags of `example`, with "grade" from the gold verdict where there is no such tag: what `stratum` reads."""
    if example.grade is None or example.tags.get("grade"):
        return dict(example.tags)
    return {**example.tags, "grade": f"L{example.grade}"}


def values_of(tags: Mapping[str, str], names: Sequence[str], example_id: str) -> tuple[str, ...]:
    """`stratum` of the example `example_id`, whose `tags_with_grade` are known."""
    for name in names:
        if not tags.get(name):
            raise ValueError(
                f"example {example_id} has no tag {name!r} (its tags: {', '.join(sorted(tags)) or 'none'}): "
                "name tags that all examples have, or add the missing one to the data (docs/data.md)"
            )
    return tuple(tags[name] for name in names)
