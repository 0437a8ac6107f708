"""The judges that are models: a generative one on an engine of its own or behind a URL, and a scalar one."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srpo.core.config.train import RewardConfig
from srpo.core.steps import StepSchema
from srpo.policy.scalar import ScalarModel, probabilities, scored_batches
from srpo.rewards.engine_writer import EngineWriter, Generator
from srpo.rewards.judge import GenerativeJudge, Writer
from srpo.rewards.judge_service import JudgeService
from srpo.rewards.scalar import ScalarCase, ScalarJudge
from srpo.rewards.verdict_cache import VerdictCache
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.rollout.vllm.engine import VllmEngine

KEY_VARIABLE = "OPENAI_API_KEY"


def open_judge(
    model: nn.Module, tokenizer: Any, schema: StepSchema, max_new_tokens: int, *, max_context: int = 0, cache: int = 0
) -> GenerativeJudge:
    """R_phi (4.3.1): greedy verdicts of a causal LM. Prompts that do not fit into its context get no verdict, which is counted.

    cache: questions whose verdicts are remembered. Raises ValueError where the verdicts alone would fill the context.
    """
    engine = LocalEngine(model, max_context=max_context)
    return _on_engine(engine, engine.max_context, tokenizer, schema, max_new_tokens, "local", cache)


def open_vllm_judge(
    path: str | Path, tokenizer: Any, schema: StepSchema, cfg: RewardConfig, *, device: torch.device, dtype: torch.dtype
) -> GenerativeJudge:
    """The same with vLLM in a process of its own (`reward.judge_vllm`), which ends with the judge. It keeps its checkpoint's
    weights: nothing is ever synced into it. Raises ValueError, ImportError and EngineError as `VllmEngine` does."""
    if cfg.judge_vllm.tensor_parallel_size != 1:
        raise ValueError(
            f"reward.judge_vllm.tensor_parallel_size is {cfg.judge_vllm.tensor_parallel_size}: only the policy's vLLM is split "
            "over ranks. Leave it at 1, or serve the judge elsewhere (reward.judge_engine 'url')"
        )
    try:
        engine = VllmEngine(path, device=device, dtype=dtype, max_context=cfg.judge_max_context, config=cfg.judge_vllm)
    except (ValueError, ImportError) as error:
        said = str(error).replace("rollout.vllm.", "reward.judge_vllm.").replace("rollout.engine", "reward.judge_engine")
        raise type(error)(f"the judge's engine: {said}") from error
    try:
        judge = _on_engine(
            engine, engine.max_context, tokenizer, schema, cfg.judge_max_new_tokens, f"vllm {path}", cfg.judge_cache, engine.close
        )
    except BaseException:
        engine.close()
        raise
    weakref.finalize(judge, engine.close)
    return judge


def _on_engine(
    engine: Generator,
    max_context: int,
    tokenizer: Any,
    schema: StepSchema,
    max_new_tokens: int,
    identity: str,
    cache: int,
    close: Callable[[], None] | None = None,
) -> GenerativeJudge:
    if max_new_tokens >= max_context:
        raise ValueError(
            f"{max_new_tokens} new tokens leave no room for a prompt in the judge's context of {max_context}: "
            "lower reward.judge_max_new_tokens (srpo.train_judge: max_new_tokens)"
        )
    writer = EngineWriter(engine, tokenizer, identity=identity, max_prompt_tokens=max_context - max_new_tokens, close=close)
    params = _greedy(max_new_tokens, stop_ids=(tokenizer.eos_token_id,))
    return GenerativeJudge(writer, schema, params, cache=VerdictCache(cache))


def open_service_judge(schema: StepSchema, cfg: RewardConfig) -> GenerativeJudge:
    """The judge behind `reward.judge_url`, with the key of the environment variable OPENAI_API_KEY, if it is set.

    The server is asked for one token now. Raises ValueError for settings that cannot work, and where the server does not answer
    (with fallback "missing" that is a warning).
    """
    service = JudgeService(cfg, api_key=os.environ.get(KEY_VARIABLE, ""))
    try:
        service.start()
    except BaseException:
        service.close()
        raise
    return service_judge(service, schema, cfg)


def service_judge(service: Writer, schema: StepSchema, cfg: RewardConfig) -> GenerativeJudge:
    """A judge that writes greedily through a service."""
    return GenerativeJudge(service, schema, _greedy(cfg.judge_max_new_tokens), cache=VerdictCache(cfg.judge_cache))


def _greedy(max_new_tokens: int, stop_ids: tuple[int, ...] = ()) -> SamplingParams:
    return SamplingParams(max_new_tokens, temperature=1.0, top_k=0, group_size=1, stop_ids=stop_ids, greedy=True)


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
