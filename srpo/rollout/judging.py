"""A generative judge on an engine of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from srpo.rewards.judge import GenerativeJudge
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.steps import StepSchema


def open_judge(model: nn.Module, tokenizer: Any, schema: StepSchema, max_new_tokens: int) -> GenerativeJudge:
    """R_phi (4.3.1): greedy verdicts of a causal LM. Prompts that do not fit into its context get no verdict, which is counted.

    Raises ValueError where the verdicts alone would fill the context.
    """
    engine = LocalEngine(model)
    if max_new_tokens >= engine.max_context:
        raise ValueError(
            f"{max_new_tokens} new tokens leave no room for a prompt in the judge's context of {engine.max_context}: "
            "lower reward.judge_max_new_tokens (srpo.train_judge: max_new_tokens)"
        )
    params = SamplingParams(
        max_new_tokens, temperature=1.0, top_k=0, group_size=1, stop_ids=(tokenizer.eos_token_id,), greedy=True
    )
    return GenerativeJudge(engine, tokenizer, schema, params, max_prompt_tokens=engine.max_context - max_new_tokens)
