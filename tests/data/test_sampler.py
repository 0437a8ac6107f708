"""The sampler: even strata, epochs, the moving difficulty window, exact resumption."""

from __future__ import annotations

import io
import json
import random
import time
from collections import Counter
from itertools import product

import pytest
import torch

from srpo.data.examples import Example
from srpo.data.sampler import PromptSampler, in_window
from srpo.data.solve_rates import SolveRates


def make(num: int, kinds: str = "ab") -> list[Example]:
    """Examples e0, e1, ... whose tag `kind` cycles through `kinds`."""
    return [
        Example(f"e{i}", f"q{i}", "query", "title", gold=(None,) * 4 + (f"L{i % 4 + 1}",), tags={"kind": kinds[i % len(kinds)]})
        for i in range(num)
    ]


def sampler(examples: list[Example], *, max_age: int = 10, new_weight: float = 1.0, **options) -> PromptSampler:
    rates = SolveRates([example.example_id for example in examples], new_weight=new_weight, max_age=max_age)
    return PromptSampler(examples, rates, **{"seed": 0, "low": 0.01, "high": 0.9, **options})


def rates_of(drawn: PromptSampler) -> SolveRates:
    return drawn._rates


def observe(drawn: PromptSampler, example_ids: list[str], scores: list[float]) -> None:
    rates_of(drawn).observe(example_ids, scores)


def ids(batch: list[Example]) -> list[str]:
    return [example.example_id for example in batch]


