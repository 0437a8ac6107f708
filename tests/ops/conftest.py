"""Fixtures of the tests of Triton kernels."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from interpreter import DEVICE
from srpo_kernels import operators, triton_rows


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the backend, also in the interpreter, where `impl="auto"` never chooses it."""
    reason = triton_rows.why_not(torch.empty(0, 1, device=DEVICE))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setitem(operators.BACKENDS, "triton", triton_rows)


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    """The kernels of `triton_rows`, to be compiled for any GPU."""
    module = triton_rows.kernels()
    if isinstance(module, str):
        pytest.skip(module)
    if triton_rows.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    return module
