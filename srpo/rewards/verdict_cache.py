"""Cache of a generative judge's verdicts, and counters of its remaining work."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from srpo.rollout.engine import SamplingParams

ParsedVerdicts = tuple[bool | None, ...]  # [J], None without a verdict


class VerdictCache:
    """Verdicts of the `max_entries` most recently used questions (0: no cache). Thread-safe.

    A question is (judge, decoding parameters, seed, prompt): everything that a greedy judge's answer depends on. It pays because
    groups of GRPO repeat responses, within an optimizer step and across steps. About 300 bytes per entry. Nothing is written to
    disk: a run empties it at each checkpoint, because a resumed run starts without it and has to ask the same questions together.
    """

    def __init__(self, max_entries: int) -> None:
        if max_entries < 0:
            raise ValueError(f"reward.judge_cache is {max_entries}: set it to 0 (none) or more")
        self.max_entries = max_entries
        self._verdicts: OrderedDict[bytes, ParsedVerdicts] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._verdicts)

    def get(self, key: bytes) -> ParsedVerdicts | None:
        """Return the verdicts of `key` and mark it as most recently used; None if the cache does not have it."""
        with self._lock:
            if key not in self._verdicts:
                return None
            self._verdicts.move_to_end(key)
            return self._verdicts[key]

    def clear(self) -> None:
        """Forget all verdicts."""
        with self._lock:
            self._verdicts.clear()

    def put(self, key: bytes, verdicts: ParsedVerdicts) -> None:
        """Store verdicts and evict the least recently used entries beyond `max_entries`."""
        with self._lock:
            self._verdicts[key] = verdicts
            self._verdicts.move_to_end(key)
            while len(self._verdicts) > self.max_entries:
                self._verdicts.popitem(last=False)


def question_key(identity: str, params: SamplingParams, seed: int, prompt: str) -> bytes:
    """Return the cache key of a question: a 16-byte digest."""
    return hashlib.blake2b(repr((identity, params, seed, prompt)).encode("utf-8", "backslashreplace"), digest_size=16).digest()


class WorkCounts:
    """Thread-safe counters, and the seconds in which at least one thread was busy. `take` returns and resets them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._num_busy, self._since, self._busy_s = 0, 0.0, 0.0

    def add(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Measure the time inside as busy; overlapping threads count once."""
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
        """Return the counts and `busy_s` since the last `take`, and reset them."""
        with self._lock:
            taken: dict[str, float] = {**self._counts, "busy_s": self._busy_s}
            self._counts, self._busy_s = Counter(), 0.0
        return taken


def work_metrics(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the `service/*` metrics of all ranks; shares[rank] is from `GenerativeJudge.take_counts`.

    Counts are summed over ranks; `busy_s` is the largest. A fraction with denominator 0 has no key.
    """
    total: Counter[str] = Counter()
    for share in shares:
        total.update({name: int(number) for name, number in share.items() if name != "busy_s"})
    names = ("num_calls", "num_retries", "num_failed", "num_too_long", "num_no_text")
    metrics: dict[str, float] = {f"service/{name}": total[name] for name in names}
    metrics["service/busy_s"] = max(share["busy_s"] for share in shares)
    if total["num_responses"]:
        metrics["service/cache_hit_frac"] = 1 - total["num_asked"] / total["num_responses"]
    return metrics
