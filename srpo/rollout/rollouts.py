"""Converts samples of an engine to `Rollout`s: decodes, parses and numbers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srpo.core.batch import Rollout
from srpo.core.steps import StepSchema, parse_response
from srpo.data.checkpoint_tokens import stop_ids
from srpo.data.examples import Example
from srpo.rollout.engine import Sample


def to_rollouts(
    examples: Sequence[Example],
    samples: Sequence[Sample],
    prompts: Sequence[tuple[int, ...]],
    schema: StepSchema,
    tokenizer: Any,
    version: int,
    first_group: int = 0,
) -> list[Rollout]:
    """One unscored rollout per sample, in order. Samples of prompt i belong to examples[i] and to group first_group + i."""
    rollouts, stops = [], stop_ids(tokenizer)
    for sample in samples:
        i = sample.prompt_index
        parsed = parse_response(schema, tokenizer, sample.response_ids, stops)
        rollouts.append(
            Rollout(
                example_id=examples[i].example_id,
                group=first_group + i,
                prompt_ids=tuple(prompts[i]),
                response_ids=sample.response_ids,
                sampling_logprobs=sample.sampling_logprobs,
                step_ends=tuple(parsed.step_ends),
                answers=tuple(parsed.answers),
                text=parsed.text,
                finish=sample.finish,
                policy_version=version,
                support=sample.support,
                routed=sample.routed,
            )
        )
    return rollouts
