"""Exceptions that end an arm of bench/loss_kernel.py, or a part of a stage of gpu_proof, and not the others. Needs no package."""

from __future__ import annotations

import ctypes
import subprocess
import sys

# Exceptions of packages that derive from Exception directly: module -> name.
DIRECT = {
    "triton.errors": "TritonError",
    "cutlass.base_dsl.common": "DSLBaseError",
    "torch.testing._internal.optests.generate_tests": "OpCheckError",
}


def failures() -> tuple[type[Exception], ...]:
    """All of them; those of packages as far as their modules are loaded."""
    builtin = (RuntimeError, ValueError, TypeError, AttributeError, NameError, ImportError, SyntaxError, AssertionError)
    builtin += (LookupError, ArithmeticError, OSError, MemoryError, ctypes.ArgumentError, subprocess.SubprocessError)
    loaded = ((sys.modules.get(module), name) for module, name in DIRECT.items())
    return *builtin, *(getattr(module, name) for module, name in loaded if hasattr(module, name))
