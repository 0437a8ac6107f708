"""Dynamic sampling with a fake engine: which prompts are drawn, when it gives up, and that ranks agree."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from srpo.core.batch import Rollout
from srpo.data.examples import Example
from srpo.data.sampler import PromptSampler
from srpo.data.solve_rates import SolveRates
from srpo.training.refill import refill

EXAMPLES = [Example(f"e{i}", "q", "query", "title") for i in range(60)]
NUM_PROMPTS = 8


def rollout(example_id: str, group: int, reward: float = 0.0) -> Rollout:
    return Rollout(example_id, group, (1,), (2,), (0.0,), (1,), ("a",), "a", "stop", 0, (reward,), ("gold",))


def solves(example: Example) -> float:
    """A policy whose solve rate of an example never changes: a third is too easy, a third too hard."""
    return (0.0, 0.5, 1.0)[hash_of(example.example_id) % 3]


def hash_of(text: str) -> int:
    return int(text[1:]) * 2654435761 % 1000


def fake(rank: int, world_size: int) -> Callable[[Sequence[Example], int, int], list[Rollout]]:
    """A fake engine with its judge: one rollout per prompt of this rank, whose reward is the group's score."""

    def sample(examples: Sequence[Example], first: int, number: int) -> list[Rollout]:
        share = range(first + rank, len(examples), world_size)
        return [rollout(examples[i].example_id, i, solves(examples[i])) for i in share]

    return sample


def trained(rollouts: Sequence[Rollout]) -> int:
    return sum((r.step_rewards or (0.0,))[0] == 0.5 for r in rollouts)


def test_rounds_end_when_enough_groups_train() -> None:
    calls: list[tuple[int, int, int]] = []
    left = iter(EXAMPLES[4:])

    def sample(examples: Sequence[Example], first: int, number: int) -> list[Rollout]:
        calls.append((len(examples), first, number))
        return [rollout(e.example_id, g, 0.5 * (g % 2)) for g, e in enumerate(examples) if g >= first]

    start = [rollout(e.example_id, g, 0.5 * (g == 1)) for g, e in enumerate(EXAMPLES[:4])]  # 1 of 4 trains
    examples, rollouts, rounds = refill(
        EXAMPLES[:4],
        start,
        num_prompts=4,
        max_rounds=9,
        count=trained,
        draw=lambda n: [next(left) for _ in range(n)],
        sample=sample,
    )
    # 3 are missing: groups 4, 5, 6, of which 5 trains; 2 missing: 7, 8, of which 7 trains; 1 missing: 9 trains
    assert calls == [(7, 4, 1), (9, 7, 2), (10, 9, 3)] and rounds == 3
    assert [r.group for r in rollouts] == list(range(10)) == [EXAMPLES.index(e) for e in examples]
    assert trained(rollouts) == 4  # never more


@pytest.mark.parametrize("max_rounds", [0, 1, 2])
def test_rounds_are_limited(max_rounds: int) -> None:
    left = iter(EXAMPLES[3:])
    examples, rollouts, rounds = refill(
        EXAMPLES[:3],
        [rollout(e.example_id, g) for g, e in enumerate(EXAMPLES[:3])],
        num_prompts=3,
        max_rounds=max_rounds,
        count=lambda rollouts: 0,
        draw=lambda n: [next(left) for _ in range(n)],
        sample=lambda examples, first, number: [rollout(e.example_id, 0) for e in examples[first:]],
    )
    assert rounds == max_rounds and len(examples) == len(rollouts) == 3 * (1 + max_rounds)


def test_nothing_left_to_draw_ends_it() -> None:
    def sample(*args: Any) -> list[Rollout]:
        raise AssertionError("there is nothing to sample")

    result = refill(EXAMPLES[:2], [], num_prompts=2, max_rounds=5, count=lambda r: 0, draw=lambda n: [], sample=sample)
    assert result == (EXAMPLES[:2], [], 0)


class Ranks:
    """`all_gather_object` among threads that stand for processes."""

    def __init__(self, world_size: int) -> None:
        self.barrier, self.slots = threading.Barrier(world_size), [0] * world_size

    def total(self, rank: int, value: int) -> int:
        self.slots[rank] = value
        self.barrier.wait(timeout=20)
        total = sum(self.slots)
        self.barrier.wait(timeout=20)
        return total


def run(world_size: int, seed: int, num_steps: int = 12) -> list[list[tuple[Any, ...]]]:
    """For each rank, the prompts that its sampler drew, step by step, and its state at the end."""
    ranks, scores, results = Ranks(world_size), [{} for _ in range(num_steps)], [[] for _ in range(world_size)]

    def work(rank: int) -> None:
        rates = SolveRates([e.example_id for e in EXAMPLES], new_weight=0.7, max_age=6)
        sampler, sample = PromptSampler(EXAMPLES, rates, seed=seed, low=0.01, high=0.9), fake(rank, world_size)
        for step in range(num_steps):
            examples = sampler.next(NUM_PROMPTS)
            examples, rollouts, rounds = refill(
                examples,
                sample(examples, 0, 0),
                num_prompts=NUM_PROMPTS,
                max_rounds=2,
                count=lambda rollouts: ranks.total(rank, trained(rollouts)),
                draw=sampler.more,
                sample=sample,
            )
            scores[step] |= {r.group: (r.example_id, (r.step_rewards or (0.0,))[0]) for r in rollouts}
            ranks.total(rank, 0)  # a barrier: every rank has added its rollouts
            groups = [scores[step][g] for g in range(len(examples))]
            assert [name for name, _ in groups] == [e.example_id for e in examples]
            rates.observe(*zip(*groups, strict=True))
            results[rank].append((rounds, groups))
        results[rank].append((sampler.state_dict(), rates.state_dict()))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(len(result) == num_steps + 1 for result in results)
    return results


def test_the_prompts_and_the_state_do_not_depend_on_the_number_of_ranks() -> None:
    seed = random.randrange(10**6)
    (one,) = run(1, seed)
    assert any(rounds for rounds, _ in one[:-1])
    for world_size in (2, 4, 8):
        for rank, result in enumerate(run(world_size, seed)):
            assert result == one, (seed, world_size, rank)
    assert run(1, seed + 1)[0] != one
