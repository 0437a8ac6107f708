"""Compiles Triton kernels for GPUs that this machine need not have, and reads the machine code."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

TARGETS = {"sm80": ("cuda", 80, 32), "sm90": ("cuda", 90, 32), "sm100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}


def compiled(kernel: Any, arch: str, types: dict[str, str], fixed: dict[str, Any], aligned: set[str], **options: Any) -> Any:
    """The compiled kernel. types: Triton types of arguments, default "*fp32"; fixed: values of constants; aligned: arguments that
    are multiples of 16."""
    names = kernel.arg_names
    compiler = importlib.import_module("triton.compiler")
    source = compiler.ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in fixed else types.get(name, "*fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(aligned & set(names) - set(fixed))},
    )
    gpu = importlib.import_module("triton.backends.compiler").GPUTarget(*TARGETS[arch])
    return compiler.compile(source, target=gpu, options={"enable_fp_fusion": True, **options})


def disassemble(cubin: bytes, folder: Path) -> tuple[dict[str, int], str]:
    """(use of resources, machine code), by the cuobjdump that Triton ships."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    triton_file = importlib.import_module("triton").__file__
    assert triton_file is not None
    tool = Path(triton_file).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not os.access(tool, os.X_OK):
        pytest.skip(f"{tool} is missing")
    flags = ("--dump-resource-usage", "--dump-sass")
    usage, sass = (subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout for flag in flags)
    return {field: int(value) for field, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}, sass


def amd_use(code: str) -> dict[str, int]:
    """Resources named in AMD's assembly: numbers of registers and of spilled registers."""
    counts = re.findall(r"\.((?:vgpr|agpr|sgpr|vgpr_spill|sgpr_spill)_count):\s*(\d+)", code)
    return {field: int(value) for field, value in counts}
