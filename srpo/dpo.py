"""Direct preference optimization (DPO) on pairs of responses: `python -m srpo.dpo @ my.toml`.

The DPO baseline of 5.1.4. Pairs are made from the responses that a run has sampled (`rollouts`), or read from a file (`pairs`).
Their log-probabilities under the reference policy are computed once, before training. Runs alone or under torchrun.
"""

from __future__ import annotations

from srpo.core.config.dpo import DpoConfig
from srpo.core.errors import UserError, naming
from srpo.core.ranges import check_ranges
from srpo.core.settings import check_command_line, run_program

if __name__ == "__main__":
    check_command_line(DpoConfig)  # -h and mistakes answer before torch is imported

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from srpo_kernels import step_of_row

from srpo.algorithm.losses import dpo_loss
from srpo.core.batch import Batch, Rollout, pack, read_rollouts
from srpo.core.digests import digest_of, digest_of_bytes
from srpo.core.files import whole_file, write_whole
from srpo.core.progress import Progress
from srpo.core.run_dir import Inputs, claim_run_dir
from srpo.core.run_lock import locks_run_dir
from srpo.core.steps import without_stops
from srpo.data.chat import end_id
from srpo.data.checkpoint_tokens import check_rows, highest_id, stop_ids, without_end
from srpo.data.encoding import num_with_controls
from srpo.data.preferences import Preference, pairs_from_rollouts, read_preferences
from srpo.data.prompts import wrapped
from srpo.data.readers import load_examples
from srpo.data.tokenizer import encode, encode_prompt, load_tokenizer
from srpo.policy.adapters import add_adapter
from srpo.policy.loading import load_to_shard
from srpo.policy.model import Policy, check_head, save_policy
from srpo.policy.parallel import Parallel, distributed
from srpo.training.changes import SUPERVISED
from srpo.training.checks import check_device
from srpo.training.inputs import model_inputs, starting_policy
from srpo.training.outputs import Hidden, Logits, of_outputs
from srpo.training.supervised import batch_indices, fit
from srpo.training.update import level

REFERENCE_BATCH = 256  # pairs that the reference scores between two updates of the progress bar


def load_preferences(cfg: DpoConfig, tokenizer: Any) -> tuple[list[Preference], dict[str, Any]]:
    """(all pairs as token ids, counts of how they were made).

    Raises UserError for a file that cannot be used, and for rollouts that make no pair.
    """
    if cfg.pairs:
        texts = list(read_preferences(cfg.pairs))

        def target(text: str) -> tuple[int, ...]:
            return (*encode(tokenizer, without_end(tokenizer, text)), end_id(tokenizer))

        pairs = [
            Preference(encode_prompt(tokenizer, wrapped(prompt, cfg.prompt)), target(chosen), target(rejected))
            for prompt, chosen, rejected in texts
        ]
        num_special = num_with_controls(tokenizer, (text for row in texts for text in row))
        special = {"num_texts_with_special_tokens": num_special} if num_special else {}  # their text is plain text
        return pairs, {"num_pairs": len(pairs)} | special
    labels = None
    if cfg.data:
        examples = load_examples(cfg.data, cfg.schema, columns=cfg.columns)
        labels = {e.example_id: e.gold[-1] if e.gold else None for e in examples}
    rollouts = [rollout for _, rollout in read_rollouts(Path(cfg.rollouts))]
    if not rollouts:
        raise UserError(f"{cfg.rollouts} has no rollouts: set train.log_rollouts in the run that writes it")
    _check_tokenizer(cfg, tokenizer, rollouts)
    return pairs_from_rollouts(rollouts, labels, cfg.rules)


