"""Samples further prompts for an optimizer step if not all of its groups train: "dynamic sampling" (4.2.1, as in DAPO)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from srpo.core.batch import Rollout
from srpo.data.examples import Example


def refill(
    examples: Sequence[Example],
    rollouts: Sequence[Rollout],
    *,
    num_prompts: int,
    max_rounds: int,
    count: Callable[[Sequence[Rollout]], int],
    draw: Callable[[int], Sequence[Example]],
    sample: Callable[[Sequence[Example], int, int], Sequence[Rollout]],
) -> tuple[list[Example], list[Rollout], int]:
    """(examples, rollouts, rounds) once `num_prompts` groups train, `max_rounds` are used up, or no further prompt is left.

    rollouts: this rank's, scored; group g belongs to examples[g]. `count(rollouts)` returns the number of groups that train, over
    all ranks; `draw(n)` up to n further examples, the same on all ranks; `sample(examples, first_group, round)` this rank's
    scored rollouts of examples[first_group:], with rounds counted from 1.

    Each round draws as many prompts as groups are missing, so no surplus arises. Paper: 4.2.1 does not say whether a step is
    filled up.
    """
    examples, rollouts, rounds = list(examples), list(rollouts), 0
    while rounds < max_rounds and (missing := num_prompts - count(rollouts)) > 0 and (further := draw(missing)):
        rounds += 1
        first_group = len(examples)
        examples += further
        rollouts += sample(examples, first_group, rounds)
    return examples, rollouts, rounds
