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
# The bound of a gradient's error for arms that round logits, log-probabilities or losses to bf16, where a log-probability of -12
# is off by up to 2^-5 and its ratio by as much. In fp32 it is off by some 2^-20, after a product of matrices by twice that.
COARSE = {"fp32": 2**-18, "bf16": 0.1}


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


def problem(bench: SimpleNamespace, form: str, dtype: str, *, vocab: int = 1003, hidden: int = 64) -> Any:
    """Four sequences of eight tokens, no ratio so near an edge of the clip that rounding to bf16 takes it across."""
    top_k = 20 if form == "top_k" else 0
    data = bench.problem.Problem(form, 32, vocab, hidden, DTYPES[dtype], torch.device("cpu"), length=8, top_k=top_k)
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    data.refill(seed)
    logits = data.hidden.double() @ data.weight.double().T if form == "hidden" else data.pristine
    logprobs = bench.problem.by_top_k(logits, data.labels, top_k) if top_k else bench.problem.by_log_softmax(logits, data.labels)
    is_clipped = torch.rand(data.tokens) < 0.1
    log_ratios = torch.where(is_clipped, 0.35, 0.08) * torch.where(torch.rand(data.tokens) < 0.5, -1.0, 1.0)  # edges: -0.22, 0.18
    data.old_logprobs = logprobs - log_ratios * torch.where(is_clipped, 1.0, torch.rand(data.tokens))
    return data