def _check_tokenizer(cfg: DpoConfig, tokenizer: Any, rollouts: Sequence[Rollout]) -> None:
    """Raise UserError if the rollouts were sampled with another tokenizer than the policy's."""
    highest, stops = highest_id(tokenizer), stop_ids(tokenizer)
    for rollout in rollouts[:100]:
        ids = list(without_stops(tokenizer, rollout.response_ids, stops))
        # A model may have more rows than the tokenizer has ids, and sample them: they decode to nothing.
        if max(rollout.prompt_ids, default=0) > highest or tokenizer.decode(ids) != rollout.text:
            raise UserError(
                f"{cfg.rollouts}: the tokens of {rollout.example_id} are not its text in the tokenizer of {cfg.policy.path}: "
                "set policy.path to the policy that sampled them, or give the pairs as texts (pairs)"
            )


def _check_settings(cfg: DpoConfig) -> None:
    check_ranges(cfg)
    if bool(cfg.pairs) == bool(cfg.rollouts):
        raise UserError("set either pairs (a file of preferences) or rollouts (responses to make pairs from)")
    if cfg.pairs and (cfg.data or cfg.rules.balance):
        key, off = ("data", '""') if cfg.data else ("rules.balance", "false")
        raise UserError(f"{key} is set, but only applies to pairs that are made from rollouts: set {key} to {off}")
    if cfg.columns and not cfg.data:
        raise UserError("columns is set, but data is not, whose columns they are: set data, or leave columns out")


def _check_pairs(cfg: DpoConfig, pairs: Sequence[Preference], max_context: int, vocab_size: int) -> None:
    context = min(cfg.policy.max_context or max_context, max_context)
    for number, pair in enumerate(pairs, start=1):
        name = f"pair {number}" + (f" (of {pair.example_id})" if pair.example_id else "")
        if not (pair.prompt_ids and pair.chosen_ids and pair.rejected_ids):
            raise UserError(f"{name} has an empty prompt or response: remove the pair")
        if pair.chosen_ids == pair.rejected_ids:
            raise UserError(f"{name} has the same tokens as chosen and as rejected response: remove the pair")
        if (highest := max(pair.prompt_ids + pair.chosen_ids + pair.rejected_ids)) >= vocab_size:
            raise UserError(
                f"{name} has the token {highest}, and the model in {cfg.policy.path} has {vocab_size}: set policy.path to the "
                "policy that sampled it"
            )
        longest = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        if longest > context:
            raise UserError(f"{name} has {longest} tokens, more than the context of {context}: shorten or remove the pair")
        if num_rows(pair) > cfg.micro_batch_tokens:
            raise UserError(
                f"{name} has {num_rows(pair)} rows, more than micro_batch_tokens = {cfg.micro_batch_tokens}: raise it; "
                "a pair is never split"
            )


