"""Supervised fine-tuning on pairs of prompt and response: `python -m srpo.sft @ my.toml`.

The warm start of the policy, and the first stage of the step judge. Runs alone or under torchrun.
"""

from __future__ import annotations

from srpo.core.config.sft import SftConfig
from srpo.core.errors import UserError
from srpo.core.ranges import check_ranges
from srpo.core.settings import check_command_line, run_program

if __name__ == "__main__":
    check_command_line(SftConfig)  # -h and mistakes answer before torch is imported

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from srpo_kernels import LossOptions, step_of_row

from srpo.algorithm.losses import last_step_factors, sft_weights
from srpo.core.batch import Batch, Rollout, pack
from srpo.core.digests import digest_of_data
from srpo.core.progress import Progress
from srpo.core.run_lock import locks_run_dir
from srpo.core.steps import parse_response
from srpo.data.chat import end_id
from srpo.data.checkpoint_tokens import stop_ids, without_end
from srpo.data.encoding import num_with_controls
from srpo.data.pairs import read_pairs
from srpo.data.prompts import wrapped
from srpo.data.tokenizer import encode, encode_prompt, load_tokenizer
from srpo.policy.adapters import add_adapter
from srpo.policy.loading import load_to_shard
from srpo.policy.model import Policy, check_head, save_policy
from srpo.policy.parallel import Parallel, distributed
from srpo.training.checks import check_device
from srpo.training.inputs import model_inputs, starting_policy
from srpo.training.outputs import Hidden, Logits, of_outputs
from srpo.training.supervised import batch_indices, fit

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # token ids of a prompt and of its response, end of text included


def pack_pairs(
    pairs: Sequence[Pair], parallel: Parallel, max_tokens: int, num_last: Sequence[int] = (), verdict_weight: float = 1.0
) -> list[Batch]:
    """This rank's share of a step's pairs as micro-batches. The weights times the step advantages add up to 1 over all ranks.

    A demonstration is packed as a `Rollout` with a single reasoning step of advantage 1; with `num_last`, the tokens of each
    response's last step, as one with two steps, whose advantages are `last_step_factors`.
    """
    lengths = [len(response) for _, response in pairs]
    factors = last_step_factors(lengths, num_last, verdict_weight) if num_last else torch.ones(len(pairs), 1)
    indices = range(parallel.rank, len(pairs), parallel.world_size)
    ends = [(lengths[i] - num_last[i], lengths[i]) if num_last else None for i in indices]
    rollouts = [Rollout.from_tokens(*pairs[i], step_ends) for i, step_ends in zip(indices, ends, strict=True)]
    return pack(rollouts, factors[list(indices)], sft_weights(lengths)[list(indices)], max_tokens)


def tokenized_pairs(cfg: SftConfig, tokenizer: Any, max_context: int, show: bool) -> list[Pair]:
    """All pairs as token ids. Raises UserError for a pair that is longer than the context or than a micro-batch."""
    texts = list(read_pairs(cfg.data))
    context = min(cfg.policy.max_context or max_context, max_context)
    pairs: list[Pair] = []
    if show and (num := num_with_controls(tokenizer, (text for pair in texts for text in pair))):
        print(f"{num:,} texts of {cfg.data} hold the text of special tokens, read as plain text (prompt has the template's)")
    with Progress("tokenizing", len(texts), enabled=show) as bar:
        for number, (prompt, response) in enumerate(texts, start=1):
            ids = encode_prompt(tokenizer, wrapped(prompt, cfg.prompt))
            pair = ids, (*encode(tokenizer, without_end(tokenizer, response)), end_id(tokenizer))
            length = len(pair[0]) + len(pair[1])
            if length > context:
                raise UserError(f"{cfg.data}, pair {number} has {length} tokens, more than the context of {context}: shorten it")
            if length - 1 > cfg.micro_batch_tokens:
                raise UserError(
                    f"{cfg.data}, pair {number} has {length} tokens, more than micro_batch_tokens = {cfg.micro_batch_tokens}: "
                    "raise it or shorten the pair"
                )
            pairs.append(pair)
            bar.advance()
    return pairs


