"""Which prompts an optimizer step trains on: epoch shuffles, even strata (4.1.2), a difficulty window that moves along (4.2.1).

Every rank runs the same sampler on the same examples and scores and takes its share of each batch, so the draws do not depend
on the world size. Nothing random is kept: an epoch's order follows from (seed, stratum, epoch).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from srpo.data.examples import Example


class SamplerState(TypedDict):
    """JSON-able; continuing from it gives the same batches as never having stopped."""

    fingerprint: str  # of the examples, the seed and the balance: what the order depends on
    num_drawn: int
    strata: dict[str, list[int]]  # value of the balanced tag -> [epoch, position]
    scores: dict[str, list[float]]  # example_id -> [last score, epoch of its stratum when observed]


def in_window(scores: Sequence[float], low: float, high: float) -> list[bool]:
    """Whether each score lies strictly between `low` and `high` (5.1.5: 0.01 and 0.90). False for NaN.

    Paper: it does not say whether the bounds belong to the window; here they do not.
    """
    return [low < score < high for score in scores]


class PromptSampler:
    """Draws batches of prompts.

    An epoch is one pass over a stratum (all examples where `balance` is ""). An example whose last group mean score lies outside
    (low, high) is skipped for the rest of this epoch and the next `revisit_epochs`, then it is tried again.
    Scores observed before the first draw are the offline rejection sampling of 4.1.1.

    `balance` names a tag, or "grade": each batch holds every value equally often, to within one, and the odd ones go round. A
    value that has too few examples left in the window gives what it has and the others share the rest.

    ValueError for no examples, a repeated example_id, a window that is none, or an example without the tag.

    Paper: 4.2.1 does not say for how long an example is left out, so `revisit_epochs` does.
    """

    def __init__(
        self, examples: Sequence[Example], *, seed: int, balance: str = "", low: float, high: float, revisit_epochs: int = 2
    ):
        if not examples:
            raise ValueError("the sampler has no examples: check data.train")
        if not low < high:
            raise ValueError(f"no score lies between {low} and {high}: set sampler.difficulty_low below sampler.difficulty_high")
        if seed < 0 or revisit_epochs < 0:
            raise ValueError(f"seed {seed} and revisit_epochs {revisit_epochs} have to be 0 or more")
        self._examples = examples
        self._index = {example.example_id: i for i, example in enumerate(examples)}
        if len(self._index) < len(examples):
            twice = Counter(example.example_id for example in examples).most_common(1)[0][0]
            raise ValueError(f"example_id {twice!r} occurs more than once: give every pair its own")
        self._low, self._high, self._revisit_epochs = low, high, revisit_epochs
        members: dict[str, list[int]] = {}
        values = _strata_of(examples, balance)
        for i, value in enumerate(values):
            members.setdefault(value, []).append(i)
        self._strata = [_Stratum(value, members[value], (seed, k)) for k, value in enumerate(sorted(members))]
        by_value = {stratum.value: stratum for stratum in self._strata}
        self._stratum_of = [by_value[value] for value in values]
        self._scores: dict[int, tuple[float, int]] = {}  # index -> (last score, epoch of its stratum at that time)
        self._num_drawn = 0
        names = "\n".join((f"{seed} {balance}", *self._index))
        self._fingerprint = hashlib.blake2b(names.encode(), digest_size=16).hexdigest()

    def next(self, n: int) -> list[Example]:
        """The next `n` examples, all different, strata interleaved so that contiguous shares are balanced too.

        Where fewer than `n` are in the window, those skipped for longest come back early. ValueError where there are fewer than
        `n` examples, and where every one was found outside the window within the last `revisit_epochs`.
        """
        if n > len(self._examples):
            raise ValueError(
                f"{n} different prompts were asked for and there are {len(self._examples)}: "
                "lower rollout.num_prompts or give more data"
            )
        if not any(self._eligible(i, stratum.epoch + 1) for i, stratum in enumerate(self._stratum_of)):
            raise ValueError(self._nothing_left())
        batch: list[int] = []
        taken: set[int] = set()
        drawn = dict.fromkeys(self._strata, 0)
        dry: set[_Stratum] = set()  # had nothing more to give for this batch
        while len(batch) < n:
            open_strata = [stratum for stratum in self._strata if stratum not in dry]
            if not open_strata:  # everything in the window is in the batch: on to the epochs in which others are tried again
                dry.clear()
                continue
            turn = self._num_drawn + len(batch)
            order = {s: (k - turn) % len(self._strata) for k, s in enumerate(self._strata)}
            stratum = min(open_strata, key=lambda s: (drawn[s], order[s]))
            index = self._draw(stratum, taken)
            if index is None:
                dry.add(stratum)
                continue
            drawn[stratum] += 1
            taken.add(index)
            batch.append(index)
        self._num_drawn += n
        return [self._examples[i] for i in batch]

    def observe(self, example_ids: Sequence[str], scores: Sequence[float]) -> None:
        """Remember the group mean score of each example, the same on all ranks. ValueError for an unknown id or NaN."""
        for example_id, score in zip(example_ids, scores, strict=True):
            if example_id not in self._index:
                raise ValueError(f"example_id {example_id!r} is not in this sampler: observe what next() returned")
            if not math.isfinite(score):
                raise ValueError(f"the score of {example_id} is {score}: a group score has to be finite")
            index = self._index[example_id]
            self._scores[index] = (float(score), self._stratum_of[index].epoch)

    def stats(self) -> dict[str, int]:
        """Numbers of examples by their last score: num_unseen, num_too_hard (<= low), num_in_window, num_too_easy (>= high)."""
        scores = [score for score, _ in self._scores.values()]
        too_hard, too_easy = sum(s <= self._low for s in scores), sum(s >= self._high for s in scores)
        return {
            "num_unseen": len(self._examples) - len(scores),
            "num_too_hard": too_hard,
            "num_in_window": len(scores) - too_hard - too_easy,
            "num_too_easy": too_easy,
        }

    def state_dict(self) -> SamplerState:
        """Everything that the next batches depend on and that the constructor is not given."""
        return {
            "fingerprint": self._fingerprint,
            "num_drawn": self._num_drawn,
            "strata": {stratum.value: [stratum.epoch, stratum.position] for stratum in self._strata},
            "scores": {self._examples[i].example_id: [score, epoch] for i, (score, epoch) in self._scores.items()},
        }

    def load_state_dict(self, state: SamplerState | dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. ValueError where it is of other examples, another seed or another balance."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                "the sampler state is of other training data (or their order), another seed or another sampler.balance: "
                "resume with the data and config of the run, or start a new run_dir"
            )
        self._num_drawn = state["num_drawn"]
        for stratum in self._strata:
            stratum.seek(*state["strata"][stratum.value])
        self._scores = {self._index[name]: (score, int(epoch)) for name, (score, epoch) in state["scores"].items()}

    def _eligible(self, index: int, epoch: int) -> bool:
        score, seen = self._scores.get(index, (None, 0))
        return score is None or self._low < score < self._high or epoch - seen > self._revisit_epochs

    def _draw(self, stratum: _Stratum, taken: set[int]) -> int | None:
        """The next eligible example of a stratum that is not in the batch yet; None after the rest of its epoch and one more."""
        last = stratum.epoch + 1
        while stratum.epoch < last or stratum.position < len(stratum.members):
            index = stratum.advance()
            if index not in taken and self._eligible(index, stratum.epoch):
                return index
        return None

    def _nothing_left(self) -> str:
        stats = self.stats()
        fix = (
            "train longer by SFT, raise rollout.group_size or lower sampler.difficulty_low"
            if stats["num_too_hard"] > stats["num_too_easy"]
            else "give harder data or raise sampler.difficulty_high"
        )
        return (
            f"all {len(self._examples)} examples are outside the difficulty window ({self._low}, {self._high}): "
            f"{stats['num_too_easy']} too easy, {stats['num_too_hard']} too hard: {fix}"
        )


class _Stratum:
    """A place in an endless sequence of epochs, each a shuffle of the members by (seed, epoch)."""

    def __init__(self, value: str, members: list[int], seed: tuple[int, int]):
        self.value = value
        self.members = members
        self._seed = seed
        self.seek(0, 0)

    def seek(self, epoch: int, position: int) -> None:
        entropy, stratum = self._seed
        rng = np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(stratum, epoch)))
        self.epoch, self.position = epoch, position
        self._order = rng.permutation(len(self.members))

    def advance(self) -> int:
        """The member at this place; then one place on."""
        if self.position == len(self.members):
            self.seek(self.epoch + 1, 0)
        self.position += 1
        return self.members[self._order[self.position - 1]]


def _strata_of(examples: Sequence[Example], balance: str) -> list[str]:
    """The stratum of each example: the value of its tag. "grade" falls back on the gold verdict."""
    if not balance:
        return [""] * len(examples)
    values = [
        example.tags.get(balance) or (f"L{example.grade}" if balance == "grade" and example.grade is not None else None)
        for example in examples
    ]
    strata = [value for value in values if value is not None]
    if len(strata) < len(examples):
        missing = examples[values.index(None)]
        raise ValueError(
            f"sampler.balance is {balance!r} and {len(examples) - len(strata)} of {len(examples)} examples lack that tag, "
            f"first {missing.example_id} (its tags: {', '.join(missing.tags) or 'none'}): name one that all have, or none"
        )
    return strata