def num_rows(pair: Preference) -> int:
    """Number of packed rows of both sequences; the last token of a sequence is not an input."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) - 2


def pack_preferences(pairs: Sequence[Preference], reference: torch.Tensor, max_tokens: int) -> list[Batch]:
    """Micro-batches of whole pairs: in a batch, sequence 2p is the chosen and 2p + 1 the rejected response of pair p.

    reference [len(pairs), 2]: log-probabilities of whole responses under the reference policy. `ref_logprobs` holds each at the
    first token of its response and 0 elsewhere, because DPO uses only the sum over a response.
    """
    batches, first, rows = [], 0, 0
    for i, pair in enumerate(pairs):
        if i > first and rows + num_rows(pair) > max_tokens:
            batches.append(_pack_whole(pairs[first:i], reference[first:i]))
            first, rows = i, 0
        rows += num_rows(pair)
    return [*batches, _pack_whole(pairs[first:], reference[first:])] if pairs else []


def _pack_whole(pairs: Sequence[Preference], reference: torch.Tensor) -> Batch:
    rollouts = [Rollout.from_tokens(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    (batch,) = pack(rollouts, torch.zeros(len(rollouts), 1), torch.ones(len(rollouts)))
    starts = batch.cu_seqlens[:-1].long() + torch.tensor([len(rollout.prompt_ids) - 1 for rollout in rollouts])
    return batch.with_(ref_logprobs=torch.zeros(len(batch.labels)).index_copy(0, starts, reference.reshape(-1).float()))


def response_logprobs(outputs: Logits | Hidden, rows: Batch) -> torch.Tensor:
    """Log-probability of each whole response under the unfiltered softmax at temperature 1, [N] fp32, differentiable."""
    return _by_sequence(outputs.logprobs(rows.labels, temperature=1.0), rows)


def _by_sequence(values: torch.Tensor, rows: Batch) -> torch.Tensor:
    """Sums over the rows of each sequence, [N]."""
    index = torch.arange(len(values), device=values.device)
    sequence, _ = step_of_row(rows.cu_seqlens, rows.step_ends, index)
    return values.new_zeros(rows.num_sequences).index_add(0, sequence, values)


@torch.no_grad()
def reference_logprobs(
    model: torch.nn.Module,
    pairs: Sequence[Preference],
    max_tokens: int,
    parallel: Parallel,
    inputs: Literal["logits", "hidden"] = "logits",
) -> torch.Tensor:
    """Log-probabilities of the chosen and the rejected responses, [len(pairs), 2] fp32, the same on every rank. Collective."""

    def sums_of(batch: Batch) -> torch.Tensor:
        return of_outputs(model, batch, inputs, lambda outputs: response_logprobs(outputs, batch.rows()[1]))

    logprobs = torch.zeros(len(pairs), 2, device=parallel.device)
    with Progress("reference", len(pairs), enabled=parallel.is_main) as bar:
        for first in range(0, len(pairs), REFERENCE_BATCH):
            indices = range(first + parallel.rank, min(first + REFERENCE_BATCH, len(pairs)), parallel.world_size)
            batches = pack_preferences([pairs[i] for i in indices], torch.zeros(len(indices), 2), max_tokens)
            sums = [sums_of(batch) for batch in level(batches, parallel)][: len(batches)]
            if sums:
                logprobs[torch.tensor(indices, device=parallel.device)] = torch.cat(sums).reshape(-1, 2)
            bar.advance(min(REFERENCE_BATCH, len(pairs) - first))
    return parallel.all_reduce_sum(logprobs).cpu()


@locks_run_dir
def dpo(cfg: DpoConfig, parallel: Parallel) -> Path:
    """Train and return the folder of the resulting checkpoint, `run_dir/policy`. Collective.

    A run that was killed continues from its last checkpoint when it is started again.
    """
    run_dir, main = Path(cfg.run_dir), parallel.is_main
    _check_settings(cfg)
    check_device(cfg.policy, parallel)
    tokenizer = load_tokenizer(cfg.policy.path, cfg.policy.bos, cfg.policy.chat)
    if cfg.policy.reference:
        check_rows(tokenizer, cfg.policy.reference, cfg.policy.path)
    pairs, counts = load_preferences(cfg, tokenizer)
    loaded = load_to_shard(cfg.policy.path, parallel, cfg.policy)
    check_head(loaded, cfg.inputs)
    policy = Policy(add_adapter(loaded, cfg.policy, cfg.seed), activation_checkpointing=cfg.policy.activation_checkpointing)
    _check_pairs(cfg, pairs, policy.max_context, loaded.config.vocab_size)
    policy = parallel.shard(policy, dtype=cfg.policy.dtype)
    inputs = parallel.on_main(lambda: _inputs(cfg, pairs))
    claim_run_dir(run_dir, cfg, main, SUPERVISED.allowed, inputs, SUPERVISED.contents)
    if main:
        write_whole(run_dir / "pairs.json", json.dumps(counts, indent=1) + "\n")
        print(f"{counts['num_pairs']} pairs; counts are in {run_dir / 'pairs.json'}", flush=True)
    reference = _reference(cfg, policy, pairs, digest_of(inputs.items()), parallel)
    names = ("accuracy", "margin", "chosen_reward", "rejected_reward")

    def batches_of(step: int) -> list[Batch]:
        chosen = batch_indices(len(pairs), cfg.batch_size, step, cfg.seed)[parallel.rank :: parallel.world_size]
        return pack_preferences([pairs[i] for i in chosen], reference[chosen], cfg.micro_batch_tokens)

    def loss_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        _, rows = batch.rows()
        assert rows.ref_logprobs is not None
        logprobs = of_outputs(policy, batch, cfg.inputs, lambda outputs: response_logprobs(outputs, rows))
        # Drops an odd last sequence: `level` pads with empty batches, each a single sequence without rows.
        logprobs, ref = (x[: len(x) // 2 * 2].reshape(-1, 2) for x in (logprobs, _by_sequence(rows.ref_logprobs, rows)))
        out = dpo_loss(
            logprobs[:, 0], logprobs[:, 1], ref[:, 0], ref[:, 1], cfg.beta, cfg.batch_size, label_smoothing=cfg.label_smoothing
        )
        num_tokens = torch.tensor(len(rows.labels), dtype=torch.float64, device=parallel.device)
        return out.loss, torch.stack([*(out.sums[name] for name in names), num_tokens])

    def metrics_of(sums: list[float]) -> tuple[dict[str, float], float]:
        *sums, num_tokens = sums
        metrics = {f"dpo/{name}": total / cfg.batch_size for name, total in zip(names, sums, strict=True)}
        return metrics | {"train/num_tokens": num_tokens}, metrics["dpo/accuracy"]

    fit(
        policy,
        cfg,
        parallel,
        title="DPO",
        inputs=inputs,
        batches_of=batches_of,
        loss_of=loss_of,
        metrics_of=metrics_of,
    )
    save_policy(policy, tokenizer, run_dir / "policy")
    parallel.barrier()  # no rank returns, or ends, while another still gathers or writes
    return run_dir / "policy"


def _reference(
    cfg: DpoConfig, policy: torch.nn.Module, pairs: Sequence[Preference], key: str, parallel: Parallel
) -> torch.Tensor:
    """`reference_logprobs` of all pairs, read from the run folder, or computed and written there. Collective.

    The reference is `policy.reference`, or else the starting policy; it is in memory only before the first optimizer step.
    """
    path = Path(cfg.run_dir) / "reference.safetensors"
    if path.is_file():
        return _stored_reference(path, key)
    model = policy
    if cfg.policy.reference:
        frozen = load_to_shard(cfg.policy.reference, parallel, cfg.policy).requires_grad_(False)
        check_head(frozen, cfg.inputs)
        model = parallel.shard(Policy(frozen), dtype=cfg.policy.dtype)
    logprobs = reference_logprobs(model, pairs, cfg.micro_batch_tokens, parallel, cfg.inputs)
    if parallel.is_main:
        with whole_file(path) as part:
            # Not `save_file`, which has a temporary file of its own, and leaves it if the process is killed.
            part.write_bytes(save({"logprobs": logprobs}, {"key": key, "digest": digest_of_bytes(logprobs.numpy().tobytes())}))
    parallel.barrier()
    return logprobs


def _stored_reference(path: Path, key: str) -> torch.Tensor:
    """The log-probabilities that `_reference` has stored. Raises UserError if they are not as they were written."""
    try:
        with naming(path), safe_open(path, "pt") as file:
            logprobs, stored = file.get_tensor("logprobs"), file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, then it is computed again") from error
    if stored.get("digest") != digest_of_bytes(logprobs.numpy().tobytes()) or stored.get("key") != key:
        raise UserError(f"{path} is damaged, or of other inputs: remove it, then it is computed again")
    return logprobs


def _inputs(cfg: DpoConfig, pairs: Sequence[Preference]) -> Inputs:
    models = starting_policy(cfg.policy) | {"the reference": cfg.policy.reference or cfg.policy.path}
    return model_inputs(models) | {"the file of pairs": (cfg.pairs or cfg.rollouts, digest_of(pairs))}


main = distributed(dpo)


if __name__ == "__main__":
    run_program(main, DpoConfig)
