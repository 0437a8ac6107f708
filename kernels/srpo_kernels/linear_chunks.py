"""Parts of the losses from hidden states: logits of one chunk of rows at a time, and gradients accumulated over the chunks.

Shapes: T packed rows, R of them with a label, C in one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from srpo_kernels import operators

CPU_CHUNK_BYTES = 2**28  # size of all fp32 matrices [C, V] of a chunk
GPU_CHUNK_ROWS = 8192  # enough for matrix products at full speed
_MOVES = 16  # `move_up` copies rows in blocks of 1/16 of a chunk, to keep its temporary small


def default_rows(vocab: int, device: torch.device, matrices: int) -> int:
    """Rows of a chunk if `matrices` fp32 matrices [C, V] exist at once."""
    rows = CPU_CHUNK_BYTES // (4 * max(vocab, 1)) if device.type == "cpu" else GPU_CHUNK_ROWS
    return max(1, rows // matrices)


def factor_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a factor of a product with fp32 result: a CPU's products of bf16 or fp16 have bf16 or fp16 results."""
    return torch.float32 if tensor.device.type == "cpu" or tensor.dtype == torch.float64 else tensor.dtype


def as_factor(tensor: Tensor) -> Tensor:
    """The tensor in its `factor_dtype`."""
    return tensor.to(factor_dtype(tensor))


def gradient_dtype(factor: Tensor, backend: operators.Backend) -> torch.dtype:
    """The dtype in which the gradient of a chunk's logits is written. If the backend can, it writes bf16 factors directly, which
    saves writing fp32, reading it and writing it again. Not for fp16, see `to_factor`."""
    return torch.bfloat16 if backend.any_gradient_dtype and factor.dtype == torch.bfloat16 else torch.float32


def put_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False, scale: float = 1.0) -> None:
    """out = scale * a @ b, or out += scale * a @ b if `add`. `out` is fp32, and sums are fp32 for factors of any dtype. Autocast
    does not change products with `out=`."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=float(add), alpha=scale, out=out)  # beta 0 ignores the content of `out`, NaN included
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=float(add), alpha=scale, out=out)


def to_factor(dlogits: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(the gradient in the dtype of a factor, the number to multiply its products by). fp16 would flush most of the gradient to
    0: it is scaled in place, by a power of two, to the upper end of fp16's range, which synchronizes with the device."""
    scale = 1.0
    if dtype == torch.float16:
        largest = torch.linalg.vector_norm(dlogits, ord=math.inf).item()
        if 0 < largest < math.inf:
            scale = 2.0 ** min(15 - math.frexp(largest)[1], 100)
            dlogits.mul_(scale)
    return dlogits.to(dtype), 1 / scale


