"""What tests of engines share."""

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
    """Fake engines are forks of a process that has torch; vllm/test_engine.py has some in an interpreter of their own."""
    forkserver.ensure_running()  # before a test moves temporary files: its socket's path has to stay short
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_process, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": forked_engine.popen}))
        yield
