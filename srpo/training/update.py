"""One optimizer step: log-probabilities that stay fixed during it, the loss of Eq. 6 over micro-batches, clip, step.

Every rank runs the same number of micro-batches, because FSDP's collectives must match: ranks with fewer add empty ones.
Letters: T packed rows, R labelled rows, J reasoning steps, V vocabulary, K kept ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from srpo_kernels import LossOptions, PolicyLoss, StepStats
from torch import nn
from torch.optim import Optimizer

from srpo.core.batch import IGNORE, Batch
from srpo.core.config.train import LossConfig, RolloutConfig
from srpo.core.errors import UserError
from srpo.core.files import binary_file, whole_file
from srpo.policy.model import Policy, Start
from srpo.policy.parallel import Parallel, clip_grad_norm, to_local
from srpo.training.mismatch import Mismatch, importance_weights
from srpo.training.outputs import Hidden, Logits, of_outputs
from srpo.training.token_advantages import TokenBatch, loss_tables

Reference = nn.Module | Start  # pi_ref of Eq. 6: a model, or the policy with its adapter as the run started


class NonFiniteError(UserError):
    """The loss or the gradient is not finite. The optimizer has not stepped; a dump that reproduces the error is written."""


@dataclass(frozen=True)
class Objective:
    """The loss of an update: the options of Eq. 6, and how log-probabilities and weights are computed for it."""

    options: LossOptions
    top_k: int | None  # filter of the distribution that ratios are taken on; None: unfiltered
    sampling_top_k: int | None  # filter of the distribution that was sampled
    num_updates: int
    impl: str = "auto"
    importance: str = "off"  # off | truncate | mask: how the ratio trainer / engine changes a token's weight
    importance_cap: float = 2.0
    inputs: Literal["logits", "hidden"] = "logits"  # the input of the loss and of all log-probabilities

    @property
    def reference_ahead(self) -> bool:
        """Whether `with_logprobs` runs the reference model; else `update` runs it, next to the policy's forward.

        A filtered ratio needs the policy's support, which a single update computes only in its own forward; the exact KL needs
        the reference's logits. The decision does not depend on a batch's content, so that all ranks run the same forwards.
        """
        return self.options.kl_estimator != "full" and (self.num_updates > 1 or self.top_k is None)

    @classmethod
    def from_config(cls, loss: LossConfig, rollout: RolloutConfig) -> Objective:
        """The objective of a config."""
        top_k = rollout.top_k or None
        options = LossOptions(
            clip_eps_low=loss.clip_eps_low,
            clip_eps_high=loss.clip_eps_high,
            kl_coef=loss.kl_coef,
            kl_estimator=loss.kl_estimator,
            temperature=rollout.temperature,
            dual_clip=loss.dual_clip or None,
            clip_form=loss.clip_form,
            ratio_over=loss.ratio_over,
        )
        return cls(
            options=options,
            top_k=top_k if rollout.ratio == "filtered" else None,
            sampling_top_k=top_k,
            num_updates=loss.num_updates,
            impl=loss.impl,
            importance=loss.importance,
            importance_cap=loss.importance_cap,
            inputs=loss.inputs,
        )


def level(batches: Sequence[Batch], parallel: Parallel) -> list[Batch]:
    """The batches on this rank's device, padded with empty ones to the largest number of batches of any rank. Collective."""
    num_steps = batches[0].step_ends.shape[1] if batches else 0
    counts = torch.tensor([len(batches), num_steps], device=parallel.device)
    most, num_steps = parallel.all_reduce_max(counts).tolist()
    empty = [_empty_batch(max(num_steps, 1))] * (most - len(batches))
    return [batch.to(parallel.device) for batch in (*batches, *empty)]


def _empty_batch(num_steps: int) -> Batch:
    """One row without a label. It passes through the whole model, so that all collectives run, and adds nothing to the loss."""
    zero = torch.zeros(1, dtype=torch.long)
    return Batch(
        input_ids=zero,
        labels=torch.full((1,), IGNORE),
        position_ids=zero,
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        step_ends=torch.ones(1, num_steps, dtype=torch.int32),
        step_advantages=torch.zeros(1, num_steps),
        weights=torch.zeros(1),
        sampling_logprobs=torch.zeros(1),
        ref_logprobs=torch.zeros(1),
    )