def test_the_window_is_strict():
    assert in_window([0.0, 0.01, 0.0101, 0.5, 0.8999, 0.9, 1.0, float("nan")], 0.01, 0.9) == [
        False, False, True, True, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("n", [1, 3, 4, 12])
def test_an_epoch_draws_every_example_once(n):
    drawn = sampler(make(12))
    for _ in range(3):
        epoch = [i for _ in range(12 // n) for i in ids(drawn.next(n))]
        assert sorted(epoch) == sorted(ids(make(12)))


def test_epochs_and_seeds_differ_and_runs_repeat():
    one, same, other = sampler(make(50)), sampler(make(50)), sampler(make(50), seed=1)
    first, second = ids(one.next(50)), ids(one.next(50))
    assert first != second
    assert [ids(same.next(50)), ids(same.next(50))] == [first, second]
    assert ids(other.next(50)) != first


@pytest.mark.parametrize(("size", "n"), [(7, 5), (7, 6), (7, 7), (10, 3), (13, 8)])
def test_a_batch_across_epochs_repeats_nothing_and_leaves_nobody_out(size, n):
    """At any position in an epoch, the numbers of visits of two examples differ by at most two."""
    seed = random.randrange(10**6)
    drawn, counts = sampler(make(size), seed=seed), Counter(dict.fromkeys(ids(make(size)), 0))
    for _ in range(size * 3):
        batch = ids(drawn.next(n))
        assert len(set(batch)) == n
        counts.update(batch)
        assert max(counts.values()) - min(counts.values()) <= 2, seed
    assert max(counts.values()) - min(counts.values()) <= 1  # full epochs: all deferred examples were deferred by the last batch


def test_more_prompts_than_examples():
    with pytest.raises(ValueError, match=r"needs 5 different prompts and the data has 4: lower rollout.num_prompts"):
        sampler(make(4)).next(5)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_balance_is_exact_in_each_batch_and_over_time(n):
    drawn = sampler(make(30, "a" * 22 + "bbb" + "ccccc"), balance=["kind"])
    total = Counter({"a": 0, "b": 0, "c": 0})
    for _ in range(12):
        batch = drawn.next(n)
        counts = Counter(example.tags["kind"] for example in batch)
        assert all(n // 3 <= counts[kind] <= -(-n // 3) for kind in "abc")
        assert len(set(ids(batch))) == n
        total.update(counts)
    assert max(total.values()) - min(total.values()) <= 1


def test_balanced_batches_are_interleaved_for_the_ranks():
    batch = sampler(make(40, "abcd"), balance=["kind"]).next(16)
    for rank in range(4):
        assert Counter(example.tags["kind"] for example in batch[4 * rank : 4 * rank + 4]) == dict.fromkeys("abcd", 1)


def test_a_small_stratum_gives_what_it_has():
    examples = make(41, "a" * 20 + "b" * 20 + "c")
    batch = sampler(examples, balance=["kind"]).next(13)
    assert sorted(Counter(example.tags["kind"] for example in batch).items()) == [("a", 6), ("b", 6), ("c", 1)]


def test_balance_by_grade_needs_no_tag_and_other_tags_do():
    batch = sampler(make(40), balance=["grade"]).next(8)
    assert Counter(example.grade for example in batch) == {"L1": 2, "L2": 2, "L3": 2, "L4": 2}
    with pytest.raises(ValueError, match=r"sampler.balance: example e0 has no tag 'domain' \(its tags: grade, kind\)"):
        sampler(make(40), balance=["domain"])


def test_two_tags_make_a_stratum_of_each_combination():
    rng = random.Random(0)
    tags = [("a", "x")] * 40 + [("a", "y")] * 5 + [("b", "x")] * 9 + [("b", "y")] * 46
    rng.shuffle(tags)
    examples = [Example(f"e{i}", "q", "query", "title", tags={"kind": k, "area": a}) for i, (k, a) in enumerate(tags)]
    drawn, total = sampler(examples, balance=("kind", "area")), Counter(dict.fromkeys(product("ab", "xy"), 0))
    for _ in range(9):
        counts = Counter((e.tags["kind"], e.tags["area"]) for e in drawn.next(6))
        assert all(1 <= counts[cell] <= 2 for cell in product("ab", "xy"))
        total.update(counts)
    assert max(total.values()) - min(total.values()) <= 1


def test_examples_outside_the_window_sit_out_until_they_have_aged():
    drawn = sampler(make(6), max_age=3)
    drawn.next(6)  # step 1
    observe(drawn, [f"e{i}" for i in range(6)], [0.0, 0.95, 0.5, 0.5, 0.01, 0.9])
    stats = {"num_unseen": 0, "num_too_hard": 2, "num_in_window": 2, "num_too_easy": 2, "num_skipped": 4}
    assert drawn.stats() == stats
    for _ in range(2):  # steps 2 and 3
        assert sorted(ids(drawn.next(2))) == ["e2", "e3"]
    assert drawn.stats() == stats
    assert sorted(ids(drawn.next(6))) == [f"e{i}" for i in range(6)]  # 3 steps after their score
    assert drawn.stats()["num_skipped"] == 0 and drawn.num_early == 0


def test_max_age_0_skips_nobody():
    drawn = sampler(make(6), max_age=0)
    for _ in range(3):
        assert sorted(ids(drawn.next(6))) == [f"e{i}" for i in range(6)]
        observe(drawn, [f"e{i}" for i in range(6)], [0.0] * 6)


def test_a_new_score_brings_an_example_back_for_good():
    drawn = sampler(make(4), max_age=2)
    drawn.next(4)
    observe(drawn, ["e0", "e1", "e2", "e3"], [0.0, 0.5, 0.5, 0.5])
    assert "e0" not in ids(drawn.next(3))
    assert "e0" in ids(drawn.next(4))
    observe(drawn, ["e0"], [0.4])
    for _ in range(3):
        assert "e0" in ids(drawn.next(4))


def test_the_window_moves_with_the_policy():
    """The draws follow a policy that learns one example after another."""
    drawn, solved = sampler(make(40), max_age=1000), [0.0] * 40
    drawn.next(40)
    observe(drawn, ids(make(40)), solved)
    seen = []
    for step in range(0, 40, 4):
        observe(drawn, [f"e{i}" for i in range(step, step + 4)], [0.5] * 4)  # now in the window
        seen.append(sorted(drawn.next(4), key=lambda e: int(e.example_id[1:])))
        observe(drawn, [f"e{i}" for i in range(step, step + 4)], [1.0] * 4)  # now too easy
    assert [ids(batch) for batch in seen] == [[f"e{i}" for i in range(s, s + 4)] for s in range(0, 40, 4)]


def test_scores_before_the_first_draw_are_offline_rejection():
    drawn = sampler(make(10))
    observe(drawn, ["e1", "e2", "e3"], [1.0, 1.0, 0.0])
    assert {"e1", "e2", "e3"}.isdisjoint(ids(drawn.next(7)))


def test_a_filtered_stratum_leaves_its_share_to_the_others():
    examples = make(60, "abc")
    drawn = sampler(examples, balance=["kind"])
    observe(drawn, [e.example_id for e in examples if e.tags["kind"] == "b"], [1.0] * 20)
    counts = Counter(example.tags["kind"] for example in drawn.next(12))
    assert counts == {"a": 6, "c": 6}


def test_too_few_in_the_window_are_filled_up_with_those_scored_longest_ago():
    drawn = sampler(make(10), max_age=100)
    observe(drawn, [f"e{i}" for i in range(4, 8)], [1.0] * 4)
    drawn.next(1)
    observe(drawn, [f"e{i}" for i in range(4)], [1.0] * 4)
    assert drawn.num_early == 0
    batch = ids(drawn.next(5))
    assert set(batch) == {"e8", "e9", "e4", "e5", "e6"} and drawn.num_early == 3
    assert drawn.more(4) == []  # only next() draws early


def test_more_prompts_for_a_step_are_new_even_and_in_the_window():
    examples = make(90, "abc")
    drawn = sampler(examples, balance=["kind"])
    observe(drawn, [f"e{i}" for i in range(30)], [1.0] * 30)
    step = drawn.next(7)
    for n in (1, 5, 8, 3):
        step += drawn.more(n)
        counts = Counter(e.tags["kind"] for e in step)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len(set(ids(step))) == len(step) == 24 and {f"e{i}" for i in range(30)}.isdisjoint(ids(step))
    rest = drawn.more(1000)
    assert len(rest) == 60 - 24 and drawn.more(1) == []
    assert rates_of(drawn).step == 1
    assert len(drawn.next(24)) == 24


def test_nothing_in_the_window_says_how_many_and_what_to_do():
    drawn = sampler(make(5))
    drawn.next(5)
    observe(drawn, [f"e{i}" for i in range(5)], [0.0, 0.0, 0.005, 0.95, 1.0])
    with pytest.raises(ValueError, match=r"all 5 examples are outside .*2 too easy and 3 too hard.*lower sampler.difficulty_low"):
        drawn.next(1)
    observe(drawn, ["e0", "e1"], [0.9, 0.9])
    with pytest.raises(ValueError, match=r"4 too easy and 1 too hard.*raise sampler.difficulty_high"):
        drawn.next(1)


def test_metrics_by_hand():
    drawn = sampler(make(10), max_age=5)
    assert drawn.metrics() == {"sampler/coverage_frac": 0.0, "sampler/num_skipped": 0, "sampler/num_early": 0}
    drawn.next(4)
    observe(drawn, ["e0", "e1", "e2", "e3"], [0.0, 0.5, 0.6, 1.0])
    assert drawn.metrics() == {
        "sampler/in_window_frac": 0.5, "sampler/coverage_frac": 0.4, "sampler/num_skipped": 2, "sampler/num_early": 0,
    }  # fmt: skip


class Plain:
    """A slow reference sampler: one stratum, one example at a time."""

    def __init__(self, names: list[str], orders: list[list[str]], max_age: int):
        self.names, self.orders, self.max_age = names, orders, max_age
        self.score: dict[str, tuple[float, int]] = {}
        self.step, self.queue, self.deferred = 0, list(orders[0]), list[str]()
        self.epoch = 0

    def skipped(self, name: str) -> bool:
        score, at = self.score.get(name, (0.5, 0))
        return not 0.01 < score < 0.9 and self.step - at < self.max_age

    def next(self, n: int) -> list[str]:
        self.step += 1
        batch: list[str] = []
        self.deferred = [name for name in self.deferred if not self.skipped(name)]
        batch, self.deferred = self.deferred[:n], self.deferred[n:]
        while len(batch) < n and any(not self.skipped(name) and name not in batch for name in self.names):
            if not self.queue:
                self.epoch += 1
                self.queue = list(self.orders[self.epoch])
            name = self.queue.pop(0)
            if name in batch:
                self.deferred.append(name)
            elif not self.skipped(name):
                batch.append(name)
        left = [name for name in self.names if name not in batch]
        return batch + sorted(left, key=lambda name: self.score.get(name, (0, -1))[1])[: n - len(batch)]


def test_it_draws_what_the_slow_way_draws():
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    for _ in range(20):
        examples, max_age = make(rng.randint(5, 40)), rng.randint(0, 12)
        n, endless = rng.randint(1, 5), sampler(examples, seed=seed)
        orders = [ids(endless.next(len(examples))) for _ in range(60)]
        drawn, plain = sampler(examples, seed=seed, max_age=max_age), Plain(ids(examples), orders, max_age)
        for _ in range(30):
            batch = ids(drawn.next(n))
            assert batch == plain.next(n), seed
            scores = [rng.choice([0.0, 0.5, 0.5, 1.0]) for _ in batch]
            if all(plain.skipped(e) for e in ids(examples) if e not in batch):
                scores = [0.5] * n
            observe(drawn, batch, scores)
            plain.score |= {name: (score, plain.step) for name, score in zip(batch, scores, strict=True)}


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state))


def through_torch(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("balance", [(), ("kind",), ("grade", "kind")])
@pytest.mark.parametrize("through", [through_json, through_torch])
def test_resuming_anywhere_continues_the_same_sequence(balance, through):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    examples = make(rng.randint(12, 40), "aaabbc")
    options = {"seed": seed, "balance": balance, "max_age": rng.randint(2, 9), "new_weight": 0.4}

    def play(drawn: PromptSampler, num_steps: int, scores: random.Random) -> list[list[str]]:
        played = []
        for _ in range(num_steps):
            batch = ids(drawn.next(5)) + ids(drawn.more(scores.randint(0, 3)))
            observe(drawn, batch, [scores.choice([0.0, 0.3, 0.3, 0.6, 1.0]) for _ in batch])
            played.append(batch)
        return played

    scores = random.Random(seed)
    full = sampler(examples, **options)
    play(full, rng.randint(0, 9), scores)
    if rng.random() < 0.5:  # in the middle of a step
        full.next(5)
    saved, scores_saved = through({"sampler": full.state_dict(), "rates": rates_of(full).state_dict()}), scores.getstate()
    expected = [ids(full.more(2)), *play(full, 10, scores)]
    resumed = sampler(examples, **options)
    resumed.load_state_dict(saved["sampler"])
    rates_of(resumed).load_state_dict(saved["rates"])
    scores.setstate(scores_saved)
    assert [ids(resumed.more(2)), *play(resumed, 10, scores)] == expected, seed
    assert resumed.state_dict() == full.state_dict() and rates_of(resumed).state_dict() == rates_of(full).state_dict()


def test_a_step_does_not_loop_over_the_examples():
    """The bound is ten times the measured time; a Python loop over 100,000 examples would exceed it."""
    examples = make(100_000, "abcd")
    drawn = sampler(examples, max_age=1000)
    rng = random.Random(0)
    observe(drawn, [f"e{i}" for i in range(90_000)], [rng.choice([0.0, 1.0, 0.99]) for _ in range(90_000)])
    start = time.process_time()
    for _ in range(5):
        batch = ids(drawn.next(64) + drawn.more(20))
        observe(drawn, batch, [0.5] * len(batch))
        drawn.metrics()
    assert (time.process_time() - start) / 5 < 0.05


@pytest.mark.parametrize(
    "other",
    [sampler(make(9)), sampler(make(10), seed=1), sampler(make(10), balance=["kind"]), sampler(make(10)[::-1])],
    ids=["data", "seed", "balance", "order"],
)
def test_the_state_of_another_run_is_refused(other):
    with pytest.raises(ValueError, match="other training data"):
        sampler(make(10)).load_state_dict(other.state_dict())


def test_bad_arguments():
    with pytest.raises(ValueError, match="no examples"):
        sampler([])
    with pytest.raises(ValueError, match="'e0' occurs more than once: give every pair its own"):
        sampler(make(3) + make(1))
    with pytest.raises(ValueError, match=r"between 0\.9 and 0\.9"):
        sampler(make(3), low=0.9)
    with pytest.raises(ValueError, match="'x' is not in this sampler"):
        observe(sampler(make(3)), ["x"], [0.5])
    with pytest.raises(ValueError, match="score of e1 is nan"):
        observe(sampler(make(3)), ["e1"], [float("nan")])
    with pytest.raises(ValueError, match=r"sampler.new_weight is 0: set it above 0"):
        sampler(make(3), new_weight=0)
    with pytest.raises(ValueError, match=r"sampler.max_age is -1"):
        sampler(make(3), max_age=-1)


def test_what_is_put_back_comes_first_in_the_next_step_and_once_in_the_epoch():
    drawn = sampler(make(24), balance=("kind",))
    first = drawn.next(8)
    back = [first[5], first[2]]
    drawn.put_back(back)
    again = sampler(make(24), balance=("kind",))
    again.next(8)
    again._rates.load_state_dict(drawn._rates.state_dict())
    again.load_state_dict(json.loads(json.dumps(drawn.state_dict())))  # the state includes the examples that were put back
    assert not {e.example_id for e in drawn.more(8)} & set(ids(first))  # already drawn in this step
    second = again.next(8)
    assert set(ids(back)) <= set(ids(second)) and len(set(ids(second))) == 8
    third = again.next(8)
    rest = again.next(2)
    assert sorted(ids(first) + ids(second) + ids(third) + ids(rest)) == sorted(ids(make(24)) + ids(back))


def test_what_is_put_back_waits_in_its_stratum_and_not_twice():
    drawn = sampler(make(12), balance=("kind",))
    batch = drawn.next(4)
    drawn.put_back(batch[:2])
    drawn.put_back(batch[:2])
    drawn.put_back([])
    second = drawn.next(4)
    kinds = Counter(e.tags["kind"] for e in second)
    assert set(ids(batch[:2])) <= set(ids(second)) and kinds == {"a": 2, "b": 2}
