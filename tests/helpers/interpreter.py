"""Tests of Triton kernels that run in Triton's interpreter on a CPU, and with `-m gpu` on a GPU. TRITON_INTERPRET must be set
before triton is first imported, so a test file runs itself in another process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = "cpu" if INTERPRETED else "cuda"
ROOT = Path(__file__).resolve().parents[2]


def on_device(test: Callable[..., Any]) -> Any:
    """Mark a test for the interpreter's process, or for a GPU."""
    return pytest.mark.usefixtures("triton_backend")(test if INTERPRETED else pytest.mark.gpu(test))


def run_interpreted(file: str, which: str) -> None:
    """Run the tests of a file that -k WHICH selects in the interpreter, and assert that all pass."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 9):
        pytest.skip("before Triton 3.9 the interpreter rounds a fused multiply-add twice, which spoils large logits")
    flags = ["-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", which]
    command = [sys.executable, "-m", "pytest", *flags, str(Path(file).resolve())]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(done.stdout[-20000:], done.stderr[-2000:])
    assert done.returncode == 0 and " passed" in done.stdout and " skipped" not in done.stdout
