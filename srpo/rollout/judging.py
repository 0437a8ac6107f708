"""The judges that are models: a generative one on an engine of its own, and a scalar one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from srpo.policy.scalar import ScalarModel, probabilities, scored_batches
from srpo.rewards.judge import GenerativeJudge
from srpo.rewards.scalar import ScalarCase, ScalarJudge
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


def open_scalar_judge(
    model: ScalarModel, tokenizer: Any, schema: StepSchema, *, graded: bool = False, batch_tokens: int = 8192
) -> ScalarJudge:
    """The scalar rival of R_phi (Appendix A). Cases that do not fit into its context get no verdict, which is counted.

    `batch_tokens` packed tokens go through one forward; `graded` gives probabilities instead of verdicts.
    """

    def scorer(cases: Sequence[ScalarCase]) -> list[list[float]]:
        targets = torch.zeros(len(cases), schema.num_steps)
        batches = scored_batches(cases, targets, tokenizer.eos_token_id, max(batch_tokens, model.max_context))
        return probabilities(model, batches).tolist()

    return ScalarJudge(scorer, tokenizer, schema, max_tokens=model.max_context, graded=graded)
