"""The loss of problem.py by other packages, for bench/loss_kernel.py.

Each function builds an arm: it returns a function that runs the forward pass up to the loss. A package is imported when its arm
is built; a missing package or device raises `Absent`. Names and arguments are those of trl 1.16.0, liger-kernel 0.8.5,
verl 0.9.1, cut-cross-entropy 25.1.1, quack-kernels 0.6.5 and torch 2.13.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from problem import BETA, CLIP, TEMPERATURE, Problem, token_loss
from torch import Tensor
from torch.nn import functional as F


class Absent(Exception):
    """An arm cannot run on this machine; the message gives the reason."""


Run = Callable[[], "Tensor | None"]  # returns the loss; None if the backward pass is already done


def needs_gpu(problem: Problem, what: str, interpreter: bool = True) -> None:
    """Raises Absent without a CUDA device. interpreter: accept Triton's interpreter, to test that an arm is called correctly."""
    interpreted = interpreter and os.environ.get("TRITON_INTERPRET") == "1"
    if problem.device.type != "cuda" and not interpreted:
        raise Absent(f"its {what} need a CUDA device")


def load(module: str, name: str) -> Any:
    """An attribute of a module of another package. Raises Absent."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        missing = package if importlib.util.find_spec(package) is None else error.name
        raise Absent(f"needs {missing}, which is not installed") from error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise Absent(f"{name} of {module} cannot be imported: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The error's type and the first line of its message, 200 characters at most."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}".rstrip(": ")


def trl_logits(problem: Problem) -> Run:
    """TRL's log-probabilities: its Triton kernel on a GPU, a loop over sequences on a CPU. TRL's GRPO trainer has only the
    form of `trl_hidden`."""
    selective_log_softmax = load("trl.trainer.utils", "selective_log_softmax")

    def run() -> Tensor:
        logits, labels = problem.batched(*problem.inputs(), problem.labels)
        return token_loss(selective_log_softmax(logits, labels, TEMPERATURE).float(), *problem.batched(*problem.tables()))

    return run


def trl_hidden(problem: Problem) -> Run:
    """TRL's fused output layer, with the arguments that its GRPO trainer passes for a layer without bias, soft cap and scale."""
    function = load("trl.kernels", "ChunkedLogProbFunction")
    chunk_size = load("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    settings = (TEMPERATURE, chunk_size, None, 1.0, ("log_probs", "entropy"))

    def run() -> Tensor:
        logprobs, *_ = function.apply(*problem.inputs(), None, problem.labels, *settings)
        return token_loss(logprobs, *problem.tables())

    return run


def liger(problem: Problem, in_place: bool) -> Run:
    """Liger's Triton GRPO loss. It expects one row of logits more than tokens, so it gets one token less."""
    needs_gpu(problem, "Triton kernels")
    triton_grpo_loss = load("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")

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
    module = load("liger_kernel.chunked_loss.grpo_loss", "LigerFusedLinearGRPOLoss")(
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
    logprobs_from_logits = load("verl.utils.torch_functional", "logprobs_from_logits")

    def run() -> Tensor:
        (logits,) = problem.inputs()
        logprobs = logprobs_from_logits(logits.div_(TEMPERATURE), problem.labels, inplace_backward=True)
        return token_loss(logprobs.float(), *problem.tables())

    return run


def verl_hidden(problem: Problem) -> Run:
    """verl's fused linear cross-entropy, which also returns the entropy."""
    needs_gpu(problem, "Triton kernels")
    if problem.hidden.shape[1] % 128:
        raise Absent(f"its kernels want a hidden size that is a multiple of 128, not {problem.hidden.shape[1]}")
    linear_cross_entropy = load("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")

    def run() -> Tensor:
        logprobs, _ = linear_cross_entropy(*problem.inputs(), problem.labels, TEMPERATURE, "none", None)
        return token_loss(logprobs.float(), *problem.tables())

    return run


def torch_linear_cross_entropy(problem: Problem) -> Run:
    """PyTorch's linear_cross_entropy, which works in chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy: it came with 2.13")
    call = partial(F.linear_cross_entropy, reduction="none", options=torch.nn.LinearCrossEntropyOptions())

    def run() -> Tensor:
        hidden, weight = problem.inputs()
        return token_loss(-call(hidden / TEMPERATURE, weight, problem.labels).float(), *problem.tables())

    return run


def cce(problem: Problem) -> Run:
    """Cut cross-entropy, with its default gradient filter."""
    needs_gpu(problem, "Triton kernels")
    linear_cross_entropy = load("cut_cross_entropy", "linear_cross_entropy")

    def run() -> Tensor:
        hidden, weight = problem.inputs()
        loss = linear_cross_entropy(hidden / TEMPERATURE, weight, problem.labels, reduction="none", impl="cce")
        return token_loss(-loss.float(), *problem.tables())

    return run


def quack_logits(problem: Problem, in_place: bool) -> Run:
    """QuACK's cross-entropy with the gradient in the same pass."""
    needs_gpu(problem, "CuTe kernels", interpreter=False)
    cross_entropy_fwd = load("quack.cross_entropy", "cross_entropy_fwd")

    def run() -> None:
        cross_entropy_fwd(problem.logits, problem.labels, return_dx=True, inplace_backward=in_place)

    return run


def quack_hidden(problem: Problem) -> Run:
    """QuACK's linear cross-entropy, summed."""
    needs_gpu(problem, "CuTe kernels", interpreter=False)
    call = load("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda: call(*problem.inputs(), problem.labels, reduction="sum")
