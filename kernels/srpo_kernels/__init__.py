"""Ops of the SRPO loss. Each op has one signature and several implementations; `impl="auto"` takes the best one available.

Shapes: T packed rows, V vocabulary, N sequences, J reasoning steps, K ids of a top-k filter. Row t predicts `labels[t]`; the ops
shift nothing. Rows with label -100 are never read: NaN in them does no harm, and their gradient is zero.
"""

from __future__ import annotations

import torch

from srpo_kernels import operators, reference
from srpo_kernels.checks import check_logits, check_rows, check_segments
from srpo_kernels.dispatch import choose, implementations
from srpo_kernels.linear import linear_policy_loss, linear_token_logprobs
from srpo_kernels.options import LossOptions, check_temperature
from srpo_kernels.segments import IGNORE, PolicyLoss, StepStats, Tables, old_of_segments, step_of_row
from srpo_kernels.support import topk_support

__all__ = [
    "IGNORE",
    "LossOptions",
    "PolicyLoss",
    "StepStats",
    "implementations",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "step_of_row",
    "token_logprobs",
    "topk_support",
]


def policy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    step_advantages: torch.Tensor,
    step_ends: torch.Tensor,
    cu_seqlens: torch.Tensor,
    weights: torch.Tensor,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    *,
    options: LossOptions,
    top_k: int | None = None,
    kept_ids: torch.Tensor | None = None,
    ref_logits: torch.Tensor | None = None,
    in_place: bool | None = None,
    impl: str = "auto",
) -> PolicyLoss:
    """Loss of Eq. 6, log-probabilities of the labels, and sums per reasoning step. GRPO (Eq. 2) is the case of equal columns.

    loss = sum over t of weights[t] * (-min(ratio A, clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high) A) + kl_coef * KL)

    `weights` holds every denominator, so the losses of micro-batches add up to the loss of the batch. A is step_advantages[i, j]
    for the sequence i and the step j that row t lies in. ratio = exp(logprobs - old_logprobs).

    logits [T, V] fp32, bf16, fp16 or fp64; labels [T] int64 in [0, V) or -100; step_advantages [N, J]; step_ends [N, J] exclusive
    ends counted from the first row of the sequence, nondecreasing, rows past the last end belong to the last step; cu_seqlens
    [N+1] from 0 to T; weights, old_logprobs, ref_logprobs [T]. Gradient flows to `logits` alone.

    options: every setting of the formula; `LossOptions` explains each.
    old_logprobs: None means on-policy: the ratio is 1 and its gradient is the gradient of log pi.
    ref_logprobs, ref_logits: the reference of the KL; `ref_logits` [T, V] replaces `ref_logprobs` with kl_estimator "full".
    top_k, kept_ids: take ratio, KL and entropy on the sampler's filtered distribution, renormalised over its support. `kept_ids`
        [T, K] int (negative: padding; no duplicates) is exact; with `top_k` alone (None or 0: no filter) the support is
        `topk_support(logits, top_k)`, which moves with the policy. A label outside its support is added to the support, so that
        no log-probability is -inf, and counted in `stats.num_outside_support`.
    in_place: write the gradient over the logits, which are then lost: no memory beyond the logits. None: in place if the logits
        are the result of another op, since other code rarely needs them then (autograd raises if it does). The reference
        implementation never writes in place.

    Under "ppo" a clipped row has zero gradient; a row exactly on the edge is not clipped. Inside an exponential, log ratios above
    20 count as 20 and have no gradient (except under "cispo"), so the exponential cannot overflow. The stats hold the KL whenever
    a reference is given, also with kl_coef 0.

    Raises ValueError for shapes that do not fit, options out of range, a kl_coef without the reference that its estimator needs,
    an `impl` that is unavailable, and, in the CPU kernels, labels and ids that are not columns (the reference raises torch's
    own error for them; GPU kernels do not check).
    """
    check_logits(logits, labels, top_k, kept_ids)
    check_segments(labels.shape[0], step_advantages, step_ends, cu_seqlens)
    check_rows(labels, weights=weights, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    if in_place and logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits have strides {logits.stride()}: in_place needs contiguous rows; leave in_place at None")
    if ref_logits is not None and ref_logits.shape != logits.shape:
        raise ValueError(f"ref_logits has shape {tuple(ref_logits.shape)}: it must be that of logits, {tuple(logits.shape)}")
    if options.kl_estimator == "full":
        ref_logprobs = None
    else:
        ref_logits = None
    if options.kl_coef and ref_logprobs is None and ref_logits is None:
        missing = "ref_logits" if options.kl_estimator == "full" else "ref_logprobs"
        raise ValueError(f"kl_coef is {options.kl_coef} but there is no reference: give {missing}, or set kl_coef to 0")
    name = choose("policy_loss", impl, logits.device, logits.dtype)
    if options.ratio_over != "token" and old_logprobs is not None:
        with torch.no_grad():
            softmax = {"temperature": options.temperature, "top_k": top_k, "kept_ids": kept_ids}
            logprobs = token_logprobs(logits, labels, **softmax, impl=impl)[0]
        ends = step_ends if options.ratio_over == "step" else None
        old_logprobs = old_of_segments(logprobs, old_logprobs, labels, cu_seqlens, ends)
    if kept_ids is None and top_k and name != "reference":
        kept_ids = topk_support(logits, top_k)
    tables = Tables(labels, step_advantages, step_ends, cu_seqlens, weights, old_logprobs, ref_logprobs, kept_ids, ref_logits)
    if name == "reference":
        return reference.policy_loss(logits, tables, options, top_k)
    with_grad = logits.requires_grad and torch.is_grad_enabled()
    if in_place is None:
        together = logits.shape[1] <= 1 or logits.stride(1) == 1
        in_place = with_grad and together and not logits.is_leaf and not torch.compiler.is_compiling()
    if with_grad and in_place:
        loss, logprobs, sums = operators.PolicyLossInPlace.apply(logits, *tables, options.packed, name)
    else:
        loss, logprobs, sums, _ = operators.policy_loss(logits, *tables, options.packed, with_grad, name)
    return PolicyLoss(loss, logprobs, StepStats.unstack(sums))


def token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    kept_ids: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities of the labels [T], log-sum-exp of logits / temperature [T]), 0 where ignored.

    Both are fp32 (fp64 for fp64 logits) and differentiable in `logits`. Arguments as in `policy_loss`; with a filter both belong
    to the filtered distribution.
    """
    check_temperature(temperature)
    check_logits(logits, labels, top_k, kept_ids)
    name = choose("token_logprobs", impl, logits.device, logits.dtype)
    if name == "reference":
        return reference.token_logprobs(logits, labels, temperature=temperature, top_k=top_k, kept_ids=kept_ids)
    if kept_ids is None and top_k:
        kept_ids = topk_support(logits, top_k)
    return operators.token_logprobs(logits, labels, kept_ids, temperature, name)
