"""The arms of bench/loss_kernel.py: the loss of problem.py by our kernels, by plain torch and by other packages.

`Arm.make` builds an arm for a `Problem`: a function that runs the forward pass up to the loss; the caller runs the backward pass.
Other packages are imported when their arm is made; a missing package raises `Absent`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import srpo_kernels
import torch
from problem import BETA, CLIP, LENGTH, OPTIONS, TEMPERATURE, Form, Problem, by_log_softmax, exact_gradient, token_loss
from srpo_kernels import linear_exponentials, operators
from torch import Tensor
from torch.nn import functional as F


class Absent(Exception):
    """An arm cannot run on this machine; the message gives the reason."""


Run = Callable[[], "Tensor | None"]  # returns the loss; None if the backward pass is already done


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
        return float((problem.gradients[arm.form][:rows].double() - exact).norm() / exact.norm())
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

    call: Callable[..., Tensor] = torch.compile(loss) if compiled else loss
    return lambda: call(problem.inputs(), problem.labels, *_tables(problem))


def ours(problem: Problem, impl: str, in_place: bool, chunk_holds: Literal["logits", "exponentials"] = "logits") -> Run:
    """An implementation of srpo_kernels."""
    if impl != "reference":
        if impl not in operators.BACKENDS:
            raise Absent(f"srpo_kernels has no implementation {impl!r}")
        source = problem.logits if problem.form == "logits" else problem.hidden
        why_not = operators.BACKENDS[impl].why_not if chunk_holds == "logits" else linear_exponentials.why_not
        if reason := why_not(source):
            raise Absent(reason)
    if problem.form == "logits":
        call: Any = partial(srpo_kernels.policy_loss, in_place=in_place)
    else:
        call = partial(srpo_kernels.linear_policy_loss, chunk_holds=chunk_holds)

    def run() -> Tensor:
        p = problem
        tables = (p.labels, p.advantages, p.step_ends, p.cu_seqlens, p.weights, p.old_logprobs, p.ref_logprobs)
        return call(*p.inputs(), *tables, options=OPTIONS, impl=impl).loss

    return run


def trl(problem: Problem) -> Run:
    """TRL's log-probabilities: a Triton kernel if TRL has one for the device, else a loop over sequences."""
    selective_log_softmax = _load("trl.trainer.utils").selective_log_softmax

    def run() -> Tensor:
        inputs = problem.inputs()
        logits = F.linear(*inputs) if problem.form == "hidden" else inputs[0]
        logits, labels = problem.batched(logits, problem.labels)
        return token_loss(selective_log_softmax(logits, labels, TEMPERATURE).float(), *problem.batched(*_tables(problem)))

    return run


def liger(problem: Problem, in_place: bool) -> Run:
    """Liger's Triton GRPO loss. It expects one row of logits more than tokens, so it gets one token less."""
    _needs_gpu(problem, "Triton kernels")
    triton_grpo_loss = _load("liger_kernel.transformers.grpo_loss").triton_grpo_loss

    def run() -> Tensor:
        rest = problem.batched(problem.old_logprobs, problem.ref_logprobs, problem.labels)
        loss, *_ = triton_grpo_loss(
            *problem.batched(*problem.inputs()),
            *(tensor[:, :-1].contiguous() for tensor in rest),
            problem.advantages[:, 0].contiguous(),
            temperature=TEMPERATURE,
            beta=BETA,
            eps_low=CLIP,
            eps_high=CLIP,
            inplace=in_place,
        )
        return (loss * problem.batched(problem.weights)[0][:, :-1]).sum()

    return run


def liger_fused_linear(problem: Problem) -> Run:
    """Liger's chunked GRPO loss. Its mean over sequences of means over tokens equals ours: all sequences are equally long."""
    module = _load("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOLoss(
        beta=BETA, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo", temperature=TEMPERATURE
    )

    def run() -> Tensor:
        hidden, weight = problem.inputs()
        hidden, labels, old, ref = problem.batched(hidden, problem.labels, problem.old_logprobs, problem.ref_logprobs)
        mask, advantages = torch.ones_like(labels), problem.advantages[:, 0].contiguous()
        return module(hidden, weight, labels, mask, advantages, ref_per_token_logps=ref, old_per_token_logps=old)[0]

    return run


def verl_logits(problem: Problem) -> Run:
    """verl's log-probabilities, called as in its engines; uses flash-attn's Triton kernel if installed."""
    logprobs_from_logits = _load("verl.utils.torch_functional").logprobs_from_logits

    def run() -> Tensor:
        (logits,) = problem.inputs()
        logprobs = logprobs_from_logits(logits.div_(TEMPERATURE), problem.labels, inplace_backward=True)
        return token_loss(logprobs.float(), *_tables(problem))

    return run


