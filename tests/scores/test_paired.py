from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from judged_pairs import flat, random_examples, random_rollouts, slow_interval, slow_scores
from scipy.stats import binomtest

from srpo.core.config.evaluation import BootstrapConfig
from srpo.core.step_presets import PAPER
from srpo.scores.paired import compare_systems, mcnemar, sign_test, summarized

SCHEMA = PAPER


@pytest.mark.parametrize("seed", range(10))
def test_differences_equal_those_of_resampled_rows(seed: int):
    """Plain Python and scikit-learn score both systems on the same resampled rows."""
    rng = random.Random(seed)
    examples = random_examples(rng, rng.randint(2, 30), rng.choice([1, 3, 10]))
    system_a, system_b = random_rollouts(rng, examples), random_rollouts(rng, examples)
    settings = BootstrapConfig(num_draws=20, level=0.9, seed=seed)
    results = compare_systems(system_a, system_b, examples, SCHEMA, bootstrap=settings)

    queries = list(dict.fromkeys(example.query_id for example in examples))
    generator = np.random.default_rng(seed)
    draws = [list(range(len(examples)))]
    for _ in range(settings.num_draws if len(queries) > 1 else 0):
        drawn = generator.integers(len(queries), size=len(queries))
        draws.append([i for c in drawn for i, example in enumerate(examples) if example.query_id == queries[c]])
    expected: dict[str, list[Any]] = {}
    for rows in draws:
        chosen = [examples[i] for i in rows]
        a, b = (flat(slow_scores([rollouts[i] for i in rows], chosen, examples)) for rollouts in (system_a, system_b))
        for key in a:
            known = a[key] is not None and b[key] is not None
            expected.setdefault(key, []).append(b[key] - a[key] if known else None)  # pyright: ignore[reportOperatorIssue]
    summaries = flat(results["difference"])
    assert summaries.keys() == expected.keys()
    for key, (difference, *rest) in expected.items():
        if difference is None:
            assert summaries[key] is None
            continue
        known = [value for value in rest if value is not None]
        shares: list[Any] = [None, None]
        if known:
            shares = [sum(v > 1e-12 for v in known) / len(known), sum(abs(v) < 1e-12 for v in known) / len(known)]
        interval = slow_interval(known, 0.9)
        summary: Any = summaries[key]
        assert summary["difference"] == pytest.approx(difference), key
        assert summary["interval"] == (interval and pytest.approx(interval)), key
        assert [summary["b_higher_frac"], summary["equal_frac"]] == (pytest.approx(shares) if known else shares), key
    json.dumps(results, allow_nan=False)


def test_a_system_equals_itself_and_changing_sides_changes_signs():
    rng = random.Random(0)
    examples = random_examples(rng, 400, 40)
    a = random_rollouts(rng, examples)
    b = [rng.choice(random_rollouts(rng, [e])) if rng.random() < 0.02 else r for e, r in zip(examples, a, strict=True)]
    settings = BootstrapConfig(num_draws=200)
    same = compare_systems(a, a, examples, SCHEMA, bootstrap=settings)
    assert all(s is None or (s["interval"], s["equal_frac"]) == ([0.0, 0.0], 1.0) for s in flat(same["difference"]).values())  # type: ignore
    assert same["mcnemar"] == {"num_only_a_right": 0, "num_only_b_right": 0, "p_value": 1.0}
    ab, ba = (compare_systems(x, y, examples, SCHEMA, bootstrap=settings)["difference"]["macro_f1"] for x, y in ((a, b), (b, a)))
    assert ab["interval"] == pytest.approx([-end for end in reversed(ba["interval"])])
    assert ab["b_higher_frac"] == pytest.approx(1 - ba["b_higher_frac"] - ba["equal_frac"])


def test_parts_are_compared_on_their_own():
    rng = random.Random(1)
    examples = random_examples(rng, 60, 15)
    a, b = (random_rollouts(rng, examples) for _ in range(2))
    settings = BootstrapConfig(num_draws=30)
    results = compare_systems(a, b, examples, SCHEMA, bootstrap=settings)
    rows = [i for i, example in enumerate(examples) if example.tags.get("query_type") == "plain"]
    chosen = [examples[i] for i in rows]
    alone = compare_systems([a[i] for i in rows], [b[i] for i in rows], chosen, SCHEMA, by=(), bootstrap=settings)
    assert results["by"]["query_type"]["plain"] == {key: alone[key] for key in alone if key != "by"}
    assert alone["num_examples"] == len(rows)


@pytest.mark.parametrize("seed", range(30))
def test_mcnemar_equals_an_exact_binomial_test(seed: int):
    rng = np.random.default_rng(seed)
    right_a, right_b = (rng.random(rng.integers(1, 60)) < p for p in rng.random(2))
    right_b = np.resize(right_b, right_a.shape)
    only_a = sum(a and not b for a, b in zip(right_a, right_b, strict=True))
    only_b = sum(b and not a for a, b in zip(right_a, right_b, strict=True))
    expected = binomtest(int(only_a), int(only_a + only_b)).pvalue if only_a + only_b else 1.0
    result = mcnemar(right_a, right_b)
    assert (result["num_only_a_right"], result["num_only_b_right"]) == (only_a, only_b)
    assert result["p_value"] == pytest.approx(expected)


def test_sign_test_of_hand_worked_and_of_large_counts():
    assert sign_test(0, 0) == 1.0
    assert sign_test(0, 5) == 2 / 32
    assert sign_test(1, 5) == sign_test(5, 1) == 2 * (1 + 6) / 64
    assert sign_test(3, 3) == 1.0
    assert sign_test(4900, 5100) == pytest.approx(binomtest(4900, 10_000).pvalue)
    assert sign_test(0, 3000) == 0.0  # smaller than the smallest float


def test_a_difference_that_is_not_known_has_no_summary():
    assert summarized(float("nan"), np.array([0.1]), 0.95) is None
    assert summarized(0.5, np.zeros(0), 0.95) == {"difference": 0.5, "interval": None, "b_higher_frac": None, "equal_frac": None}


def test_systems_must_answer_the_same_graded_pairs():
    rng = random.Random(2)
    examples = random_examples(rng, 4, 2)
    rollouts = random_rollouts(rng, examples)
    for a, b, pairs in ((rollouts, rollouts[:3], examples), (rollouts[::-1], rollouts, examples), ([], [], [])):
        with pytest.raises(ValueError, match="the same pairs"):
            compare_systems(a, b, pairs, SCHEMA)
