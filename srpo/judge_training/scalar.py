"""Training of the scalar reward model (Appendix A) on judgments, by binary cross-entropy per step, for `srpo.train_judge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from srpo.core.batch import Batch
from srpo.core.config.sft import SftConfig
from srpo.core.digests import digest_of
from srpo.core.errors import UserError
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.tokenizer import load_tokenizer
from srpo.judge_training.judgments import Judgment
from srpo.policy.adapters import add_adapter
from srpo.policy.loading import load_to_shard
from srpo.policy.parallel import Parallel
from srpo.policy.scalar import ScalarModel, save_scalar, scalar_loss, scored_batches
from srpo.rewards.scalar import ScalarCase, is_there, scalar_case
from srpo.training.checks import check_device
from srpo.training.inputs import model_inputs, starting_policy
from srpo.training.supervised import batch_indices, fit


def signed_targets(cases: Sequence[ScalarCase], judgments: Sequence[Judgment]) -> torch.Tensor:
    """Targets [N, J]: 1 for the verdict "correct", -1 for "incorrect", 0 for no verdict or a step that the response lacks."""
    signs = [
        [0.0 if v is None or not is_there(case, j) else 1.0 if v else -1.0 for j, v in enumerate(judgment.verdicts)]
        for case, judgment in zip(cases, judgments, strict=True)
    ]
    return torch.tensor(signs)


def train_scalar(
    cfg: SftConfig, judgments: Sequence[Judgment], examples: dict[str, Example], schema: StepSchema, parallel: Parallel
) -> Path:
    """Train from `cfg.policy` and return the folder of the resulting scalar reward model, `run_dir/policy`.

    Resumes like SFT; `cfg.data` is not read. The loss is the mean over the verdicts of an optimizer step, over all ranks.
    Raises UserError for a case that exceeds the context or a micro-batch. Collective.
    """
    run_dir = Path(cfg.run_dir)
    check_device(cfg.policy, parallel)
    tokenizer: Any = load_tokenizer(cfg.policy.path, cfg.policy.bos, cfg.policy.chat)
    model = ScalarModel(
        add_adapter(load_to_shard(cfg.policy.path, parallel, cfg.policy), cfg.policy, cfg.seed),
        activation_checkpointing=cfg.policy.activation_checkpointing,
    )
    cases = [scalar_case(examples[j.example_id], j.response, tokenizer, schema) for j in judgments]
    limit = min(cfg.policy.max_context or model.max_context, model.max_context, cfg.micro_batch_tokens)
    for case, judgment in zip(cases, judgments, strict=True):
        if len(case[0]) + len(case[1]) > limit:
            raise UserError(
                f"a response to {judgment.example_id} has {len(case[0]) + len(case[1])} tokens with its prompt, more than "
                f"{limit}, the smaller of context and sft.micro_batch_tokens: raise the smaller one, or remove the response"
            )
    targets = signed_targets(cases, judgments)
    model = parallel.shard(model, dtype=cfg.policy.dtype)
    inputs = parallel.on_main(
        lambda: (
            model_inputs(starting_policy(cfg.policy))
            | {"the file of judgments": (cfg.run_dir, digest_of((cases, targets.tolist())))}
        )
    )

    def batches_of(step: int) -> list[Batch]:
        chosen = batch_indices(len(cases), cfg.batch_size, step, cfg.seed)
        share = chosen[parallel.rank :: parallel.world_size]
        weighted = targets[share] / targets[chosen].abs().sum().clamp(min=1)
        return scored_batches([cases[i] for i in share], weighted, tokenizer.eos_token_id, cfg.micro_batch_tokens)

    def loss_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(batch)
        judged = batch.step_advantages != 0
        right = ((logits.detach() >= 0) == (batch.step_advantages > 0)) & judged  # p and the verdict are on the same side of 0.5
        return scalar_loss(logits, batch.step_advantages), torch.stack([right.sum(), judged.sum()]).double()

    def metrics_of(sums: list[float]) -> tuple[dict[str, float], float]:
        num_right, num_judged = sums
        if not num_judged:  # no verdict in this step's cases: the accuracy has no value
            return {}, 0.0
        return {"train/verdict_accuracy": num_right / num_judged}, num_right / num_judged

    fit(
        model,
        cfg,
        parallel,
        title="scalar reward model",
        inputs=inputs,
        batches_of=batches_of,
        loss_of=loss_of,
        metrics_of=metrics_of,
    )
    save_scalar(model, tokenizer, run_dir / "policy")
    parallel.barrier()  # no rank returns, or ends, while another still gathers or writes
    return run_dir / "policy"