@torch.no_grad()
def with_logprobs(
    batches: Sequence[Batch], policy: nn.Module, reference: Reference | None, objective: Objective, parallel: Parallel
) -> list[Batch]:
    """The batches on the device, with the tensors that stay fixed over `objective.num_updates` updates.

    With several updates: old_logprobs, the support `kept_ids` of a filtered ratio (the engine's if the batch has it), the
    `importance` of each token, and ref_logprobs on that support. With one update the old policy is the present one, so none of
    these is computed, except ref_logprobs if `reference_ahead`. Collective: every rank must call it.
    """
    filled = []
    for batch in level(batches, parallel):
        if objective.num_updates > 1:
            index, rows = batch.rows()
            fixed = of_outputs(policy, batch, objective.inputs, lambda out, rows=rows: _fixed(out, rows, objective))
            batch = batch.with_(**{name: batch.scatter(values, index) for name, values in fixed.items()})
        if reference is not None and objective.reference_ahead:
            index, rows = batch.rows()
            ref = _reference_logprobs(reference, batch, rows.kept_ids, objective)
            batch = batch.with_(ref_logprobs=batch.scatter(ref, index))
        filled.append(batch)
    return filled[: len(batches)]


def _fixed(out: Logits | Hidden, rows: Batch, objective: Objective) -> dict[str, torch.Tensor]:
    """The policy's values before the first of several updates: fields of `Batch` for the labelled rows, [R, ...]."""
    kept_ids = rows.kept_ids
    if kept_ids is None and objective.top_k is not None:
        kept_ids = out.support(objective.top_k)
    old = _logprobs(out, rows, objective, kept_ids=kept_ids)
    fixed = {"old_logprobs": old}
    if kept_ids is not None:
        fixed["kept_ids"] = kept_ids
    if objective.importance != "off":
        trainer = old
        if objective.top_k != objective.sampling_top_k:  # the distribution of the ratios is not the one that was sampled
            trainer = _logprobs(out, rows, objective, top_k=objective.sampling_top_k)
        fixed["importance"] = _importance(trainer, rows, objective)
    return fixed


@torch.no_grad()
def _logprobs(
    out: Logits | Hidden, rows: Batch, objective: Objective, *, kept_ids: torch.Tensor | None = None, top_k: int | None = None
) -> torch.Tensor:
    """Log-probabilities of the labels, [R] fp32, without gradient. Filtered to `kept_ids` [R, K], or to the largest `top_k`."""
    return out.logprobs(
        rows.labels, temperature=objective.options.temperature, kept_ids=kept_ids, top_k=top_k, impl=objective.impl
    )


def _reference_logprobs(reference: Reference, batch: Batch, kept_ids: torch.Tensor | None, objective: Objective) -> torch.Tensor:
    """The reference model's log-probabilities on the policy's support, [R] fp32."""
    rows = batch.rows()[1]
    return of_outputs(reference, batch, objective.inputs, lambda out: _logprobs(out, rows, objective, kept_ids=kept_ids))


