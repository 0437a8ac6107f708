"""Which prompts are drawn: even strata, the moving difficulty window, exact resumption."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from srpo.data.examples import Example
from srpo.data.sampler import PromptSampler, in_window


def make(num: int, kinds: str = "ab") -> list[Example]:
    """Examples e0, e1, ... whose tag `kind` goes round `kinds`."""
    return [
        Example(f"e{i}", f"q{i}", "query", "title", gold=(None,) * 4 + (f"L{i % 4 + 1}",), tags={"kind": kinds[i % len(kinds)]})
        for i in range(num)
    ]


def sampler(examples: list[Example], **options) -> PromptSampler:
    return PromptSampler(examples, **{"seed": 0, "low": 0.01, "high": 0.9, **options})


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


def test_a_batch_across_epochs_repeats_nothing():
    drawn = sampler(make(7))
    counts = Counter[str]()
    for _ in range(70):
        batch = ids(drawn.next(5))
        assert len(set(batch)) == 5
        counts.update(batch)
    assert min(counts.values()) > 30 and max(counts.values()) < 70  # 350 draws of 7


def test_more_prompts_than_examples():
    with pytest.raises(ValueError, match=r"5 different prompts .* there are 4: lower rollout.num_prompts"):
        sampler(make(4)).next(5)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_balance_is_exact_in_each_batch_and_over_time(n):
    drawn = sampler(make(30, "a" * 22 + "bbb" + "ccccc"), balance="kind")
    total = Counter({"a": 0, "b": 0, "c": 0})
    for _ in range(12):
        batch = drawn.next(n)
        counts = Counter(example.tags["kind"] for example in batch)
        assert all(n // 3 <= counts[kind] <= -(-n // 3) for kind in "abc")
        assert len(set(ids(batch))) == n
        total.update(counts)
    assert max(total.values()) - min(total.values()) <= 1


def test_balanced_batches_are_interleaved_for_the_ranks():
    batch = sampler(make(40, "abcd"), balance="kind").next(16)
    for rank in range(4):
        assert Counter(example.tags["kind"] for example in batch[4 * rank : 4 * rank + 4]) == dict.fromkeys("abcd", 1)


def test_a_small_stratum_gives_what_it_has():
    examples = make(41, "a" * 20 + "b" * 20 + "c")
    batch = sampler(examples, balance="kind").next(13)
    assert sorted(Counter(example.tags["kind"] for example in batch).items()) == [("a", 6), ("b", 6), ("c", 1)]


def test_balance_by_grade_needs_no_tag_and_other_tags_do():
    batch = sampler(make(40), balance="grade").next(8)
    assert Counter(example.grade for example in batch) == {1: 2, 2: 2, 3: 2, 4: 2}
    with pytest.raises(ValueError, match=r"'domain' and 40 of 40 examples lack that tag, first e0 \(its tags: kind\)"):
        sampler(make(40), balance="domain")


def test_examples_outside_the_window_sit_out_and_come_back():
    drawn = sampler(make(6), revisit_epochs=2)
    drawn.next(6)
    drawn.observe([f"e{i}" for i in range(6)], [0.0, 0.95, 0.5, 0.5, 0.01, 0.9])
    assert drawn.stats() == {"num_unseen": 0, "num_too_hard": 2, "num_in_window": 2, "num_too_easy": 2}
    for _ in range(2):  # two epochs of the two that are left
        assert sorted(ids(drawn.next(2))) == ["e2", "e3"]
    assert sorted(ids(drawn.next(6))) == [f"e{i}" for i in range(6)]


def test_a_new_score_brings_an_example_back_for_good():
    drawn = sampler(make(4), revisit_epochs=1)
    drawn.next(4)
    drawn.observe(["e0", "e1", "e2", "e3"], [0.0, 0.5, 0.5, 0.5])
    assert "e0" not in ids(drawn.next(3))
    assert "e0" in ids(drawn.next(4))
    drawn.observe(["e0"], [0.4])
    for _ in range(3):
        assert "e0" in ids(drawn.next(4))


def test_scores_before_the_first_draw_are_offline_rejection():
    drawn = sampler(make(10))
    drawn.observe(["e1", "e2", "e3"], [1.0, 1.0, 0.0])
    assert {"e1", "e2", "e3"}.isdisjoint(ids(drawn.next(7)))


def test_a_filtered_stratum_leaves_its_share_to_the_others():
    examples = make(60, "abc")
    drawn = sampler(examples, balance="kind", revisit_epochs=5)
    drawn.observe([e.example_id for e in examples if e.tags["kind"] == "b"], [1.0] * 20)
    counts = Counter(example.tags["kind"] for example in drawn.next(12))
    assert counts == {"a": 6, "c": 6}


def test_too_few_in_the_window_are_filled_up_without_repeats():
    drawn = sampler(make(10), revisit_epochs=3)
    drawn.observe([f"e{i}" for i in range(8)], [1.0] * 8)
    batch = ids(drawn.next(6))
    assert len(set(batch)) == 6 and {"e8", "e9"} <= set(batch)


def test_nothing_in_the_window_says_how_many_and_what_to_do():
    drawn = sampler(make(5))
    drawn.next(5)
    drawn.observe([f"e{i}" for i in range(5)], [0.0, 0.0, 0.005, 0.95, 1.0])
    with pytest.raises(ValueError, match=r"all 5 examples are outside .*2 too easy, 3 too hard.*lower sampler.difficulty_low"):
        drawn.next(1)
    drawn.observe(["e0", "e1"], [0.9, 0.9])
    with pytest.raises(ValueError, match=r"4 too easy, 1 too hard.*raise sampler.difficulty_high"):
        drawn.next(1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("balance", ["", "kind"])
def test_resuming_anywhere_continues_the_same_sequence(seed, balance):
    rng = random.Random(seed)
    examples = make(rng.randint(12, 40), "aaabbc")

    def play(drawn: PromptSampler, num_batches: int, scores: random.Random) -> list[list[str]]:
        played = []
        for _ in range(num_batches):
            batch = ids(drawn.next(7))
            drawn.observe(batch, [scores.choice([0.0, 0.3, 0.6, 1.0]) for _ in batch])
            played.append(batch)
        return played

    scores = random.Random(seed)
    whole = sampler(examples, seed=seed, balance=balance, revisit_epochs=1)
    play(whole, rng.randint(0, 9), scores)
    saved, scores_saved = json.dumps(whole.state_dict()), scores.getstate()
    expected = play(whole, 10, scores)
    resumed = sampler(examples, seed=seed, balance=balance, revisit_epochs=1)
    resumed.load_state_dict(json.loads(saved))
    scores.setstate(scores_saved)
    assert play(resumed, 10, scores) == expected
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    "other",
    [sampler(make(9)), sampler(make(10), seed=1), sampler(make(10), balance="kind"), sampler(make(10)[::-1])],
    ids=["data", "seed", "balance", "order"],
)
def test_the_state_of_another_run_is_refused(other):
    with pytest.raises(ValueError, match="other training data"):
        sampler(make(10)).load_state_dict(other.state_dict())


def test_bad_arguments():
    with pytest.raises(ValueError, match="no examples"):
        sampler([])
    with pytest.raises(ValueError, match="'e0' occurs more than once"):
        sampler(make(3) + make(1))
    with pytest.raises(ValueError, match=r"between 0\.9 and 0\.9"):
        sampler(make(3), low=0.9)
    with pytest.raises(ValueError, match="'x' is not in this sampler"):
        sampler(make(3)).observe(["x"], [0.5])
    with pytest.raises(ValueError, match="score of e1 is nan"):
        sampler(make(3)).observe(["e1"], [float("nan")])
