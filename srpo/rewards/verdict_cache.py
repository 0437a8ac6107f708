"""Verdicts that a generative judge has given before, and a count of the work that they did not save."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Told = tuple[bool | None, ...]  # [J], None where the judge did not say


class VerdictCache:
    """The last `max_entries` different questions with their verdicts; of any thread. 0 entries: it remembers nothing.

    A question is (judge, decoding parameters, prompt with its template filled in): whatever a greedy judge's answer depends on.
    Groups of GRPO repeat responses, within a step and between steps. About 300 bytes per entry; nothing is written to disk, so a
    run that is resumed asks again.
    """

    def __init__(self, max_entries: int) -> None:
        if max_entries < 0:
            raise ValueError(f"reward.judge_cache is {max_entries}: set it to 0 (none) or more")
        self.max_entries = max_entries
        self._told: OrderedDict[bytes, Told] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._told)

    def get(self, key: bytes) -> Told | None:
        """What was put under `key`, if it is still there; it is then the youngest."""
        with self._lock:
            if key not in self._told:
                return None
            self._told.move_to_end(key)
            return self._told[key]

    def put(self, key: bytes, told: Told) -> None:
        """Remember verdicts; the entries that were asked for longest ago make room."""
        with self._lock:
            self._told[key] = told
            self._told.move_to_end(key)
            while len(self._told) > self.max_entries:
                self._told.popitem(last=False)


def question_key(identity: str, params: Any, seed: int, prompt: str) -> bytes:
    """16 bytes of a question; equal questions alone have equal ones."""
    return hashlib.blake2b(repr((identity, params, seed, prompt)).encode("utf-8", "backslashreplace"), digest_size=16).digest()


class WorkCounts:
    """Counts, and the seconds in which at least one thread was at work; of any thread. `take` begins again at nothing."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._num_busy, self._since, self._busy_s = 0, 0.0, 0.0

    def add(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Time in here is work; of threads that work side by side it counts once."""
        with self._lock:
            if not self._num_busy:
                self._since = time.perf_counter()
            self._num_busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_busy -= 1
                if not self._num_busy:
                    self._busy_s += time.perf_counter() - self._since

    def take(self) -> dict[str, float]:
        """The counts since the last `take`, and `busy_s`."""
        with self._lock:
            taken: dict[str, float] = {**self._counts, "busy_s": self._busy_s}
            self._counts, self._busy_s = Counter(), 0.0
        return taken


def work_metrics(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The `service/*` metrics of what each rank's judge has done (`GenerativeJudge.take_counts`).

    Counts are sums over ranks, `busy_s` is that of the slowest. A fraction of nothing has no key.
    """
    total: Counter[str] = Counter()
    for share in shares:
        total.update({name: int(number) for name, number in share.items() if name != "busy_s"})
    names = ("num_calls", "num_retries", "num_failed", "num_too_long")
    metrics: dict[str, float] = {f"service/{name}": total[name] for name in names}
    metrics["service/busy_s"] = max(share["busy_s"] for share in shares)
    if total["num_responses"]:
        metrics["service/cache_hit_frac"] = 1 - total["num_asked"] / total["num_responses"]
    return metrics
