"""The data of the arms of bench/loss_kernel.py, the loss that they all compute, and its exact gradient.

loss = sum over t of weights[t] * (-min(ratio A, clip(ratio, 1 - CLIP, 1 + CLIP) A) + BETA * k3), with weights[t] = 1 / T

In the form "top_k" all probabilities are those of the K largest logits and the label, renormalised.

Shapes: T rows, V vocabulary, H hidden size, K = top_k, N = T / length sequences, J = STEPS reasoning steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import srpo_kernels
import torch
from torch import Tensor
from torch.nn import functional as F

CLIP, BETA, TEMPERATURE, STEPS, LENGTH = 0.2, 0.04, 0.99, 4, 256
OPTIONS = srpo_kernels.LossOptions(
    clip_eps_low=CLIP, clip_eps_high=CLIP, kl_coef=BETA, kl_estimator="k3", temperature=TEMPERATURE
)
Form = Literal["logits", "top_k", "hidden"]
SAMPLED = 0.95  # fraction of the labels of the form "top_k" that lie among the K largest logits


class Problem:
    """One set of random data. `refill` draws new data into the same large tensors.

    Forms "logits" and "top_k": logits [T, V] and a pristine copy of them. Form "hidden": hidden [T, H] and weight [V, H], whose
    product is the logits. These are in `dtype`. Also labels [T]; advantages [N, J] and, for arms with one advantage per token,
    token_advantages [T]; step_ends [N, J]; cu_seqlens [N+1]; weights, old_logprobs and ref_logprobs [T] fp32. About every 20th
    ratio is clipped. In the form "top_k" no logit ties with the K-th largest of its row, so that all arms have the same support.
    """

    def __init__(
        self,
        form: Form,
        tokens: int,
        vocab: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        length: int = LENGTH,
        top_k: int = 0,
    ) -> None:
        """Raises ValueError if `tokens` is not a multiple of the `length` of a sequence, or `top_k` does not fit the form."""
        if tokens % length:
            raise ValueError(f"tokens is {tokens}, not a whole number of sequences: give a multiple of {length}")
        if not (1 <= top_k <= vocab if form == "top_k" else top_k == 0):
            raise ValueError(f"top_k is {top_k}: give 1 to {vocab} (vocab) in the form top_k, 0 in the others")
        self.form, self.device, self.length, self.top_k = form, device, length, top_k
        num_sequences = tokens // length
        make = partial(torch.empty, dtype=dtype, device=device)
        if form == "hidden":
            self.hidden, self.weight = make(tokens, hidden), make(vocab, hidden)
        else:
            self.logits, self.pristine = make(tokens, vocab), make(tokens, vocab)
        ends = [length * (j + 1) // STEPS for j in range(STEPS)]
        self.step_ends = torch.tensor(ends, dtype=torch.int32, device=device).expand(num_sequences, STEPS).contiguous()
        self.cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
        self.weights = torch.full((tokens,), 1 / tokens, device=device)
        self.tokens, self.vocab = tokens, vocab
        self.gradients: dict[str, Tensor] | None = None  # if a dictionary, backward stores gradients here by name
        self.exact: dict[str, Tensor] = {}  # results of `exact_gradient` for the present data
        self._leaf = torch.zeros((), requires_grad=True, device=device)

    @property
    def source(self) -> Literal["logits", "hidden"]:
        """The name of the input whose gradient is checked."""
        return "hidden" if self.form == "hidden" else "logits"

    def refill(self, seed: int) -> None:
        """Draw new data."""
        self.exact.clear()
        generator = torch.Generator(self.device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=self.device)
        rows = 2**24 // self.vocab + 1  # in parts: fp32 noise for all rows would be larger than the problem itself
        if self.form == "hidden":
            self.hidden.copy_(normal(self.hidden.shape))
            for part in self.weight.split(rows):
                part.copy_(2 * self.weight.shape[1] ** -0.5 * normal(part.shape))
        else:
            for part in self.pristine.split(rows):
                part.copy_(2 * normal(part.shape))
        self.labels = torch.randint(self.vocab, (self.tokens,), generator=generator, device=self.device)
        if self.form == "top_k":
            self._settle_supports(rows, generator)
        self.advantages = normal(self.tokens // self.length, STEPS)
        step = torch.arange(self.length, device=self.device) * STEPS // self.length
        self.token_advantages = self.advantages[:, step].flatten()
        parts = zip((self.hidden if self.form == "hidden" else self.pristine).split(rows), self.labels.split(rows), strict=True)
        logits = ((part @ self.weight.T if self.form == "hidden" else part, labels) for part, labels in parts)
        of_labels = partial(by_top_k, top_k=self.top_k) if self.form == "top_k" else by_log_softmax
        logprobs = torch.cat([of_labels(part, labels) for part, labels in logits])
        self.old_logprobs = logprobs + 0.1 * normal(self.tokens)
        self.ref_logprobs = logprobs + 0.1 * normal(self.tokens)
        self.restore()

    def _settle_supports(self, rows: int, generator: torch.Generator) -> None:
        """Lower the logits that tie with the K-th largest of their row, except those that `topk` took, and draw most labels from
        the K largest. Takes this number of rows at a time."""
        for part, labels in zip(self.pristine.split(rows), self.labels.split(rows), strict=True):
            kept = part.topk(self.top_k, 1).indices
            tied = part == part.gather(1, kept[:, -1:])
            part.sub_(tied.scatter_(1, kept, False).to(part.dtype))
            rank = torch.randint(self.top_k, (len(part), 1), generator=generator, device=self.device)
            is_sampled = torch.rand(len(part), generator=generator, device=self.device) < SAMPLED
            labels.copy_(torch.where(is_sampled, kept.gather(1, rank)[:, 0], labels))

    def restore(self) -> None:
        """Restore logits that an arm has overwritten. Called before every arm, so that all find the same caches."""
        if self.source == "logits":
            self.logits.copy_(self.pristine)

    def inputs(self) -> tuple[Tensor, ...]:
        """(logits,) or (hidden, weight), each as the result of an op that precedes the loss."""
        names = ("hidden", "weight") if self.form == "hidden" else ("logits",)
        return tuple(_Handed.apply(self._leaf, self, name) for name in names)

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `token_loss` after the log-probabilities, [T] each."""
        return self.token_advantages, self.weights, self.old_logprobs, self.ref_logprobs

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
    if advantages in problem.exact:
        return problem.exact[advantages]
    rows = problem.length
    exact = (problem.hidden if problem.form == "hidden" else problem.pristine)[:rows].double().requires_grad_()
    loss = srpo_kernels.policy_loss(
        exact @ problem.weight.double().T if problem.form == "hidden" else exact,
        problem.labels[:rows],
        problem.advantages[:1] if advantages == "step" else problem.advantages[:1, :1].expand(1, STEPS),
        problem.step_ends[:1],
        problem.cu_seqlens[:2],
        problem.weights[:rows],
        problem.old_logprobs[:rows],
        problem.ref_logprobs[:rows],
        options=OPTIONS,
        top_k=problem.top_k,
        impl="reference",
    ).loss
    problem.exact[advantages] = torch.autograd.grad(loss, exact)[0]
    return problem.exact[advantages]


def token_loss(logprobs: Tensor, advantages: Tensor, weights: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The loss from log-probabilities and its other inputs, all of one shape."""
    ratio = torch.exp(logprobs - old_logprobs)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    inverse = ref_logprobs - logprobs
    return (weights * (BETA * (torch.exp(inverse) - inverse - 1) - surrogate)).sum()


def by_log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels [T], computed in fp32."""
    return torch.log_softmax(logits.float() / TEMPERATURE, -1).gather(-1, labels[:, None])[:, 0]


def by_top_k(logits: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """Log-probabilities of the labels [T] among the `top_k` largest logits and the label, computed in fp32."""
    kept = logits.detach().topk(top_k, -1).indices
    candidates = logits.gather(-1, torch.cat([labels[:, None], kept], -1)).float() / TEMPERATURE
    is_label = F.pad(kept == labels[:, None], (1, 0))  # a label that was kept is a candidate only once
    return torch.log_softmax(candidates.masked_fill(is_label, -torch.inf), -1)[:, 0]