def verdict_lengths(cfg: SftConfig, tokenizer: Any, pairs: Sequence[Pair], show: bool) -> list[int]:
    """Number of tokens of each response's last step, the end of text included; 0 for a response that lacks the answer of a step.

    Empty if `verdict_weight` is 1: the steps are then not looked for.
    """
    if cfg.verdict_weight == 1:
        return []
    schema, stops, lengths = cfg.schema, stop_ids(tokenizer), []
    for _, response in pairs:
        parsed = parse_response(schema, tokenizer, response, stops)
        start = (0, *parsed.step_ends)[-2]
        lengths.append(0 if None in parsed.answers else len(response) - start)
    if show and (num := lengths.count(0)):
        missing = f"lack the answer of a step ({', '.join(schema.names)})"
        print(f"{num:,} of {len(pairs):,} responses of {cfg.data} {missing}: all of their tokens weigh the same")
    return lengths


def _check_settings(cfg: SftConfig) -> None:
    check_ranges(cfg)
    if not cfg.data:
        raise UserError('data is not set: name a JSON Lines file of {"prompt": "...", "response": "..."}')


def sft_loss(outputs: Logits | Hidden, rows: Batch) -> torch.Tensor:
    """-sum of weight * step advantage * logprob over the rows of `Batch.rows()`; differentiable with respect to the outputs.

    Its gradient is that of the policy loss at ratio 1, so the loss kernel computes it in one pass over the logits, which it may
    overwrite.
    """
    out = outputs.loss(
        rows.labels,
        rows.step_advantages,
        rows.step_ends,
        rows.cu_seqlens,
        rows.weights,
        options=LossOptions(clip_eps_low=0.0, clip_eps_high=0.0, kl_coef=0.0, kl_estimator="k3", temperature=1.0),
    )
    index = torch.arange(len(rows.labels), device=rows.labels.device)
    weights = rows.weights * rows.step_advantages[step_of_row(rows.cu_seqlens, rows.step_ends, index)]
    return out.loss + (-(weights * out.logprobs).sum() - out.loss).detach()


@locks_run_dir
def sft(cfg: SftConfig, parallel: Parallel, files: Mapping[str, str] | None = None) -> Path:
    """Train and return the folder of the resulting checkpoint, `run_dir/policy`. Collective.

    files: further ones of that folder, {name: text}.
    A run that was killed continues from its last checkpoint when it is started again.
    """
    run_dir = Path(cfg.run_dir)
    _check_settings(cfg)
    check_device(cfg.policy, parallel)
    tokenizer = load_tokenizer(cfg.policy.path, cfg.policy.bos, cfg.policy.chat)
    model = load_to_shard(cfg.policy.path, parallel, cfg.policy)
    check_head(model, cfg.inputs)
    policy = Policy(add_adapter(model, cfg.policy, cfg.seed), activation_checkpointing=cfg.policy.activation_checkpointing)
    pairs = tokenized_pairs(cfg, tokenizer, policy.max_context, parallel.is_main)
    num_last = verdict_lengths(cfg, tokenizer, pairs, parallel.is_main)
    policy = parallel.shard(policy, dtype=cfg.policy.dtype)
    inputs = parallel.on_main(
        lambda: model_inputs(starting_policy(cfg.policy)) | {"the training data": (cfg.data, digest_of_data(cfg.data))}
    )

    def batches_of(step: int) -> list[Batch]:
        chosen = batch_indices(len(pairs), cfg.batch_size, step, cfg.seed)
        last = [num_last[i] for i in chosen] if num_last else ()
        return pack_pairs([pairs[i] for i in chosen], parallel, cfg.micro_batch_tokens, last, cfg.verdict_weight)

    def loss_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        _, rows = batch.rows()

        def ask(outputs: Logits | Hidden) -> tuple[torch.Tensor, torch.Tensor]:
            num_hits = outputs.num_hits(rows.labels)  # tokens with the highest logit; before the loss overwrites the logits
            return sft_loss(outputs, rows), torch.stack([num_hits, torch.full_like(num_hits, len(rows.labels))]).double()

        return of_outputs(policy, batch, cfg.inputs, ask)

    def metrics_of(sums: list[float]) -> tuple[dict[str, float], float]:
        num_hits, num_tokens = sums
        return {"train/token_accuracy": num_hits / num_tokens, "train/num_tokens": num_tokens}, num_hits / num_tokens

    fit(
        policy,
        cfg,
        parallel,
        title="SFT",
        inputs=inputs,
        batches_of=batches_of,
        loss_of=loss_of,
        metrics_of=metrics_of,
    )
    save_policy(policy, tokenizer, run_dir / "policy", files)
    parallel.barrier()  # no rank returns, or ends, while another still gathers or writes
    return run_dir / "policy"


main = distributed(sft)


if __name__ == "__main__":
    run_program(main, SftConfig)
