"""The data of the arms of bench/loss_kernel.py, the loss that they all compute, and its exact gradient.

loss = sum over t of weights[t] * (-min(ratio A, clip(ratio, 1 - CLIP, 1 + CLIP) A) + BETA * k3), with weights[t] = 1 / T

Shapes: T rows, V vocabulary, H hidden size, N = T / length sequences, J = STEPS reasoning steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import srpo_kernels
import torch
from torch import Tensor

CLIP, BETA, TEMPERATURE, STEPS, LENGTH = 0.2, 0.04, 0.99, 4, 256
OPTIONS = srpo_kernels.LossOptions(
    clip_eps_low=CLIP, clip_eps_high=CLIP, kl_coef=BETA, kl_estimator="k3", temperature=TEMPERATURE
)
Form = Literal["logits", "hidden"]


class Problem:
    """One set of random data. `refill` draws new data into the same large tensors.

    Form "logits": logits [T, V] and a pristine copy of them. Form "hidden": hidden [T, H] and weight [V, H], whose product is the
    logits. These are in `dtype`. Also labels [T]; advantages [N, J] and, for arms with one advantage per token, token_advantages
    [T]; step_ends [N, J]; cu_seqlens [N+1]; weights, old_logprobs and ref_logprobs [T] fp32. About every 20th ratio is clipped.
    """

    def __init__(
        self, form: Form, tokens: int, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device, length: int = LENGTH
    ) -> None:
        """Raises ValueError if `tokens` is not a multiple of the `length` of a sequence."""
        if tokens % length:
            raise ValueError(f"tokens is {tokens}, not a whole number of sequences: give a multiple of {length}")
        self.form, self.device, self.length = form, device, length
        num_sequences = tokens // length
        make = partial(torch.empty, dtype=dtype, device=device)
        if form == "logits":
            self.logits, self.pristine = make(tokens, vocab), make(tokens, vocab)
        else:
            self.hidden, self.weight = make(tokens, hidden), make(vocab, hidden)
        ends = [length * (j + 1) // STEPS for j in range(STEPS)]
        self.step_ends = torch.tensor(ends, dtype=torch.int32, device=device).expand(num_sequences, STEPS).contiguous()
        self.cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
        self.weights = torch.full((tokens,), 1 / tokens, device=device)
        self.tokens, self.vocab = tokens, vocab
        self.gradients: dict[str, Tensor] | None = None  # if a dictionary, backward stores gradients here by name
        self._leaf = torch.zeros((), requires_grad=True, device=device)

    def refill(self, seed: int) -> None:
        """Draw new data."""
        generator = torch.Generator(self.device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=self.device)
        rows = 2**24 // self.vocab + 1  # in parts: fp32 noise for all rows would be larger than the problem itself
        if self.form == "logits":
            for part in self.pristine.split(rows):
                part.copy_(2 * normal(part.shape))
        else:
            self.hidden.copy_(normal(self.hidden.shape))
            for part in self.weight.split(rows):
                part.copy_(2 * self.weight.shape[1] ** -0.5 * normal(part.shape))
        self.labels = torch.randint(self.vocab, (self.tokens,), generator=generator, device=self.device)
        self.advantages = normal(self.tokens // self.length, STEPS)
        step = torch.arange(self.length, device=self.device) * STEPS // self.length
        self.token_advantages = self.advantages[:, step].flatten()
        source = self.pristine if self.form == "logits" else self.hidden
        parts = zip(source.split(rows), self.labels.split(rows), strict=True)
        logits = ((part if self.form == "logits" else part @ self.weight.T, labels) for part, labels in parts)
        logprobs = torch.cat([by_log_softmax(part, labels) for part, labels in logits])
        self.old_logprobs = logprobs + 0.1 * normal(self.tokens)
        self.ref_logprobs = logprobs + 0.1 * normal(self.tokens)
        self.restore()

    def restore(self) -> None:
        """Restore logits that an arm has overwritten. Called before every arm, so that all find the same caches."""
        if self.form == "logits":
            self.logits.copy_(self.pristine)

    def inputs(self) -> tuple[Tensor, ...]:
        """(logits,) or (hidden, weight), each as the result of an op that precedes the loss."""
        names = ("logits",) if self.form == "logits" else ("hidden", "weight")
        return tuple(_Handed.apply(self._leaf, self, name) for name in names)

    def batched(self, *tensors: Tensor) -> list[Tensor]:
        """Each [T, ...] as [N, length, ...], the layout of most other packages."""
        return [tensor.unflatten(0, (-1, self.length)) for tensor in tensors]


class _Handed(torch.autograd.Function):
    """Returns a tensor of the problem that requires a gradient; backward drops the gradient, so no arm copies or adds it."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, problem: Problem, name: str) -> Tensor:
        ctx.problem, ctx.name = problem, name
        return getattr(problem, name).data  # not a view for autograd, so that arms may overwrite it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        if ctx.problem.gradients is not None:
            ctx.problem.gradients[ctx.name] = gradients[0]
        return None, None, None


def exact_gradient(problem: Problem, advantages: str) -> Tensor:
    """Gradient of the loss at the first sequence's logits [length, V] or hidden states [length, H], computed in fp64."""
    rows = problem.length
    source = problem.pristine if problem.form == "logits" else problem.hidden
    exact = source[:rows].double().requires_grad_()
    loss = srpo_kernels.policy_loss(
        exact if problem.form == "logits" else exact @ problem.weight.double().T,
        problem.labels[:rows],
        problem.advantages[:1] if advantages == "step" else problem.advantages[:1, :1].expand(1, STEPS),
        problem.step_ends[:1],
        problem.cu_seqlens[:2],
        problem.weights[:rows],
        problem.old_logprobs[:rows],
        problem.ref_logprobs[:rows],
        options=OPTIONS,
        impl="reference",
    ).loss
    return torch.autograd.grad(loss, exact)[0]


def token_loss(logprobs: Tensor, advantages: Tensor, weights: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The loss from log-probabilities and its other inputs, all of one shape."""
    ratio = torch.exp(logprobs - old_logprobs)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    inverse = ref_logprobs - logprobs
    return (weights * (BETA * (torch.exp(inverse) - inverse - 1) - surrogate)).sum()


def by_log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels [T], computed in fp32."""
    return torch.log_softmax(logits.float() / TEMPERATURE, -1).gather(-1, labels[:, None])[:, 0]