def _importance(trainer: torch.Tensor, rows: Batch, objective: Objective) -> torch.Tensor:
    """Importance weights [R] fp32, see `importance_weights`. trainer: log-probabilities [R] under the sampled distribution."""
    return importance_weights(trainer - rows.sampling_logprobs, objective.importance, objective.importance_cap)


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of an optimizer step."""

    loss: float  # summed over micro-batches and ranks
    grad_norm: float  # of the whole gradient, before clipping


def optimizer_step(
    policy: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    parallel: Parallel,
    *,
    grad_clip: float,
    dump: Path,
    info: dict[str, Any] | None = None,
) -> StepResult:
    """Backward of the sum of `loss_of` over all micro-batches of all ranks, clip, step. RL, SFT and DPO all use this function.

    `loss_of(batch)` runs the policy's forward once and returns the loss of one micro-batch; the batch's weights hold the
    denominators. It is also called for empty batches. If the loss or the gradient is not finite, each rank writes `dump` (rank
    r > 0: `<stem>.rank<r><suffix>`) with its batches, parameters, losses and `info` (see `read_dump`) and raises NonFiniteError
    before the optimizer steps. Collective.
    """
    optimizer.zero_grad(set_to_none=True)
    batches = level(batches, parallel)
    losses = []
    for batch in batches:
        loss = loss_of(batch)
        loss.backward()
        losses.append(loss.detach().double())
    total = parallel.all_reduce_sum(torch.stack(losses).sum() if losses else torch.zeros((), device=parallel.device).double())
    result = StepResult(float(total), clip_grad_norm(policy, grad_clip, parallel))
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        path = dump if parallel.is_main else dump.with_name(f"{dump.stem}.rank{parallel.rank}{dump.suffix}")
        _write_dump(path, policy, batches, losses, result, info or {})
        parallel.barrier()
        raise NonFiniteError(
            f"loss {result.loss}, gradient norm {result.grad_norm}: stopped before the optimizer step. Batches, parameters and "
            f"settings are in {path} (srpo.training.update.read_dump). Start the same run with a lower optimizer.lr: it goes on "
            "from its last checkpoint, or from an earlier one if you remove the newest folder of checkpoints/"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def _write_dump(
    path: Path, policy: nn.Module, batches: list[Batch], losses: list[torch.Tensor], result: StepResult, info: dict[str, Any]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "info": info,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "losses": [float(loss) for loss in losses],
        "batches": [vars(batch.to(torch.device("cpu"))) for batch in batches],
        "parameters": {name: to_local(p.detach()).cpu() for name, p in policy.named_parameters() if p.requires_grad},
    }
    with whole_file(path) as part, binary_file(part) as file:
        torch.save(state, file)


def read_dump(path: Path) -> dict[str, Any]:
    """A dump of `optimizer_step`: info, loss, grad_norm, micro-batches with their losses, this rank's trained parameters by name.

    `info["objective"]` of an `update` is its `Objective`.
    """
    state = torch.load(path, weights_only=True)
    kinds = [TokenBatch if "advantages" in tensors else Batch for tensors in state["batches"]]
    state["batches"] = [kind(**tensors) for kind, tensors in zip(kinds, state["batches"], strict=True)]
    objective = state["info"].get("objective")
    if objective is not None:
        state["info"]["objective"] = Objective(**{**objective, "options": LossOptions(**objective["options"])})
    return state


class _Sums:
    """Sums over the micro-batches of one update."""

    def __init__(self, num_steps: int, objective: Objective, device: torch.device) -> None:
        self.stats = StepStats.zeros(num_steps, device)
        self.has_kl = bool(objective.options.kl_coef)
        self.mismatch = Mismatch(objective.importance, objective.importance_cap, device)

    def add(self, out: PolicyLoss, trainer: torch.Tensor, sampling: torch.Tensor) -> None:
        self.stats = self.stats + out.stats
        self.mismatch.add(trainer, sampling)

    def metrics(self, step_names: Sequence[str], parallel: Parallel) -> dict[str, float]:
        """Means per token over all ranks, under the keys of `srpo.core.metrics`. No tokens, no mean; no reference, no KL."""
        stats = StepStats.unstack(parallel.all_reduce_sum(self.stats.stack()))
        num_tokens = stats.num_tokens.sum()
        metrics = {"train/num_tokens": float(num_tokens), **self.mismatch.metrics(parallel)}
        sums = {"entropy": stats.sum_entropy, "clip_frac": stats.num_clipped, "ratio": stats.sum_ratio}
        sums |= {"kl": stats.sum_kl} if self.has_kl else {}
        for key, per_step in sums.items():
            if num_tokens > 0:
                metrics[f"policy/{key}"] = float(per_step.sum() / num_tokens)
            for j, name in enumerate(step_names):
                if stats.num_tokens[j] > 0:
                    metrics[f"policy/{key}/{name}"] = float(per_step[j] / stats.num_tokens[j])
        return metrics


def update(
    policy: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    objective: Objective,
    parallel: Parallel,
    *,
    step_names: Sequence[str],
    grad_clip: float,
    dump: Path,
    reference: Reference | None = None,
    info: dict[str, Any] | None = None,
) -> dict[str, float]:
    """One optimizer step on Eq. 6 (Algorithm 1 line 16); returns the `train/*`, `policy/*` and mismatch metrics (`rollout/*`).

    batches: this rank's, from `with_logprobs`; without old_logprobs the update is on-policy (the ratio is 1). `reference` is
    needed with a kl_coef unless `objective.reference_ahead`; it routes by itself even if the policy replays routing.

    The mismatch compares the policy's log-probabilities before this step's first update with the engine's, on the distribution
    that was sampled. If ratios are unfiltered but sampling is filtered, only the first of several updates can compute it: take
    this metric, and that of flipped experts, from the first update. With `objective.importance` the weight of each token, and
    therefore its KL, is multiplied by `importance_weights`. Raises NonFiniteError, see `optimizer_step`. Collective.
    """
    sums = _Sums(len(step_names), objective, parallel.device)
    replays = policy if isinstance(policy, Policy) and policy.routers is not None else None
    if replays is not None:
        replays.take_flips()  # discards the flips of earlier forwards

    def loss_of(batch: Batch) -> torch.Tensor:
        return of_outputs(policy, batch, objective.inputs, lambda out: loss_of_outputs(out, batch))

    def loss_of_outputs(out: Logits | Hidden, batch: Batch) -> torch.Tensor:
        rows = batch.rows()[1]
        support, ref_logprobs, ref = rows.kept_ids, rows.ref_logprobs, None
        ask_reference = reference is not None and bool(objective.options.kl_coef) and not objective.reference_ahead
        # From hidden states the support costs one more product; the loss finds it by itself if the reference does not need it.
        if support is None and objective.top_k is not None and (ask_reference or isinstance(out, Logits)):
            support = out.support(objective.top_k)
        if reference is not None and ask_reference:
            with torch.no_grad():
                if objective.options.kl_estimator == "full":
                    ref = of_outputs(reference, batch, objective.inputs, lambda out: out.kept())
                else:
                    ref_logprobs = _reference_logprobs(reference, batch, support, objective)
        # Before the loss, because an implementation may overwrite the logits with the gradient.
        trainer = rows.old_logprobs
        if objective.top_k != objective.sampling_top_k:
            trainer = _logprobs(out, rows, objective, top_k=objective.sampling_top_k)
        weights = rows.weights
        if objective.importance != "off":
            if trainer is None:
                trainer = _logprobs(out, rows, objective, kept_ids=support, top_k=objective.top_k)
            weights = weights * (_importance(trainer, rows, objective) if rows.importance is None else rows.importance)
        tables = loss_tables(rows)
        result = out.loss(
            rows.labels,
            tables.step_advantages,
            tables.step_ends,
            tables.cu_seqlens,
            weights,
            rows.old_logprobs,
            ref_logprobs,
            options=objective.options,
            top_k=objective.top_k,
            kept_ids=support,
            reference=ref,
            impl=objective.impl,
        )
        sums.add(result, result.logprobs if trainer is None else trainer, rows.sampling_logprobs)
        return result.loss

    info = {"objective": asdict(objective), **(info or {})}
    result = optimizer_step(policy, optimizer, batches, loss_of, parallel, grad_clip=grad_clip, dump=dump, info=info)
    metrics = {"train/loss": result.loss, "train/grad_norm": result.grad_norm, **sums.metrics(step_names, parallel)}
    if replays is not None:
        num_flips, num_replayed = parallel.all_reduce_sum(replays.take_flips().to(parallel.device)).tolist()
        if num_replayed:
            metrics["rollout/routing_flip_frac"] = num_flips / num_replayed
    return metrics
