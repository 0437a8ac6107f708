"""Training of the scalar reward model (Appendix A) on judgments: binary cross-entropy per step. A part of `srpo.train_judge`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from srpo.batch import Batch
from srpo.data.examples import Example
from srpo.data.tokenizer import load_tokenizer
from srpo.metrics import MetricsLogger
from srpo.optim import learning_rate, make_optimizer, set_learning_rate
from srpo.policy.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from srpo.policy.model import load_policy
from srpo.policy.parallel import Parallel
from srpo.policy.scalar import ScalarModel, save_scalar, scalar_loss, scored_batches
from srpo.policy.update import optimizer_step
from srpo.progress import Progress
from srpo.rewards.judgments import Judgment
from srpo.rewards.scalar import ScalarCase, is_there, scalar_case
from srpo.run_dir import claim_run_dir
from srpo.sft import SftConfig, batch_indices
from srpo.steps import StepSchema


def signed_targets(cases: Sequence[ScalarCase], judgments: Sequence[Judgment]) -> torch.Tensor:
    """[N, J]: 1 where the annotator says "correct", -1 for "incorrect", 0 where nobody judged or the response lacks the step."""
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
    ValueError for a case that fits neither into the context nor into a micro-batch.
    """
    run_dir, main = Path(cfg.run_dir), parallel.is_main
    tokenizer: Any = load_tokenizer(cfg.policy.path)
    model = ScalarModel(
        load_policy(cfg.policy.path, experts=cfg.policy.experts), activation_checkpointing=cfg.policy.activation_checkpointing
    )
    cases = [scalar_case(examples[j.example_id], j.response, tokenizer, schema) for j in judgments]
    limit = min(cfg.policy.max_context or model.max_context, model.max_context, cfg.micro_batch_tokens)
    for case, judgment in zip(cases, judgments, strict=True):
        if len(case[0]) + len(case[1]) > limit:
            raise ValueError(
                f"a response to {judgment.example_id} has with its prompt {len(case[0]) + len(case[1])} tokens, more than "
                f"{limit}, the lower of the context and sft.micro_batch_tokens: raise that or leave it out"
            )
    targets = signed_targets(cases, judgments)
    model = parallel.shard(model, dtype=cfg.policy.dtype)
    optimizer = make_optimizer(model.parameters(), cfg.optimizer)
    claim_run_dir(run_dir, cfg, main)
    data = hashlib.blake2b(repr((cases, targets.tolist())).encode(), digest_size=16).hexdigest()
    done = 0
    if (checkpoint := latest_checkpoint(run_dir / "checkpoints")) is not None:
        extra = load_checkpoint(checkpoint, model, optimizer, parallel)
        if extra["data"] != data:
            raise ValueError(f"the judgments are not what {run_dir} has been trained on so far: give another run_dir")
        done = extra["step"]
    logger = MetricsLogger(run_dir, resume_step=done or None) if main else None
    hits = torch.zeros(2, dtype=torch.float64, device=parallel.device)  # verdicts on the right side of 0.5, verdicts

    def loss_of(batch: Batch) -> torch.Tensor:
        logits = model(batch)
        given = batch.step_advantages != 0
        right = ((logits.detach() >= 0) == (batch.step_advantages > 0)) & given
        hits.add_(torch.stack([right.sum(), given.sum()]))
        return scalar_loss(logits, batch.step_advantages)

    with Progress("scalar reward model", cfg.num_steps, start=done, enabled=main) as bar:
        for step in range(done, cfg.num_steps):
            chosen = batch_indices(len(cases), cfg.batch_size, step, cfg.seed)
            mine = chosen[parallel.rank :: parallel.world_size]
            weighted = targets[mine] / targets[chosen].abs().sum().clamp(min=1)
            batches = scored_batches([cases[i] for i in mine], weighted, tokenizer.eos_token_id, cfg.micro_batch_tokens)
            lr = learning_rate(cfg.optimizer, step, cfg.num_steps)
            set_learning_rate(optimizer, lr)
            hits.zero_()
            result = optimizer_step(
                model,
                optimizer,
                batches,
                loss_of,
                parallel,
                grad_clip=cfg.optimizer.grad_clip,
                dump=run_dir / "non_finite.pt",
                info={"step": step},
            )
            num_right, num_given = parallel.all_reduce_sum(hits).tolist()
            accuracy = num_right / max(num_given, 1)
            if logger is not None:
                metrics = {"train/loss": result.loss, "train/grad_norm": result.grad_norm, "train/lr": lr}
                logger.log(step + 1, metrics | {"train/verdict_accuracy": accuracy})
            bar.advance(1, loss=result.loss, right=accuracy)
            if (step + 1) % cfg.checkpoint_every == 0 or step + 1 == cfg.num_steps:
                if logger is not None:
                    logger.sync()
                save_checkpoint(
                    run_dir / "checkpoints", step + 1, model, optimizer, {"step": step + 1, "data": data}, parallel, keep=1
                )
    save_scalar(model, tokenizer, run_dir / "policy")
    parallel.barrier()  # no rank returns, or ends, while another still gathers or writes
    if logger is not None:
        logger.close()
    return run_dir / "policy"
