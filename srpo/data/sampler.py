"""Which prompts an optimizer step trains on: epoch shuffles, even strata (4.1.2), a difficulty window that moves along (4.2.1).

Every rank runs the same sampler on the same examples and scores and takes its share of each batch, so the draws do not depend
on the world size. Nothing random is kept: an epoch's order follows from (seed, stratum, epoch, stage).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from srpo.data.examples import Example
from srpo.data.solve_rates import SolveRates
from srpo.data.strata import stratum


class SamplerState(TypedDict):
    """JSON-able; continuing from it gives the same batches as never having stopped."""

    fingerprint: str  # of the examples, the seed and the balance: what the order depends on
    num_drawn: int
    num_early: int
    taken: list[int]  # drawn in this optimizer step
    strata: list[list[Any]]  # [epoch, position, deferred] of each stratum


def in_window(scores: Sequence[float], low: float, high: float) -> list[bool]:
    """Whether each score lies strictly between `low` and `high` (5.1.5: 0.01 and 0.90). False for NaN.

    Paper: it does not say whether the bounds belong to the window; here they do not.
    """
    return [low < score < high for score in scores]


class PromptSampler:
    """Draws batches of prompts from `examples`, whose estimates stand in `rates`.

    An epoch is one pass over a stratum (all examples where `balance` names no tag) and visits every eligible example before it
    repeats one. Not eligible is an example whose estimate lies outside (low, high) and has not aged out (`SolveRates`). Scores
    observed before the first draw are the offline rejection sampling of 4.1.1.

    `balance` names tags: each batch holds every combination of their values that occurs equally often, to within one, and the odd
    ones go round. A stratum that has too few eligible examples left gives what it has and the others share the rest.

    Work per step: O(prompts + strata) Python and a few vectorised passes over the examples. ValueError for no examples, a window
    that is none, or an example without one of the tags.
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
            raise ValueError("the sampler has no examples: check data.train")
        if not low < high:
            raise ValueError(f"no score lies between {low} and {high}: set sampler.difficulty_low below sampler.difficulty_high")
        if seed < 0:
            raise ValueError(f"seed is {seed}: set it to 0 or more")
        self._examples, self._rates, self._low, self._high = examples, rates, low, high
        names = [example.example_id for example in examples]
        self._rows = rates.rows(names)
        members: dict[tuple[str, ...], list[int]] = {}
        try:
            for i, example in enumerate(examples):
                members.setdefault(stratum(example, balance) if balance else (), []).append(i)
        except ValueError as error:
            raise ValueError(f"sampler.balance: {error}") from error
        key = (stage,) if stage else ()
        self._strata = [_Stratum(np.array(members[value]), seed, k, key) for k, value in enumerate(sorted(members))]
        self._taken = np.zeros(len(examples), dtype=bool)
        self._num_drawn = 0
        self.num_early = 0  # of the last step: drawn although skipped, because the step would have been short
        text = "\n".join((f"{seed} {list(balance)} {stage}", *names))
        self._fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def next(self, n: int) -> list[Example]:
        """Begin an optimizer step: its `n` examples, all different, strata interleaved so that contiguous shares are even too.

        Where fewer than `n` are eligible, those scored longest ago come back early (`num_early`). ValueError where there are
        fewer than `n` examples, and where none is eligible.
        """
        if n > len(self._examples):
            raise ValueError(
                f"{n} different prompts were asked for and there are {len(self._examples)}: "
                "lower rollout.num_prompts or give more data"
            )
        self._rates.tick()
        self._taken[:] = False
        eligible = self._eligible()
        if not eligible.any():
            raise ValueError(self._nothing_left())
        batch = self._draw(n, eligible)
        early = self._longest_ago(n - len(batch))
        self._taken[early] = True
        self.num_early = len(early)
        return [self._examples[i] for i in batch + early]

    def more(self, n: int) -> list[Example]:
        """Up to `n` further examples for the step that `next` began, none of which it has; fewer where no more is eligible."""
        return [self._examples[i] for i in self._draw(n, self._eligible())]

    def put_back(self, examples: Sequence[Example]) -> None:
        """Examples of this step that nobody has sampled to the end: their turn comes again, first of all in the next step.

        Not in this one, which has them drawn already. One that was drawn early (`num_early`) waits until it has aged.
        """
        if examples:
            ids = {example.example_id for example in examples}
            indices = np.array([i for i in np.flatnonzero(self._taken) if self._examples[i].example_id in ids])
            for stratum_ in self._strata:
                stratum_.put_back(indices)

    def observe(self, example_ids: Sequence[str], scores: Sequence[float]) -> None:
        """Learn the group mean score of each example, the same on all ranks. ValueError for an unknown id or NaN."""
        self._rates.observe(example_ids, scores)

    def stats(self) -> dict[str, int]:
        """`SolveRates.stats` of these examples."""
        return self._rates.stats(self._rows, self._low, self._high)

    def metrics(self) -> dict[str, float]:
        """The `sampler/*` metrics of the step that was observed last."""
        stats, total = self.stats(), len(self._examples)
        num_seen = total - stats["num_unseen"]
        shares = {"sampler/in_window_frac": stats["num_in_window"] / num_seen} if num_seen else {}
        return shares | {
            "sampler/coverage_frac": num_seen / total,
            "sampler/num_skipped": stats["num_skipped"],
            "sampler/num_early": self.num_early,
        }

    def state_dict(self) -> SamplerState:
        """Everything that the next batches depend on, but for the constructor's arguments and `rates`."""
        return {
            "fingerprint": self._fingerprint,
            "num_drawn": self._num_drawn,
            "num_early": self.num_early,
            "taken": np.flatnonzero(self._taken).tolist(),
            "strata": [[s.epoch, s.position, list(s.deferred)] for s in self._strata],
        }

    def load_state_dict(self, state: SamplerState | dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. ValueError where it is of other examples, another seed or another balance."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                "the sampler state is of other training data (or their order), another seed or another sampler.balance: "
                "resume with the data and config of the run, or start a new run_dir"
            )
        self._num_drawn, self.num_early = state["num_drawn"], state["num_early"]
        self._taken[:] = False
        self._taken[state["taken"]] = True
        for place, (epoch, position, deferred) in zip(self._strata, state["strata"], strict=True):
            place.seek(epoch, position)
            place.deferred = list(deferred)

    def _eligible(self) -> np.ndarray:
        """[examples] bool: may be drawn in this step."""
        return ~self._rates.skipped(self._rows, self._low, self._high) & ~self._taken

    def _draw(self, n: int, eligible: np.ndarray) -> list[int]:
        """Up to `n` eligible examples, stratum by stratum in turn; they are taken and no longer eligible."""
        batch: list[int] = []
        size = len(self._strata)
        turns = [(0, (k - self._num_drawn) % size, k) for k in range(size)]  # (drawn now, whose turn it is, stratum)
        heapq.heapify(turns)
        while turns and len(batch) < n:
            drawn, turn, k = heapq.heappop(turns)
            index = self._strata[k].draw(eligible, self._taken)
            if index is None:  # dry: the others share the rest
                continue
            eligible[index], self._taken[index] = False, True
            batch.append(index)
            heapq.heappush(turns, (drawn + 1, turn, k))
        self._num_drawn += len(batch)
        return batch

    def _longest_ago(self, n: int) -> list[int]:
        """The `n` examples that are not in the step and whose last score is oldest, in the order of the data among equals."""
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
            f"all {len(self._examples)} examples are outside the difficulty window ({self._low}, {self._high}): "
            f"{stats['num_too_easy']} too easy, {stats['num_too_hard']} too hard: {fix}"
        )


class _Stratum:
    """A place in an endless sequence of epochs, each a shuffle of the members by (seed, stratum, epoch, stage).

    An example that the step holds already when the next epoch comes to it is deferred: a later step draws it first.
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
        """Those of the indices that are members come first, before whatever waits for its turn."""
        back = np.intersect1d(self._members, indices).tolist()
        self.deferred = back + [index for index in self.deferred if index not in back]

    def draw(self, eligible: np.ndarray, taken: np.ndarray) -> int | None:
        """The next eligible member; None where there is none left."""
        self.deferred = [i for i in self.deferred if eligible[i] or taken[i]]  # the others have lost their turn to the window
        for place, index in enumerate(self.deferred):
            if eligible[index]:
                del self.deferred[place]
                return index
        before = self.position, list(self.deferred)
        index = self._walk(eligible, taken)
        if index is not None:
            return index
        if not eligible[self._members].any():  # the rest of this epoch keeps its turn until it has aged
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
