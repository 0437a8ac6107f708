"""What a run of `srpo.train` works on: made once from its settings, saved in checkpoints and brought back from them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from srpo.core.config.train import Config, SamplerConfig
from srpo.core.metrics import MetricsLogger
from srpo.core.run_dir import claim_run_dir
from srpo.core.steps import StepSchema
from srpo.data.curriculum import Curriculum, all_examples, load_stages
from srpo.data.examples import Example
from srpo.data.prompts import build_prompt
from srpo.data.readers import load_examples
from srpo.data.tokenizer import encode, load_tokenizer
from srpo.policy.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from srpo.policy.loading import load_to_shard
from srpo.policy.model import Policy, check_head, load_policy
from srpo.policy.parallel import Parallel
from srpo.policy.routing import Routers
from srpo.policy.scalar import load_scalar
from srpo.rewards.build import open_judge, open_scalar_judge, open_service_judge, open_vllm_judge
from srpo.rewards.judge import GenerativeJudge, Judge, OracleJudge
from srpo.rewards.verdict_cache import work_metrics
from srpo.rollout.build import open_engine
from srpo.rollout.engine import Engine, SamplingParams
from srpo.training.checks import check_examples, check_prompt_lengths, check_settings, check_support
from srpo.training.credit import Credit
from srpo.training.optim import make_optimizer
from srpo.training.ppo import Ppo
from srpo.training.update import Objective

# How the judge's server is reached and waited for is nothing that a run is known by: it may be another when the run goes on.
OF_THE_SERVER = frozenset(
    f"reward.judge_{name}" for name in ("url", "timeout_s", "concurrency", "retries", "backoff_s", "fallback", "cache")
)
MAX_EMPTY_STEPS = 10  # optimizer steps in a row without any group in the difficulty window before the run stops


@dataclass(frozen=True)
class Parts:
    """Everything that lives as long as the run."""

    schema: StepSchema
    tokenizer: Any
    policy: Policy
    reference: Policy | None  # pi_ref of Eq. 6; None where loss.kl_coef is 0
    optimizer: torch.optim.Optimizer
    engine: Engine
    judge: Judge | None  # R_phi of Eq. 5
    sampler: Curriculum
    eval_examples: list[Example]
    objective: Objective
    ppo: Ppo | None  # the critic of advantage.method "ppo"


def build(cfg: Config, parallel: Parallel) -> Parts:
    """Read the data, make policy, reference, engine, judge and sampler, and claim the run folder.

    Raises ValueError for whatever could not work later; the folder is then left alone.
    """
    check_settings(cfg, parallel.world_size)
    schema = StepSchema(cfg.steps)
    options = [spec.options for spec in cfg.steps]
    stages = load_stages(cfg, lambda path: load_examples(path, schema.num_steps, options=options))
    examples = all_examples(stages)
    limit = cfg.train.eval_examples
    eval_examples = load_examples(cfg.data.eval, schema.num_steps, limit, options=options) if cfg.data.eval else []
    tokenizer = load_tokenizer(cfg.policy.path)
    loaded = load_to_shard(cfg.policy.path, parallel, experts=cfg.policy.experts)
    check_support(cfg, loaded.config.vocab_size)
    replay = cfg.rollout.routing == "replay"
    if replay:
        Routers(loaded)  # ValueError for a model whose routing cannot be replayed
    check_head(loaded, cfg.loss.inputs)
    engine = open_engine(cfg, loaded, parallel)
    for some in (examples, eval_examples):
        prompts = [encode(tokenizer, build_prompt(example, cfg.data.prompt)) for example in some]
        check_prompt_lengths(prompts, some, sampling_params(cfg, tokenizer), engine.max_context, cfg.train.micro_batch_tokens)
    judge = make_judge(cfg, schema, parallel)
    check_examples(examples, eval_examples, schema, judge, cfg)
    sampler = Curriculum(stages, cfg.seed)
    policy = Policy(loaded, activation_checkpointing=cfg.policy.activation_checkpointing, replay_routing=replay)
    policy = parallel.shard(policy, dtype=cfg.policy.dtype)  # before the next is read, so that rank 0 holds one whole model
    reference = None
    if cfg.loss.kl_coef:
        frozen = load_to_shard(cfg.policy.reference or cfg.policy.path, parallel, experts=cfg.policy.experts)
        check_head(frozen, cfg.loss.inputs)
        reference = parallel.shard(Policy(frozen.requires_grad_(False)), dtype=cfg.policy.dtype)
    ppo = Ppo.of(cfg, parallel)
    claim_run_dir(Path(cfg.run_dir), cfg, parallel.is_main, OF_THE_SERVER)
    return Parts(
        schema=schema,
        tokenizer=tokenizer,
        policy=policy,
        reference=reference,
        optimizer=make_optimizer(policy.parameters(), cfg.optimizer),
        engine=engine,
        judge=judge,
        sampler=sampler,
        eval_examples=eval_examples,
        objective=Objective.of(cfg.loss, cfg.rollout),
        ppo=ppo,
    )


def make_judge(cfg: Config, schema: StepSchema, parallel: Parallel) -> Judge | None:
    """R_phi as configured."""
    if cfg.reward.judge == "oracle":
        return OracleJudge(cfg.reward.judge_error_rate, cfg.seed, schema)
    reward = cfg.reward
    if reward.judge == "generative" and reward.judge_engine == "url":
        return open_service_judge(schema, reward)
    if reward.judge == "generative" and reward.judge_engine == "vllm":
        tokenizer, dtype = load_tokenizer(reward.judge_path), getattr(torch, cfg.policy.dtype)
        return open_vllm_judge(reward.judge_path, tokenizer, schema, reward, device=parallel.device, dtype=dtype)
    if reward.judge == "generative":
        model = nn.Module.to(load_policy(reward.judge_path, experts=cfg.policy.experts), parallel.device)
        tokenizer, limit = load_tokenizer(reward.judge_path), reward.judge_max_new_tokens
        return open_judge(model, tokenizer, schema, limit, max_context=reward.judge_max_context, cache=reward.judge_cache)
    if reward.judge == "scalar":
        model = load_scalar(reward.judge_path, experts=cfg.policy.experts).to(parallel.device)
        return open_scalar_judge(model, load_tokenizer(reward.judge_path), schema, graded=reward.scalar == "probability")
    return None


def judge_metrics(judge: Judge | None, parallel: Parallel) -> dict[str, float]:
    """The `service/*` metrics of what the judges of all ranks did since the last call of this; none but of a generative one.
    Collective."""
    return work_metrics(parallel.all_gather_object(judge.take_counts())) if isinstance(judge, GenerativeJudge) else {}


def sampling_params(cfg: Config, tokenizer: Any) -> SamplingParams:
    """The behaviour policy of 5.1.5."""
    return SamplingParams(
        max_new_tokens=cfg.rollout.max_new_tokens,
        temperature=cfg.rollout.temperature,
        top_k=cfg.rollout.top_k,
        group_size=cfg.rollout.group_size,
        stop_ids=(tokenizer.eos_token_id,),
        support=cfg.rollout.support == "replay",
        routing=cfg.rollout.routing == "replay",
    )


@dataclass(frozen=True)
class State:
    """What a checkpoint holds besides parameters and optimizer. All randomness is drawn from (seed, step, rank), so no generator
    is among it but torch's global one, kept in case a model drops out."""

    step: int = 0  # optimizer steps done
    empty_steps: int = 0  # of which the last so many had no group in the window
    audit: dict[str, Any] | None = None  # `srpo.rewards.audit`: the judge's errors so far

    def after(self, credit: Credit, window: SamplerConfig, audit: dict[str, Any] | None = None) -> State:
        """The state once this step is done. Raises ValueError when the window has let nothing through for MAX_EMPTY_STEPS."""
        empty = 0 if credit.num_in_window else self.empty_steps + 1
        if empty >= MAX_EMPTY_STEPS:
            scores = sorted(credit.group_scores.values())
            raise ValueError(
                f"no group has been in the difficulty window ({window.difficulty_low}, {window.difficulty_high}) for "
                f"{empty} steps; the last scores run from {scores[0]:.3f} to {scores[-1]:.3f}. Widen sampler.difficulty_low and "
                "difficulty_high, or start from a policy that is neither always wrong nor always right"
            )
        return State(self.step + 1, empty, audit)

    def to_dict(self, sampler: dict[str, Any]) -> dict[str, Any]:
        """As plain values, for a checkpoint of this rank, with the state of the sampler."""
        return {**vars(self), "sampler": sampler, "torch_rng": torch.get_rng_state()}


