"""The modules of bench/, which is no package, for their tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@contextmanager
def bench_modules(*names: str) -> Iterator[SimpleNamespace]:
    """These modules by the last part of their names. Inside the block they can import further ones."""
    path = list(sys.path)
    sys.path.insert(0, str(BENCH))
    try:
        yield SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = path


def proof_fixture(*names: str) -> Callable[..., Any]:
    """A fixture, one for all tests of a file: these modules of bench/gpu_proof."""

    @pytest.fixture(scope="module")
    def proof() -> Iterator[SimpleNamespace]:
        with bench_modules(*(f"gpu_proof.{name}" for name in names)) as found:
            yield found

    return proof
