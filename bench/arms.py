"""The arms of bench/loss_kernel.py: the loss of problem.py by our kernels, by plain torch and by other packages.

`Arm.make` builds an arm for a `Problem`: a function that runs the forward pass up to the loss; the caller runs the backward pass.
rivals.py holds the arms of other packages. An arm that cannot run here raises `Absent` when it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import rivals
import srpo_kernels
import torch
from problem import LENGTH, OPTIONS, TEMPERATURE, Form, Problem, by_log_softmax, by_top_k, exact_gradient, token_loss
from rivals import Absent, Run
from srpo_kernels import linear_exponentials, operators
from torch import Tensor
from torch.nn import functional as F

BOUNDS: dict[Form, str] = {"logits": "copy", "top_k": "copy", "hidden": "matmul"}  # the arm that percentages refer to


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    name: str
    form: Form
    make: Callable[[Problem], Run]  # raises Absent
    in_place: bool = False  # overwrites the logits
    advantages: Literal["step", "sequence", "none"] = "step"  # granularity of the advantages; "none": computes another function
    drops_last: bool = False  # leaves out the last row of every sequence
    packages: tuple[str, ...] = ()  # besides torch
    note: str = ""

    @property
    def is_bound(self) -> bool:
        """Whether percentages refer to this arm."""
        return BOUNDS[self.form] == self.name

    @property
    def must_run(self) -> bool:
        """Whether its failure is a failure of the benchmark: our kernels and the bounds."""
        return self.is_bound or self.name.startswith("srpo/")


def gradient_error(arm: Arm, run: Run, problem: Problem) -> float | None:
    """Relative error (L2 norms) of the arm's gradient over the first sequence; None for an arm that computes another function."""
    if arm.advantages == "none":
        return None
    problem.restore()
    problem.gradients = {}
    try:
        finish(run)
        rows = problem.length - arm.drops_last
        exact = exact_gradient(problem, arm.advantages)[:rows]
        return float((problem.gradients[problem.source][:rows].double() - exact).norm() / exact.norm())
    finally:
        problem.gradients = None


def finish(run: Run) -> None:
    """Run forward and backward."""
    loss = run()
    if loss is not None:
        loss.backward()


def by_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    """As `by_log_softmax`, written so that a compiler need not form the log-softmax of the whole vocabulary."""
    scaled = logits.float() / TEMPERATURE
    return scaled.gather(-1, labels[:, None])[:, 0] - torch.logsumexp(scaled, -1)


def plain(problem: Problem, logprobs: Callable[[Tensor, Tensor], Tensor], compiled: bool = False) -> Run:
    """Plain torch, in either form."""

    def loss(inputs: tuple[Tensor, ...], labels: Tensor, *tables: Tensor) -> Tensor:
        logits = F.linear(*inputs) if len(inputs) == 2 else inputs[0]
        return token_loss(logprobs(logits, labels), *tables)

    # fullgraph: an error, where a part that cannot be compiled would run uncompiled
    call: Callable[..., Tensor] = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss
    return lambda: call(problem.inputs(), problem.labels, *problem.tables())


def ours(problem: Problem, impl: str, in_place: bool, chunk_holds: Literal["logits", "exponentials"] = "logits") -> Run:
    """An implementation of srpo_kernels."""
    if impl != "reference":
        if impl not in operators.BACKENDS:
            raise Absent(f"srpo_kernels has no implementation {impl!r}")
        source = getattr(problem, problem.source)
        why_not = operators.BACKENDS[impl].why_not if chunk_holds == "logits" else linear_exponentials.why_not
        if reason := why_not(source):
            raise Absent(reason)
    if problem.form == "hidden":
        call: Any = partial(srpo_kernels.linear_policy_loss, chunk_holds=chunk_holds)
    else:
        call = partial(srpo_kernels.policy_loss, in_place=in_place, top_k=problem.top_k)

    def run() -> Tensor:
        p = problem
        tables = (p.labels, p.advantages, p.step_ends, p.cu_seqlens, p.weights, p.old_logprobs, p.ref_logprobs)
        return call(*p.inputs(), *tables, options=OPTIONS, impl=impl).loss

    return run


