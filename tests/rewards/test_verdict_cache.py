"""srpo.rewards.verdict_cache: least recently used entries are evicted; work is counted."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from srpo.rewards.verdict_cache import VerdictCache, WorkCounts, question_key, work_metrics
from srpo.rollout.engine import SamplingParams


def test_what_was_asked_for_longest_ago_makes_room() -> None:
    cache, model = VerdictCache(8), dict[bytes, tuple[bool, ...]]()  # `model` is a dict in the order of use
    rng = random.Random(seed := random.randrange(2**32))
    for _ in range(2000):
        key = bytes([rng.randrange(20)])
        assert cache.get(key) == model.get(key), seed
        if key in model:
            model[key] = model.pop(key)
        elif rng.random() < 0.7:
            model[key] = (rng.random() < 0.5,)
            cache.put(key, model[key])
            if len(model) > 8:
                del model[next(iter(model))]
        assert len(cache) == len(model), seed


def test_a_cache_of_nothing_remembers_nothing() -> None:
    cache = VerdictCache(0)
    cache.put(b"x", (True,))
    assert cache.get(b"x") is None and len(cache) == 0
    with pytest.raises(ValueError, match=r"reward\.judge_cache is -1"):
        VerdictCache(-1)


def test_threads_share_a_cache() -> None:
    cache = VerdictCache(50)

    def work(number: int) -> bool:
        rng = random.Random(number)
        for _ in range(2000):
            key = rng.randrange(100)
            verdicts = cache.get(bytes([key]))
            if verdicts is not None and verdicts != (key % 2 == 0,):
                return False
            cache.put(bytes([key]), (key % 2 == 0,))
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))
    assert len(cache) == 50


def test_questions_differ_in_whatever_the_answer_depends_on() -> None:
    greedy = SamplingParams(8, group_size=1, greedy=True)
    questions = [
        ("a", greedy, 0, "prompt"),
        ("b", greedy, 0, "prompt"),
        ("a", SamplingParams(9, group_size=1, greedy=True), 0, "prompt"),
        ("a", greedy, 1, "prompt"),
        ("a", greedy, 0, "prompt\ud800"),
        ("a", greedy, 0, "prompt\\ud800"),
        ("a', ", greedy, 0, "prompt"),
    ]
    keys = [question_key(*question) for question in questions]
    assert len(set(keys)) == len(keys) and keys == [question_key(*question) for question in questions]
    assert {len(key) for key in keys} == {16}


def test_work_side_by_side_is_counted_once() -> None:
    work = WorkCounts()
    together = threading.Barrier(4)

    def busy(_: int) -> None:
        together.wait()
        with work.busy():
            work.add(num_calls=2)
            time.sleep(0.4)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(busy, range(4)))
    taken = work.take()
    assert taken["num_calls"] == 8 and 0.4 <= taken["busy_s"] < 1.5
    assert work.take() == {"busy_s": 0.0}


def test_metrics_of_all_ranks() -> None:
    shares = [
        {"num_calls": 6, "num_retries": 1, "num_asked": 6, "num_responses": 10, "busy_s": 2.0},
        {"num_calls": 4, "num_failed": 3, "num_asked": 4, "num_responses": 10, "busy_s": 3.0},
    ]
    assert work_metrics(shares) == {
        "service/num_calls": 10,
        "service/num_retries": 1,
        "service/num_failed": 3,
        "service/num_too_long": 0,
        "service/num_no_text": 0,
        "service/cache_hit_frac": 0.5,
        "service/busy_s": 3.0,
    }
    assert "service/cache_hit_frac" not in work_metrics([{"busy_s": 0.0}])
