"""The judge R_phi that a configuration asks for (4.3.1): simulated, generative (here, in vLLM or behind a URL), or scalar."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srpo.core.config.train import Config, RewardConfig
from srpo.core.errors import UserError
from srpo.core.steps import StepSchema
from srpo.data.checkpoint_tokens import stop_ids
from srpo.data.tokenizer import load_tokenizer
from srpo.policy.folder import check_stored
from srpo.policy.model import load_policy
from srpo.policy.parallel import Parallel
from srpo.policy.scalar import ScalarModel, load_scalar, probabilities, scored_batches
from srpo.rewards.engine_writer import EngineWriter
from srpo.rewards.guidelines import guidelines_of
from srpo.rewards.judge import GenerativeJudge, Judge, OracleJudge, Writer
from srpo.rewards.judge_service import JudgeService
from srpo.rewards.scalar import ScalarCase, ScalarJudge
from srpo.rewards.verdict_cache import VerdictCache, work_metrics
from srpo.rollout.engine import Engine, SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.rollout.vllm.engine import VllmEngine

KEY_VARIABLE = "OPENAI_API_KEY"


def build_judge(cfg: Config, schema: StepSchema, parallel: Parallel) -> Judge | None:
    """The judge of `reward.judge`; None for "none". Raises UserError, ImportError or EngineError if it cannot start."""
    reward, dtype = cfg.reward, getattr(torch, cfg.policy.dtype)
    if reward.judge == "oracle":
        return OracleJudge(reward.judge_error_rate, cfg.seed, schema)
    if reward.judge == "generative" and reward.judge_engine == "url":
        return open_service_judge(schema, reward)
    if reward.judge == "generative" and reward.judge_engine == "vllm":
        parallel.on_main(lambda: check_stored(reward.judge_path))
        tokenizer = judge_tokenizer(reward)
        return open_vllm_judge(reward.judge_path, tokenizer, schema, reward, device=parallel.device, dtype=dtype)
    if reward.judge == "generative":
        model = nn.Module.to(load_policy(reward.judge_path, experts=cfg.policy.experts), parallel.device)
        tokenizer, limit = judge_tokenizer(reward), reward.judge_max_new_tokens
        return open_judge(
            model,
            tokenizer,
            schema,
            limit,
            max_context=reward.judge_max_context,
            cache=reward.judge_cache,
            guidelines=guidelines_of(reward),
        )
    if reward.judge == "scalar":
        model = load_scalar(reward.judge_path, experts=cfg.policy.experts).to(parallel.device)
        return open_scalar_judge(model, judge_tokenizer(reward), schema, graded=reward.scalar == "probability")
    return None


def judge_tokenizer(cfg: RewardConfig) -> Any:
    """The tokenizer in `reward.judge_path`, with `reward.judge_chat` applied. Raises UserError as `load_tokenizer` does."""
    try:
        return load_tokenizer(cfg.judge_path, chat=cfg.judge_chat)
    except UserError as error:
        message = str(error).replace("policy.chat.", "reward.judge_chat.").replace("policy.path", "reward.judge_path")
        raise type(error)(message) from error


def judge_metrics(judge: Judge | None, parallel: Parallel) -> dict[str, float]:
    """The `service/*` metrics of a generative judge since the last call, over all ranks; empty for other judges. Collective."""
    return work_metrics(parallel.all_gather_object(judge.take_counts())) if isinstance(judge, GenerativeJudge) else {}


def open_judge(
    model: nn.Module,
    tokenizer: Any,
    schema: StepSchema,
    max_new_tokens: int,
    *,
    max_context: int = 0,
    cache: int = 0,
    guidelines: str = "",
) -> GenerativeJudge:
    """A generative judge in this process: greedy verdicts of a causal LM.

    A prompt that does not fit into the model's context gets no verdict and is counted. `cache` is the number of judged responses
    whose verdicts are remembered. Raises UserError if `max_new_tokens` alone would fill the context.
    """
    engine = LocalEngine(model, max_context=max_context)
    return _on_engine(engine, tokenizer, schema, max_new_tokens, identity="local", cache=cache, guidelines=guidelines)


def open_vllm_judge(
    path: str | Path, tokenizer: Any, schema: StepSchema, cfg: RewardConfig, *, device: torch.device, dtype: torch.dtype
) -> GenerativeJudge:
    """A generative judge in a vLLM process (`reward.judge_vllm`), which ends with the judge. Its weights are never synced.

    Raises UserError as `VllmEngine` does.
    """
    if cfg.judge_vllm.tensor_parallel_size != 1:
        raise UserError(
            f"reward.judge_vllm.tensor_parallel_size is {cfg.judge_vllm.tensor_parallel_size}: only the policy's vLLM is split "
            "over ranks. Leave it at 1, or serve the judge elsewhere (reward.judge_engine 'url')"
        )
    try:
        engine = VllmEngine(path, device=device, dtype=dtype, max_context=cfg.judge_max_context, config=cfg.judge_vllm)
    except UserError as error:
        message = str(error).replace("rollout.vllm.", "reward.judge_vllm.").replace("rollout.engine", "reward.judge_engine")
        raise type(error)(f"the judge's engine: {message}") from error
    limit, cache = cfg.judge_max_new_tokens, cfg.judge_cache
    try:
        judge = _on_engine(
            engine,
            tokenizer,
            schema,
            limit,
            identity=f"vllm {path}",
            cache=cache,
            guidelines=guidelines_of(cfg),
            close=engine.close,
        )
    except BaseException:
        engine.close()
        raise
    weakref.finalize(judge, engine.close)
    return judge


def _on_engine(
    engine: Engine,
    tokenizer: Any,
    schema: StepSchema,
    max_new_tokens: int,
    *,
    identity: str,
    cache: int,
    guidelines: str,
    close: Callable[[], None] | None = None,
) -> GenerativeJudge:
    if max_new_tokens >= engine.max_context:
        raise UserError(
            f"{max_new_tokens} new tokens leave no room for a prompt in the judge's context of {engine.max_context}: "
            "lower reward.judge_max_new_tokens (srpo.train_judge: max_new_tokens)"
        )
    max_prompt_tokens = engine.max_context - max_new_tokens
    writer = EngineWriter(engine, tokenizer, identity=identity, max_prompt_tokens=max_prompt_tokens, close=close)
    params = _greedy(max_new_tokens, stop_ids(tokenizer))
    return GenerativeJudge(writer, schema, params, cache=VerdictCache(cache), guidelines=guidelines)


def open_service_judge(schema: StepSchema, cfg: RewardConfig) -> GenerativeJudge:
    """The judge behind `reward.judge_url`. Its API key is the environment variable OPENAI_API_KEY, if that is set.

    Its prompts are encoded here if `reward.judge_path` is set. Asks the server for one token. Raises UserError for settings that
    cannot work and if the server does not answer (with judge_fallback "missing" that is only a warning).
    """
    tokenizer = judge_tokenizer(cfg) if cfg.judge_path else None
    service = JudgeService(cfg, tokenizer=tokenizer, api_key=os.environ.get(KEY_VARIABLE, ""))
    try:
        service.start()
    except BaseException:
        service.close()
        raise
    return service_judge(service, schema, cfg)


def service_judge(service: Writer, schema: StepSchema, cfg: RewardConfig) -> GenerativeJudge:
    """A judge whose verdicts a service writes greedily."""
    params, cache = _greedy(cfg.judge_max_new_tokens), VerdictCache(cfg.judge_cache)
    return GenerativeJudge(service, schema, params, cache=cache, guidelines=guidelines_of(cfg))


def _greedy(max_new_tokens: int, stops: tuple[int, ...] = ()) -> SamplingParams:
    return SamplingParams(max_new_tokens, temperature=1.0, top_k=0, group_size=1, stop_ids=stops, greedy=True)


def open_scalar_judge(
    model: ScalarModel, tokenizer: Any, schema: StepSchema, *, graded: bool = False, batch_tokens: int = 8192
) -> ScalarJudge:
    """The scalar reward model of Appendix A as a judge. A case that does not fit into its context gets no verdict and is counted.

    graded: return probabilities instead of verdicts. `batch_tokens` packed tokens go through one forward pass.
    """

    def scorer(cases: Sequence[ScalarCase]) -> list[list[float]]:
        targets = torch.zeros(len(cases), schema.num_steps)
        batches = scored_batches(cases, targets, tokenizer.eos_token_id, max(batch_tokens, model.max_context))
        return probabilities(model, batches).tolist()

    return ScalarJudge(scorer, tokenizer, schema, max_tokens=model.max_context, graded=graded)