def on_top_k(problem: Problem, compiled: bool = False) -> Run:
    """Plain torch on the support of the K largest logits."""
    return plain(problem, partial(by_top_k, top_k=problem.top_k), compiled)


def topk(problem: Problem) -> Run:
    """A yardstick of the form "top_k": the ids alone."""

    def run() -> None:
        problem.logits.topk(problem.top_k, 1)

    return run


def copy(problem: Problem) -> Run:
    """The bound of the forms from logits: reads every logit once and writes every gradient once."""
    return problem.restore


def matmul(problem: Problem) -> Run:
    """The bound of the form "hidden": the three matrix products that every implementation needs."""

    def run() -> None:
        logits = problem.hidden @ problem.weight.T
        _ = logits @ problem.weight
        _ = logits.T @ problem.hidden

    return run


def _arms() -> list[Arm]:
    note = "bound: moves as many bytes and computes nothing"
    from_logits: tuple[Form, Form] = ("logits", "top_k")
    arms = [Arm("copy", form, copy, in_place=True, advantages="none", note=note) for form in from_logits]
    arms += [Arm("matmul", "hidden", matmul, advantages="none", note="bound: the three matrix products alone")]
    arms += [Arm("topk", "top_k", topk, advantages="none", note="yardstick: torch.topk alone, no loss")]
    for impl in ("cuda", "triton", "cpu", "reference"):
        places = (False,) if impl == "reference" else (True, False)
        for form in from_logits:
            arms += [Arm(f"srpo/{impl}", form, partial(ours, impl=impl, in_place=place), place) for place in places]
        arms += [Arm(f"srpo/{impl}", "hidden", partial(ours, impl=impl, in_place=False))]
        if impl == "triton":
            make = partial(ours, impl=impl, in_place=False, chunk_holds="exponentials")
            arms += [Arm("srpo/triton-v2", "hidden", make, note="a chunk holds 16-bit exponentials in place of logits")]
    unfiltered: tuple[Form, Form] = ("logits", "hidden")
    for form in unfiltered:
        arms += [Arm("eager", form, partial(plain, logprobs=by_log_softmax))]
        arms += [Arm("compile/log_softmax", form, partial(plain, logprobs=by_log_softmax, compiled=True))]
        arms += [Arm("compile/logsumexp", form, partial(plain, logprobs=by_logsumexp, compiled=True))]
    arms += [Arm("eager", "top_k", on_top_k), Arm("compile/top_k", "top_k", partial(on_top_k, compiled=True))]
    return arms + _rivals()


def _rivals() -> list[Arm]:
    one, bound = "one advantage per sequence", "bound: plain cross-entropy, no policy loss"
    entropy = "computes the entropy as well"
    arms = [Arm("trl", "logits", rivals.trl_logits, packages=("trl", "triton"), note=f"on a GPU {entropy}")]
    arms += [Arm("trl", "hidden", rivals.trl_hidden, packages=("trl", "triton"), note=entropy)]
    for place in (True, False):
        short = f"{one}; leaves out one row of {LENGTH}"
        make = partial(rivals.liger, in_place=place)
        arms += [Arm("liger", "logits", make, place, "sequence", True, ("liger-kernel", "triton"), short)]
    make = rivals.liger_fused_linear
    arms += [Arm("liger/fused_linear", "hidden", make, False, "sequence", packages=("liger-kernel",), note=one)]
    arms += [Arm("verl", "logits", rivals.verl_logits, in_place=True, packages=("verl", "flash-attn"))]
    arms += [Arm("verl", "hidden", rivals.verl_hidden, packages=("verl", "triton"), note=entropy)]
    arms += [Arm("linear_cross_entropy", "hidden", rivals.torch_linear_cross_entropy)]
    filtered = "leaves out small gradients: its default"
    arms += [Arm("cce", "hidden", rivals.cce, packages=("cut-cross-entropy", "triton"), note=filtered)]
    for place in (True, False):
        make = partial(rivals.quack_logits, in_place=place)
        arms += [Arm("quack", "logits", make, place, "none", packages=("quack-kernels",), note=bound)]
    arms += [Arm("quack", "hidden", rivals.quack_hidden, advantages="none", packages=("quack-kernels",), note=bound)]
    return arms


ARMS = _arms()