def resume(cfg: Config, parts: Parts, parallel: Parallel) -> State:
    """The state of the last complete checkpoint, loaded into the parts; a new state where there is none."""
    torch.manual_seed(derive_seed(cfg.seed, parallel.rank))
    checkpoint = latest_checkpoint(Path(cfg.run_dir) / "checkpoints")
    if checkpoint is None:
        return State()
    extra = load_checkpoint(checkpoint, parts.policy, parts.optimizer, parallel)
    torch.set_rng_state(extra.pop("torch_rng"))
    if parts.ppo is not None:
        parts.ppo.load(extra["step"], parallel)
    parts.sampler.load_state_dict(extra.pop("sampler"))
    return State(**extra)


def save(
    cfg: Config, parts: Parts, state: State, sampler: dict[str, Any], logger: MetricsLogger | None, parallel: Parallel
) -> None:
    """Write a checkpoint that `resume` goes on from; what was logged up to here is on the disk first. Collective.

    sampler: the state of `parts.sampler`, as the next step has to find it.
    """
    if logger is not None:
        logger.sync()
    if parts.ppo is not None:
        parts.ppo.save(state.step, parallel)
    save_checkpoint(
        Path(cfg.run_dir) / "checkpoints",
        state.step,
        parts.policy,
        parts.optimizer,
        state.to_dict(sampler),
        parallel,
        cfg.train.keep_checkpoints,
    )


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from numbers: the same numbers give the same seed, different ones unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def open_logger(cfg: Config, step: int) -> MetricsLogger:
    """The log of a run that goes on from `step`, cut back to it."""
    return MetricsLogger(
        Path(cfg.run_dir),
        resume_step=step or None,
        tensorboard=cfg.train.tensorboard,
        wandb=cfg.train.wandb,
        trackio=cfg.train.trackio,
        config=asdict(cfg),
    )


class Clock:
    """Seconds of each phase of one optimizer step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The time since the last lap belongs to `phase`, which may have several."""
        now = time.perf_counter()
        self._laps[phase] = self._laps.get(phase, 0.0) + now - self._last
        self._last = now

    def metrics(self, engine: Engine) -> dict[str, float]:
        """The `time/*` metrics."""
        laps = {f"time/{phase}_s": seconds for phase, seconds in self._laps.items()}
        return laps | {
            "time/step_s": time.perf_counter() - self._start,
            "time/rollout_tokens_per_s": engine.stats()["tokens_per_s"],
        }
