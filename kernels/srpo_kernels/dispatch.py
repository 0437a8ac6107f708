"""The list of implementations, and the choice of one for given logits."""

from __future__ import annotations

import torch

from srpo_kernels import cpu, cuda, operators, triton_rows

# Best first. The reference, which takes every input, comes after all of them.
operators.BACKENDS.update(cuda=cuda, triton=triton_rows, cpu=cpu)


def implementations(logits: torch.Tensor) -> tuple[str, ...]:
    """Values of `impl` that can take these logits, best first; "auto" is the first of them."""
    return *(name for name, backend in operators.BACKENDS.items() if backend.why_not(logits) is None), "reference"


@torch.compiler.assume_constant_result
def choose(op: str, impl: str, device: torch.device, dtype: torch.dtype, *, narrow: bool = False) -> str:
    """The best implementation for logits of this device and dtype, or the named one. Raises ValueError if it is unavailable.

    narrow: prefer an implementation that can write the gradient in another dtype than that of the logits.
    """
    logits = torch.empty(0, 1, device=device, dtype=dtype)
    if impl == "auto":
        names = implementations(logits)
        able = (name for name in names if name in operators.BACKENDS and operators.BACKENDS[name].any_gradient_dtype)
        return next(able, names[0]) if narrow else names[0]
    if impl == "reference":
        return impl
    if impl not in operators.BACKENDS:
        names = ", ".join(("auto", *operators.BACKENDS, "reference"))
        raise ValueError(f"{op} has no implementation {impl!r}: give one of {names}")
    reason = operators.BACKENDS[impl].why_not(logits)
    if reason is not None:
        here = ", ".join(("auto", *implementations(logits)))
        raise ValueError(f"{op}: implementation {impl!r} cannot be used because {reason}: give one of {here}")
    return impl
