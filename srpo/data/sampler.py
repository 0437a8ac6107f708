"""Draws the prompts of each optimizer step: epoch shuffles, even strata (4.1.2), a moving difficulty window (4.2.1).

Every rank runs the same sampler on the same examples and scores and takes its share of each batch, so the draws do not depend
on the world size. No random state is stored: the order of an epoch follows from (seed, stratum, epoch, stage).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from srpo.core.errors import UserError
from srpo.data.examples import Example
from srpo.data.solve_rates import SolveRates
from srpo.data.strata import stratum


class SamplerState(TypedDict):
    """JSON-able state; a sampler that resumes from it draws the same batches as one that never stopped."""

    fingerprint: str  # of the examples, the seed, the balance and the stage, which determine the order
    num_drawn: int
    num_early: int
    taken: list[int]  # examples drawn in this optimizer step
    strata: list[list[Any]]  # [epoch, position, deferred] of each stratum


def in_window(scores: Sequence[float], low: float, high: float) -> list[bool]:
    """Whether each score lies strictly between `low` and `high` (5.1.5: 0.01 and 0.90). False for NaN.

    Paper: 5.1.5 does not say whether the bounds belong to the window; here they do not.
    """
    return [low < score < high for score in scores]


class PromptSampler:
    """Draws batches of prompts from `examples`, with their solve-rate estimates in `rates`.

    An epoch is one pass over a stratum (over all examples if `balance` is empty) that visits every eligible example before it
    repeats one. An example is not eligible while its estimate lies outside (low, high) and has not aged out (`SolveRates`).
    Scores observed before the first draw act as the offline rejection sampling of 4.1.1.

    `balance` names tags: a batch has equally many examples of every combination of their values (stratum), to within one, and
    the strata take turns with the remainder. If a stratum runs out of eligible examples, the others fill its places.

    Work per step: O(prompts + strata) in Python and a few vectorized passes over the examples. UserError for no examples, an
    empty window, a negative seed, or an example without one of the tags.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        rates: SolveRates,
        *,
        seed: int,
        low: float,
        high: float,
        balance: Sequence[str] = (),
        stage: int = 0,
    ):
        if not examples:
            raise UserError("the sampler has no examples: check data.train")
        if not low < high:
            raise UserError(f"no score lies between {low} and {high}: set sampler.difficulty_low below sampler.difficulty_high")
        if seed < 0:
            raise ValueError(f"seed is {seed}: set it to 0 or more")
        self._examples, self._rates, self._low, self._high = examples, rates, low, high
        names = [example.example_id for example in examples]
        self._rows = rates.rows(names)
        members: dict[tuple[str, ...], list[int]] = {}
        try:
            for i, example in enumerate(examples):
                members.setdefault(stratum(example, balance) if balance else (), []).append(i)
        except UserError as error:
            raise UserError(f"sampler.balance: {error}") from error
        key = (stage,) if stage else ()
        self._strata = [_Stratum(np.array(members[value]), seed, k, key) for k, value in enumerate(sorted(members))]
        self._taken = np.zeros(len(examples), dtype=bool)
        self._num_drawn = 0
        self.num_early = 0  # examples of the last step that were drawn although skipped, because too few were eligible
        text = "\n".join((f"{seed} {list(balance)} {stage}", *names))
        self._fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def next(self, n: int) -> list[Example]:
        """Begin an optimizer step: its `n` examples, all different. Strata alternate, so that contiguous shares are even, too.

        If fewer than `n` are eligible, the examples scored longest ago fill the step early (`num_early`). UserError if there are
        fewer than `n` examples or none is eligible.
        """
        if n > len(self._examples):
            raise UserError(
                f"an optimizer step needs {n} different prompts and the data has {len(self._examples)}: "
                "lower rollout.num_prompts or give more data"
            )
        self._rates.tick()
        self._taken[:] = False
        eligible = self._eligible()
        if not eligible.any():
            raise UserError(self._nothing_left())
        batch = self._draw(n, eligible)
        early = self._longest_ago(n - len(batch))
        self._taken[early] = True
        self.num_early = len(early)
        return [self._examples[i] for i in batch + early]

    def more(self, n: int) -> list[Example]:
        """Up to `n` more examples for the step that `next` began, all new to it; fewer if fewer are eligible."""
        return [self._examples[i] for i in self._draw(n, self._eligible())]

    def put_back(self, examples: Sequence[Example]) -> None:
        """Return examples of this step whose responses were not finished: the next step draws them first.

        This step does not draw them again. An example drawn early (`num_early`) waits until its estimate has aged out.
        """
        if examples:
            ids = {example.example_id for example in examples}
            indices = np.array([i for i in np.flatnonzero(self._taken) if self._examples[i].example_id in ids])
            for stratum_ in self._strata:
                stratum_.put_back(indices)

    def stats(self) -> dict[str, int]:
        """`SolveRates.stats` of these examples."""
        return self._rates.stats(self._rows, self._low, self._high)

    def metrics(self) -> dict[str, float]:
        """The `sampler/*` metrics, with the scores observed so far."""
        stats, total = self.stats(), len(self._examples)
        num_seen = total - stats["num_unseen"]
        shares = {"sampler/in_window_frac": stats["num_in_window"] / num_seen} if num_seen else {}
        return shares | {
            "sampler/coverage_frac": num_seen / total,
            "sampler/num_skipped": stats["num_skipped"],
            "sampler/num_early": self.num_early,
        }

    def state_dict(self) -> SamplerState:
        """State that determines the next batches, except for the constructor's arguments and the state of `rates`."""
        return {
            "fingerprint": self._fingerprint,
            "num_drawn": self._num_drawn,
            "num_early": self.num_early,
            "taken": np.flatnonzero(self._taken).tolist(),
            "strata": [[s.epoch, s.position, list(s.deferred)] for s in self._strata],
        }

    def load_state_dict(self, state: SamplerState | dict[str, Any]) -> None:
        """Resume from a `state_dict`. UserError if it was made with other examples, another seed or another balance."""
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "the sampler state was saved with other training data (or another order), seed or sampler.balance: "
                "resume with the data and config of the run, or start a new run_dir"
            )
        self._num_drawn, self.num_early = state["num_drawn"], state["num_early"]
        self._taken[:] = False
        self._taken[state["taken"]] = True
        for place, (epoch, position, deferred) in zip(self._strata, state["strata"], strict=True):
            place.seek(epoch, position)
            place.deferred = list(deferred)

    def _eligible(self) -> np.ndarray:
        """[examples] bool: neither skipped nor drawn in this step yet."""
        return ~self._rates.skipped(self._rows, self._low, self._high) & ~self._taken

    def _draw(self, n: int, eligible: np.ndarray) -> list[int]:
        """Indices of up to `n` eligible examples, from the strata in turn. Marks them as taken and no longer eligible."""
        batch: list[int] = []
        size = len(self._strata)
        turns = [(0, (k - self._num_drawn) % size, k) for k in range(size)]  # (drawn in this call, turn, stratum)
        heapq.heapify(turns)
        while turns and len(batch) < n:
            drawn, turn, k = heapq.heappop(turns)
            index = self._strata[k].draw(eligible, self._taken)
            if index is None:  # the stratum has run out: the others fill its places
                continue
            eligible[index], self._taken[index] = False, True
            batch.append(index)
            heapq.heappush(turns, (drawn + 1, turn, k))
        self._num_drawn += len(batch)
        return batch

    def _longest_ago(self, n: int) -> list[int]:
        """Indices of the `n` examples with the oldest scores that are not in this step; ties in the order of the data."""
        if not n:
            return []
        left = np.flatnonzero(~self._taken)
        return left[np.argsort(self._rates.seen_at[self._rows[left]], kind="stable")[:n]].tolist()

    def _nothing_left(self) -> str:
        stats = self.stats()
        fix = (
            "train longer by SFT, raise rollout.group_size or lower sampler.difficulty_low"
            if stats["num_too_hard"] > stats["num_too_easy"]
            else "give harder data or raise sampler.difficulty_high"
        )
        return (
            f"all {len(self._examples)} examples are outside the difficulty window ({self._low}, {self._high}), "
            f"{stats['num_too_easy']} too easy and {stats['num_too_hard']} too hard: {fix}"
        )


