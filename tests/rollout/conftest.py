"""Fixtures shared by tests of engines."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from multiprocessing import forkserver
from types import SimpleNamespace

import forked_engine
import pytest

from srpo.rollout.vllm import process as engine_process


@pytest.fixture(scope="module")
def forks() -> Iterator[None]:
    """Starts fake engines by forking a process that has imported torch; `fork=False` in vllm/test_engine.py avoids this."""
    forkserver.ensure_running()  # before a test moves the temporary folder: the path of its socket must stay short
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_process, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": forked_engine.popen}))
        yield