def verl_hidden(problem: Problem) -> Run:
    """verl's fused linear cross-entropy, which also returns the entropy."""
    _needs_gpu(problem, "Triton kernels")
    if problem.hidden.shape[1] % 128:
        raise Absent(f"its kernels want a hidden size that is a multiple of 128, not {problem.hidden.shape[1]}")
    linear_cross_entropy = _load("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def run() -> Tensor:
        logprobs, _ = linear_cross_entropy(*problem.inputs(), problem.labels, TEMPERATURE, "none", None)
        return token_loss(logprobs.float(), *_tables(problem))

    return run


def torch_linear_cross_entropy(problem: Problem) -> Run:
    """PyTorch's linear_cross_entropy, which works in chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy: it came with 2.13")
    call = partial(F.linear_cross_entropy, reduction="none", options=torch.nn.LinearCrossEntropyOptions())

    def run() -> Tensor:
        hidden, weight = problem.inputs()
        return token_loss(-call(hidden / TEMPERATURE, weight, problem.labels).float(), *_tables(problem))

    return run


def cce(problem: Problem) -> Run:
    """Cut cross-entropy, with its default gradient filter."""
    _needs_gpu(problem, "Triton kernels")
    linear_cross_entropy = _load("cut_cross_entropy").linear_cross_entropy

    def run() -> Tensor:
        hidden, weight = problem.inputs()
        loss = linear_cross_entropy(hidden / TEMPERATURE, weight, problem.labels, reduction="none", impl="cce")
        return token_loss(-loss.float(), *_tables(problem))

    return run


def quack_logits(problem: Problem, in_place: bool) -> Run:
    """QuACK's cross-entropy with the gradient in the same pass."""
    _needs_gpu(problem, "CuTe kernels", interpreter=False)
    cross_entropy_fwd = _load("quack.cross_entropy").cross_entropy_fwd

    def run() -> None:
        cross_entropy_fwd(problem.logits, problem.labels, return_dx=True, inplace_backward=in_place)

    return run


def quack_hidden(problem: Problem) -> Run:
    """QuACK's linear cross-entropy, summed."""
    _needs_gpu(problem, "CuTe kernels", interpreter=False)
    call = _load("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda: call(*problem.inputs(), problem.labels, reduction="sum")


def copy(problem: Problem) -> Run:
    """The bound of the form "logits": reads every logit once and writes every gradient once."""
    return problem.restore


def matmul(problem: Problem) -> Run:
    """The bound of the form "hidden": the three matrix products that every implementation needs."""

    def run() -> None:
        logits = problem.hidden @ problem.weight.T
        _ = logits @ problem.weight
        _ = logits.T @ problem.hidden

    return run


def failures() -> tuple[type[Exception], ...]:
    """Exceptions with which another package's arm may fail on a problem."""
    builtin = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError, LookupError, OSError)
    own = {"triton.errors": "TritonError", "cutlass.base_dsl.common": "DSLBaseError"}  # direct subclasses of Exception
    return *builtin, *(
        getattr(sys.modules[module], name) for module, name in own.items() if hasattr(sys.modules.get(module), name)
    )


def _tables(problem: Problem) -> tuple[Tensor, ...]:
    """The arguments of `token_loss` after the log-probabilities."""
    return problem.token_advantages, problem.weights, problem.old_logprobs, problem.ref_logprobs


def _needs_gpu(problem: Problem, what: str, interpreter: bool = True) -> None:
    """Raises Absent without a CUDA device. interpreter: accept Triton's interpreter, to test that an arm is called correctly."""
    interpreted = interpreter and os.environ.get("TRITON_INTERPRET") == "1"
    if problem.device.type != "cuda" and not interpreted:
        raise Absent(f"its {what} need a CUDA device")


def _load(module: str) -> Any:
    """Import a module of another package. Raises Absent."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        missing = package if importlib.util.find_spec(package) is None else error.name
        raise Absent(f"needs {missing}, which is not installed") from error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise Absent(f"importing {module} failed: {error}") from error


def _arms() -> list[Arm]:
    arms = [Arm("copy", "logits", copy, in_place=True, advantages="none", note="bound: moves as many bytes and computes nothing")]
    arms += [Arm("matmul", "hidden", matmul, advantages="none", note="bound: the three matrix products alone")]
    for impl in ("cuda", "triton", "cpu", "reference"):
        places = (False,) if impl == "reference" else (True, False)
        arms += [Arm(f"srpo/{impl}", "logits", partial(ours, impl=impl, in_place=place), place) for place in places]
        arms += [Arm(f"srpo/{impl}", "hidden", partial(ours, impl=impl, in_place=False))]
        if impl == "triton":
            make = partial(ours, impl=impl, in_place=False, chunk_holds="exponentials")
            arms += [Arm("srpo/triton-v2", "hidden", make, note="a chunk holds 16-bit exponentials in place of logits")]
    forms: tuple[Form, Form] = ("logits", "hidden")
    for form in forms:
        arms += [Arm("eager", form, partial(plain, logprobs=by_log_softmax))]
        arms += [Arm("compile/log_softmax", form, partial(plain, logprobs=by_log_softmax, compiled=True))]
        arms += [Arm("compile/logsumexp", form, partial(plain, logprobs=by_logsumexp, compiled=True))]
        arms += [Arm("trl", form, trl, packages=("trl",))]
    one, bound = "one advantage per sequence", "bound: plain cross-entropy, no policy loss"
    for place in (True, False):
        short = f"{one}; leaves out one row of {LENGTH}"
        make = partial(liger, in_place=place)
        arms += [Arm("liger", "logits", make, place, "sequence", True, ("liger-kernel", "triton"), short)]
    arms += [Arm("liger/fused_linear", "hidden", liger_fused_linear, False, "sequence", packages=("liger-kernel",), note=one)]
    arms += [Arm("verl", "logits", verl_logits, in_place=True, packages=("verl", "flash-attn"))]
    arms += [Arm("verl", "hidden", verl_hidden, packages=("verl", "triton"), note="computes the entropy as well")]
    arms += [Arm("linear_cross_entropy", "hidden", torch_linear_cross_entropy)]
    filtered = "leaves out small gradients: its default"
    arms += [Arm("cce", "hidden", cce, packages=("cut-cross-entropy", "triton"), note=filtered)]
    for place in (True, False):
        make = partial(quack_logits, in_place=place)
        arms += [Arm("quack", "logits", make, place, "none", packages=("quack-kernels",), note=bound)]
    arms += [Arm("quack", "hidden", quack_hidden, advantages="none", packages=("quack-kernels",), note=bound)]
    return arms


ARMS = _arms()