class _Stratum:
    """A position in an endless sequence of epochs, each a shuffle of the members by (seed, stratum, epoch, stage).

    If an epoch reaches an example that this step has already drawn, the example is deferred: a later step draws it first.
    """

    def __init__(self, members: np.ndarray, seed: int, number: int, stage: tuple[int, ...]):
        self._members = members
        self._seed, self._number, self._stage = seed, number, stage
        self.deferred: list[int] = []
        self.seek(0, 0)

    def seek(self, epoch: int, position: int) -> None:
        key = (self._number, epoch, *self._stage)
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))
        self.epoch, self.position = epoch, position
        self._order = self._members[rng.permutation(len(self._members))]

    def put_back(self, indices: np.ndarray) -> None:
        """Defer the members among `indices`, before all examples that are deferred already."""
        back = np.intersect1d(self._members, indices).tolist()
        self.deferred = back + [index for index in self.deferred if index not in back]

    def draw(self, eligible: np.ndarray, taken: np.ndarray) -> int | None:
        """The next eligible member; None if none is left."""
        self.deferred = [i for i in self.deferred if eligible[i] or taken[i]]  # drops those that left the difficulty window
        for place, index in enumerate(self.deferred):
            if eligible[index]:
                del self.deferred[place]
                return index
        before = self.position, list(self.deferred)
        index = self._walk(eligible, taken)
        if index is not None:
            return index
        if not eligible[self._members].any():  # undo the walk: the skipped rest of this epoch is drawn once it has aged out
            self.position, self.deferred = before
            return None
        self.seek(self.epoch + 1, 0)
        return self._walk(eligible, taken)

    def _walk(self, eligible: np.ndarray, taken: np.ndarray) -> int | None:
        """The next eligible member of this epoch; None at its end."""
        chunk = 64
        while self.position < len(self._order):
            ahead = self._order[self.position : self.position + chunk]
            hits = eligible[ahead]
            passed = int(hits.argmax()) if hits.any() else len(ahead)
            deferred = ahead[:passed][taken[ahead[:passed]]].tolist()
            self.deferred += [index for index in deferred if index not in self.deferred]
            self.position += passed
            if passed < len(ahead):
                self.position += 1
                return int(ahead[passed])
            chunk *= 4
        return None