class Chunks:
    """Iterates over (start, stop): slices of the selected rows, as equal in length as possible. All slices share one buffer.

    hidden [T, H]; factor [V, H], the weight as a factor; rows [R] indices into T; num_rows: the largest size of a chunk, 0: the
    default; holds: the dtype of the buffer, None: no buffer; gradient: the dtype of a second buffer for the gradient of the
    logits, None: the gradient overwrites the logits.
    """

    def __init__(
        self,
        hidden: Tensor,
        factor: Tensor,
        rows: Tensor,
        num_rows: int,
        backend: operators.Backend,
        *,
        matrices: int = 1,
        holds: torch.dtype | None = torch.float32,
        gradient: torch.dtype | None = None,
    ) -> None:
        self.hidden, self.factor, self.rows = hidden, factor, rows
        total, vocab = rows.shape[0], factor.shape[0]
        # Equal chunks, because a short last chunk would cost a whole pass over the gradient of the weight, and because products
        # of one to three rows are rounded differently from larger ones.
        count = -(-total // (num_rows or default_rows(vocab, factor.device, matrices)))
        self.edges = [i * total // max(count, 1) for i in range(count + 1)]
        self.num_rows = max((stop - start for start, stop in self), default=0)

        def new_buffer(dtype: torch.dtype | None) -> Tensor:
            shape = (0 if dtype is None else self.num_rows, vocab)
            return backend.new_gradient(hidden.new_empty((), dtype=dtype or torch.float32).expand(shape))

        self.buffer = new_buffer(holds)
        self.gradients = self.buffer if gradient is None else new_buffer(gradient)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.edges[:-1], self.edges[1:], strict=True)

    def hidden_rows(self, start: int, stop: int) -> Tensor:
        """The hidden states as a factor, [C, H]."""
        return self.hidden[self.rows[start:stop]].to(self.factor.dtype)

    def gradient(self, start: int, stop: int) -> Tensor:
        """The buffer for the gradient of the logits of these rows, [C, V]."""
        return self.gradients[: stop - start]

    def logits(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(the hidden states as a factor [C, H], the logits [C, V] fp32). The logits are valid until the next call."""
        x, logits = self.hidden_rows(start, stop), self.buffer[: stop - start]
        put_product(logits, x, self.factor.T)
        return x, logits


class Gradient:
    """Accumulates the gradients of hidden states and weight (of_hidden, of_weight) from the gradient of the logits."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        factor: Tensor,
        of_hidden: bool,
        of_weight: bool,
        stored: Callable[[torch.dtype], torch.dtype],
    ) -> None:
        """`stored` maps the dtype of a tensor to the dtype of its gradient."""
        self.factor, self.weight_dtype = factor, stored(weight.dtype)
        num_rows = hidden.shape[0] if of_hidden else 0
        self.hidden = hidden.new_zeros(num_rows, hidden.shape[1], dtype=stored(hidden.dtype))
        self.weight = weight.new_empty(weight.shape if of_weight else (0, weight.shape[1]), dtype=torch.float32)
        self.of_hidden, self.of_weight, self.started = of_hidden, of_weight, False

    def add(self, rows: Tensor, x: Tensor, dlogits: Tensor, alive: Tensor | None = None, scales: Tensor | None = None) -> None:
        """Add the contribution of the gradient dlogits [C, V] of the logits of `rows` [C]; overwrites dlogits. `alive` [C] bool:
        rows with a gradient, None: all. `scales` [C] fp32: factors that the rows of dlogits still have to be multiplied by."""
        if alive is not None:
            order = move_up(dlogits, alive)
            dlogits, x, rows = dlogits[: order.shape[0]], x[order], rows[order]
            scales = None if scales is None else scales[order]
        if not rows.shape[0]:
            return
        factor, scale = to_factor(dlogits, x.dtype)
        if self.of_weight:
            scaled = x if scales is None else (x * scales[:, None]).to(x.dtype)
            put_product(self.weight, factor.T, scaled, add=self.started, scale=scale)
            self.started = True
        if self.of_hidden:
            gradient = torch.empty_like(x, dtype=torch.float32)
            put_product(gradient, factor, self.factor, scale=scale)
            if scales is not None:
                gradient *= scales[:, None]
            self.hidden.index_copy_(0, rows, gradient.to(self.hidden.dtype))

    def finish(self) -> tuple[Tensor, Tensor]:
        """(gradient of the hidden states [T, H], of the weight [V, H]); [0, H] for a gradient that is not needed."""
        if self.of_weight and not self.started:
            self.weight.zero_()
        return self.hidden, self.weight.to(self.weight_dtype)


def move_up(matrix: Tensor, alive: Tensor) -> Tensor:
    """Bring the rows that are alive to the front, in place, by moving the last of them into the places of the others. Returns
    the former index of each, [number alive] int64. Synchronizes with the device."""
    is_alive = alive.cpu()
    num_alive, num_rows = int(is_alive.sum()), alive.shape[0]
    order = torch.arange(num_alive)
    holes, movers = (~is_alive[:num_alive]).nonzero()[:, 0], is_alive[num_alive:].nonzero()[:, 0] + num_alive
    order[holes] = movers
    size = -(-num_rows // _MOVES)
    for to, source in zip(holes.to(matrix.device).split(size), movers.to(matrix.device).split(size), strict=True):
        matrix.index_copy_(0, to, matrix.index_select(0, source))
    return order.to(matrix.device)
