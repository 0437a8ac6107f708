"""Threads of a test in the place of ranks: functions that run in parallel, and a collective among them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from srpo.rollout.weights.cuda_ipc import Exchange


def both(*work: Callable[[], Any]) -> list[Any]:
    """Results of the functions, which run in parallel and must end within a minute."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(one) for one in work]]


class Meeting:
    """`Exchange` among threads."""

    def __init__(self, size: int) -> None:
        self._values: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=30)

    def of(self, rank: int) -> Exchange:
        def exchange(x: Any) -> list[Any]:
            self._values[rank] = x
            self._barrier.wait()
            values = list(self._values)
            self._barrier.wait()
            return values

        return exchange
