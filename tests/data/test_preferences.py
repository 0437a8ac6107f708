"""Preference pairs: which responses are paired, how many pairs are drawn, and the counts."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srpo.core.batch import Rollout
from srpo.core.config.dpo import PairRules
from srpo.data.preferences import Preference, pairs_from_rollouts, read_preferences

PROMPT = (1, 2, 3)


def rollout(example: str, response: tuple[int, ...], verdict: str | None, rewards: tuple[float, ...] | None = None, **more: Any):
    last = 1.0 if verdict == "L4" else 0.0
    sample = Rollout(example, 0, PROMPT, response, (0.0,) * len(response), (1, len(response)), ("x", verdict), "", "stop", 0)
    return replace(sample, step_rewards=(0.0, last) if rewards is None else rewards, **more)


def drawn(seed: int) -> tuple[list[Rollout], dict[str, str | None]]:
    """Random responses to ten examples, some of them sampled more than once."""
    rng = random.Random(seed)
    labels: dict[str, str | None] = {f"e{i}": f"L{rng.randint(1, 4)}" for i in range(10)}
    rollouts = []
    for example in labels:
        for _ in range(rng.randint(1, 9)):
            verdict = rng.choice(["L1", "L2", "L3", "L4", None])
            number = rng.randint(0, 6)
            response = (number, 5, 0 if verdict is None else int(verdict[1]))
            rollouts.append(rollout(example, response, verdict, (0.2 * (number % 3), float(verdict == labels[example]))))
    return rollouts, labels


def key(pair: Preference) -> tuple[Any, ...]:
    return pair.example_id, pair.chosen_ids, pair.rejected_ids


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("prefer", "margin"), [("verdict", 0.0), ("total", 0.0), ("total", 0.4), ("total", 1.1)])
def test_all_pairs_are_those_of_a_double_loop(seed: int, prefer: Any, margin: float) -> None:
    rollouts, labels = drawn(seed)
    score = {
        (r.example_id, r.response_ids): float(r.answers[-1] == labels[r.example_id])
        if prefer == "verdict"
        else sum(r.step_rewards or ())
        for r in rollouts
    }
    want = {
        (example, a, b)
        for (example, a), (other, b) in itertools.permutations(score, 2)
        if example == other and round(score[example, a] - score[example, b], 6) >= max(round(margin, 6), 1e-6)
    }
    pairs, counts = pairs_from_rollouts(rollouts, labels, PairRules(prefer, margin, per_example=0))
    assert len(pairs) == len({key(pair) for pair in pairs}) == counts["num_pairs"] and {key(p) for p in pairs} == want
    assert counts["num_responses"] == len(rollouts) and counts["num_repeated"] == len(rollouts) - len(score)
    assert counts["num_prompts"] == len({r.example_id for r in rollouts})
    assert counts["num_prompts_without_pair"] == counts["num_prompts"] - len({example for example, _, _ in want})
    assert all(pair.prompt_ids == PROMPT and pair.grade == labels[pair.example_id] for pair in pairs)


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_a_fixed_part_of_all_pairs_in_whatever_order_they_come(seed: int) -> None:
    rollouts, labels = drawn(seed)
    everything = {key(p) for p in pairs_from_rollouts(rollouts, labels, PairRules(per_example=0))[0]}
    rules = PairRules(per_example=2, seed=4)
    few = {key(p) for p in pairs_from_rollouts(rollouts, labels, rules)[0]}
    shuffled = random.Random(seed).sample(rollouts, len(rollouts))
    assert {key(p) for p in pairs_from_rollouts(shuffled, labels, rules)[0]} == few
    assert few < everything
    available = Counter(example for example, _, _ in everything)
    assert Counter(example for example, _, _ in few) == {example: min(2, n) for example, n in available.items()}
    assert {key(p) for p in pairs_from_rollouts(rollouts, labels, replace(rules, seed=5))[0]} != few


def test_balance_leaves_as_many_of_each_grade() -> None:
    rollouts, labels = [], {}
    for i, grade in enumerate(["L1"] * 5 + ["L4"] * 2 + ["L2"] * 3):
        labels[f"e{i}"] = grade
        rollouts += [rollout(f"e{i}", (7,), grade), rollout(f"e{i}", (8,), "L3")]
    pairs, counts = pairs_from_rollouts(rollouts, labels, PairRules(balance=True))
    assert counts["by_grade_drawn"] == {"L1": 5, "L2": 3, "L4": 2} and counts["by_grade"] == {"L1": 2, "L2": 2, "L4": 2}
    assert counts["num_pairs_drawn"] == 10 and counts["num_pairs"] == len(pairs) == 6
    numbers = [int(pair.example_id[1:]) for pair in pairs]
    assert numbers == sorted(numbers)
    with pytest.raises(ValueError, match=r"set data, or set rules\.balance to false"):
        pairs_from_rollouts(rollouts, None, PairRules(balance=True))


def test_a_grade_without_pairs_cannot_be_balanced() -> None:
    """All responses to L3 are wrong, all to L1 right: neither has a pair, and the error names both with the counts."""
    labels: dict[str, str | None] = {"a": "L4", "b": "L4", "c": "L3", "d": "L1", "unsampled": "L2"}
    rollouts = [rollout(name, (7,), "L4") for name in "abc"] + [rollout(name, (8,), "L1") for name in "abcd"]
    assert pairs_from_rollouts(rollouts, labels, PairRules())[1]["by_grade"] == {"L4": 2}
    message = r"L1 and L3 have none \(pairs / prompts of L1: 0 / 1, L3: 0 / 1, L4: 2 / 2\): .*group_size.*rules\.balance to false"
    with pytest.raises(ValueError, match=message):
        pairs_from_rollouts(rollouts, labels, PairRules(balance=True))


def test_without_labels_the_last_step_s_reward_says_who_is_right() -> None:
    rollouts = [rollout("a", (1, 9), "L4"), rollout("a", (2, 9), "L2"), rollout("a", (3, 9), None), rollout("b", (1, 9), "L4")]
    pairs, counts = pairs_from_rollouts(rollouts, None, PairRules())
    assert {key(p) for p in pairs} == {("a", (1, 9), (2, 9)), ("a", (1, 9), (3, 9))}
    assert counts["num_prompts_without_pair"] == 1 and counts["by_grade"] == {"": 2}


def test_what_was_cut_is_never_chosen_and_what_was_aborted_never_seen() -> None:
    rollouts = [
        rollout("a", (1,), "L4", finish="length"),
        rollout("a", (2,), "L4", finish="abort"),
        rollout("a", (3,), "L1", finish="length"),
        rollout("a", (4,), "L4"),
        rollout("a", (5,), "L2"),
    ]
    pairs, counts = pairs_from_rollouts(rollouts, None, PairRules(per_example=0))
    assert {(p.chosen_ids, p.rejected_ids) for p in pairs} == {((4,), (3,)), ((4,), (5,))}
    assert counts["num_aborted"] == 1


def test_a_response_that_a_judge_has_held_both_ways_has_its_mean() -> None:
    rollouts = [rollout("a", (1,), "L4", (0.2, 0.0)), rollout("a", (1,), "L4", (0.0, 0.0)), rollout("a", (2,), "L4", (0.15, 0.0))]
    pairs, _ = pairs_from_rollouts(rollouts, None, PairRules("total"))
    assert [(p.chosen_ids, p.rejected_ids) for p in pairs] == [((2,), (1,))]


@pytest.mark.parametrize(
    ("rollouts", "labels", "rules", "message"),
    [
        ([rollout("a", (1,), "L4")], None, PairRules(), "1 responses to 1 prompts make no pair.*neither always answered right"),
        ([], None, PairRules(), "0 responses to 0 prompts make no pair"),
        ([rollout("a", (1,), "L4")], {"b": "L1"}, PairRules(), "example a of the rollouts has no grade in data"),
        ([rollout("a", (1,), "L4")], {"a": None}, PairRules(), "example a of the rollouts has no grade in data"),
        ([replace(rollout("a", (1,), "L4"), step_rewards=None)], None, PairRules(), "a have no rewards"),
        ([replace(rollout("a", (1,), "L4"), step_rewards=None)], {"a": "L4"}, PairRules("total"), "a have no rewards"),
        ([], None, PairRules(margin=-1.0), r"rules\.margin is -1\.0: set it to 0 or more"),
        ([], None, PairRules(per_example=-1), r"rules\.per_example is -1: set it to 0 or more"),
    ],
)
def test_what_makes_no_pairs_says_why(rollouts: Any, labels: Any, rules: PairRules, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_from_rollouts(rollouts, labels, rules)


GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}'


def test_a_file_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(GOOD + "\n" + '{"prompt": "\\u00e9", "chosen": "c", "rejected": "d", "by": "x"}\n')
    assert list(read_preferences(tmp_path / "pairs.jsonl")) == [("p", "a", "b"), ("\u00e9", "c", "d")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON list, not an object"),
        ('{"prompt": "p", "chosen": "a"}', "rejected"),
        ('{"prompt": "", "chosen": "a", "rejected": "b"}', 'prompt is "": write .* with texts that are not empty'),
        ('{"prompt": "p", "chosen": "a", "rejected": 3}', "rejected is 3: write .* with texts that are not empty"),
        ('{"prompt": "p", "chosen": "a", "rejected": "a"}', "the same text: remove the line"),
    ],
)
def test_a_malformed_pair_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 2: .*{message}"):
        list(read_preferences(tmp_path / "pairs.jsonl"))


def test_no_pairs_in_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(ValueError, match="has no pairs"):
        list(read_preferences(tmp_path / "pairs.jsonl"))
