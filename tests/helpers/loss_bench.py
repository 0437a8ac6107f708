"""Access to bench/loss_kernel.py and its modules, for their tests."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_modules import bench_modules

MODULES = ("loss_kernel", "arms", "rivals", "problem", "measuring", "outcome")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The bound of a gradient's error for arms that round logits, log-probabilities or losses to bf16: one of a sequence's few tokens
# may then fall on the other side of a clip edge. The test in fp32 shows that such an arm is called correctly.
COARSE = {"fp32": 2e-6, "bf16": 0.5}


def modules() -> SimpleNamespace:
    """The modules of the benchmark."""
    with bench_modules(*MODULES) as found:
        return found


def run(bench: SimpleNamespace, tmp_path: Path, *flags: str, status: int = 0) -> dict[str, Any]:
    """The program's JSON output for a tiny problem on the CPU, after its exit code is checked."""
    path = tmp_path / "result.json"
    small = ("--device", "cpu", "--tokens", "16", "--vocab", "50", "--rounds", "3", "--warmup", "1", "--json", str(path))
    assert bench.loss_kernel.main([*small, *flags]) == status
    return json.loads(path.read_text(encoding="utf-8"))


def problem(bench: SimpleNamespace, form: str, dtype: str) -> Any:
    """Four sequences of eight tokens."""
    top_k = 20 if form == "top_k" else 0
    data = bench.problem.Problem(form, 32, 1003, 64, DTYPES[dtype], torch.device("cpu"), length=8, top_k=top_k)
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    data.refill(seed)
    return data
