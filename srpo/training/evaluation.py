"""Greedy responses of a policy to held-out examples, and their scores (5.1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from srpo.core.batch import Rollout
from srpo.core.config.evaluation import BootstrapConfig
from srpo.core.progress import Progress
from srpo.core.steps import StepSchema
from srpo.data.checkpoint_tokens import stop_ids
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm
from srpo.data.tokenizer import encode_prompts
from srpo.policy.parallel import Parallel
from srpo.rollout.engine import Engine, SamplingParams
from srpo.rollout.rollouts import to_rollouts
from srpo.scores.evaluation import collapse, results_dict
from srpo.scores.tally import true_grades


def evaluate_policy(
    engine: Engine,
    tokenizer: Any,
    schema: StepSchema,
    examples: Sequence[Example],
    *,
    form: PromptForm,
    max_new_tokens: int,
    batch_size: int,
    parallel: Parallel | None = None,
    description: str = "evaluation",
    by: Sequence[str] = ("query_type",),
    bootstrap: BootstrapConfig | None = None,
) -> tuple[dict[str, Any], list[Rollout]]:
    """(results of `results_dict`, rollouts) of one greedy response per example, in the order of the examples (5.1.2).

    by, bootstrap: as in `results_dict`; training passes no `bootstrap`, so that it spends no time on intervals.
    With `parallel` the call is collective: each rank decodes its share, and all ranks return the same. Raises UserError for an
    example without a grade or with a prompt that does not fit.
    """
    true_grades(examples, schema.grades)
    rank, world_size = (parallel.rank, parallel.world_size) if parallel is not None else (0, 1)
    params = SamplingParams(max_new_tokens, temperature=1.0, top_k=0, group_size=1, stop_ids=stop_ids(tokenizer), greedy=True)
    indices = range(rank, len(examples), world_size)
    rollouts: dict[int, Rollout] = {}
    with Progress(description, len(indices), enabled=rank == 0) as bar:
        for first in range(0, len(indices), batch_size):
            chunk = indices[first : first + batch_size]
            chosen = [examples[i] for i in chunk]
            prompts = encode_prompts(tokenizer, chosen, form)
            samples = engine.generate(prompts, params, seed=0)
            responses = to_rollouts(chosen, samples, prompts, schema, tokenizer, engine.policy_version)
            rollouts |= {i: replace(rollout, group=i) for i, rollout in zip(chunk, responses, strict=True)}
            bar.advance(len(chunk))
    if parallel is not None and world_size > 1:
        rollouts = {i: rollout for share in parallel.all_gather_object(rollouts) for i, rollout in share.items()}
    ordered = [rollouts[i] for i in range(len(examples))]
    results = results_dict(ordered, examples, schema, by=by, bootstrap=bootstrap)
    if rank == 0 and (warning := collapse(results)):
        print(f"{description}: {warning}", flush=True)
    return results, ordered
