"""Stage ceilings: what this card can do. Every other figure is judged by these."""

from __future__ import annotations

import torch

from gpu_proof import lab
from gpu_proof.parts import Found, figure, small

TOKENS, VOCAB, HIDDEN = (64, 512, 128) if small() else (8192, 151936, 4096)


def bf16(*shape: int) -> torch.Tensor:
    """Random values, drawn in bf16: fp32 noise of this size would need twice the memory."""
    return torch.randn(*shape, device=lab.device(), dtype=torch.bfloat16)


def copy() -> Found:
    lab.needs_memory(4 * TOKENS * VOCAB)
    source = bf16(TOKENS, VOCAB)
    target = torch.empty_like(source)
    ms = lab.interleaved({"copy": lambda: target.copy_(source)})["copy"]
    return {"figures": [figure("copy", 2 * source.nbytes / ms / 1e9, "TB/s")], "ms": ms}


def matmul() -> Found:
    size = 256 if small() else 8192
    lab.needs_memory(6 * size * size)
    left, right = bf16(size, size), bf16(size, size)
    out = torch.empty_like(left)
    ms = lab.interleaved({"matmul": lambda: torch.mm(left, right, out=out)})["matmul"]
    return {"figures": [figure("matmul", 2 * size**3 / ms / 1e9, "TFLOP/s")], "size": size, "ms": ms}


def head() -> Found:
    """The three products of a loss from hidden states, in the forms that the kernels use; a CPU has only the first two."""
    lab.needs_memory(TOKENS * VOCAB * 6 + 6 * VOCAB * HIDDEN)
    hidden, weight = bf16(TOKENS, HIDDEN), bf16(VOCAB, HIDDEN)
    logits = hidden @ weight.T
    calls = {
        "logits, bf16": lambda: torch.mm(hidden, weight.T, out=logits),
        "gradient of hidden, bf16": lambda: logits @ weight,
    }
    if not small():
        exact = torch.empty(TOKENS, VOCAB, device=lab.device())
        total = torch.zeros(VOCAB, HIDDEN, device=lab.device())
        calls["logits, fp32"] = lambda: torch.mm(hidden, weight.T, out_dtype=torch.float32, out=exact)
        calls["gradient of weight, added in fp32"] = lambda: torch.addmm(
            total, logits.T, hidden, out_dtype=torch.float32, out=total
        )
    flops = 2 * TOKENS * VOCAB * HIDDEN
    times = lab.interleaved(calls, 5)
    return {"figures": [figure(name, ms, "ms", flops=flops) for name, ms in times.items()], "shape": [TOKENS, VOCAB, HIDDEN]}


def topk() -> Found:
    lab.needs_memory(2 * TOKENS * VOCAB)
    logits = bf16(TOKENS, VOCAB)
    ms = lab.interleaved({"topk": lambda: logits.topk(100, 1)}, 3)["topk"]
    return {"figures": [figure("torch.topk 100", ms, "ms", bytes=logits.nbytes)]}


def main() -> None:
    lab.run({"copy": copy, "matmul": matmul, "head": head, "topk": topk})
