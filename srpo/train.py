"""Stepwise Reward Policy Optimization (Algorithm 1): `python -m srpo.train @ configs/x.toml`, or the same under torchrun.

The loop is `train`, on one screen; each of its phases is a function that can be called alone. What the phases work on is built
once by `build`. Killed at any moment and started again, a run goes on from its last complete checkpoint and ends the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from srpo.batch import Batch, Rollout, pack, write_rollouts
from srpo.checks import check_examples, check_prompt_lengths, check_settings
from srpo.config import Config, SamplerConfig
from srpo.credit import Credit, assign_credit, rollout_metrics, training_groups
from srpo.data.curriculum import Curriculum, all_examples, load_stages
from srpo.data.examples import Example
from srpo.data.prompts import build_prompt
from srpo.data.readers import load_examples
from srpo.data.tokenizer import encode, load_tokenizer
from srpo.evaluate import evaluate_policy
from srpo.metrics import MetricsLogger, evaluation_metrics
from srpo.optim import learning_rate, make_optimizer, set_learning_rate
from srpo.policy.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from srpo.policy.model import Policy, load_policy, save_policy
from srpo.policy.parallel import Parallel, init_parallel
from srpo.policy.scalar import load_scalar
from srpo.policy.update import Objective, update, with_logprobs
from srpo.ppo import Ppo
from srpo.progress import Progress
from srpo.rewards.audit import audit
from srpo.rewards.hybrid import score
from srpo.rewards.judge import Judge, OracleJudge
from srpo.rollout.collect import to_rollouts
from srpo.rollout.engine import Engine, SamplingParams
from srpo.rollout.judging import open_judge, open_scalar_judge
from srpo.rollout.open import open_engine
from srpo.rollout.refill import refill
from srpo.run_dir import claim_run_dir
from srpo.settings import run_program
from srpo.steps import StepSchema

MAX_EMPTY_STEPS = 10  # optimizer steps in a row without any group in the difficulty window before the run stops


def train(cfg: Config, parallel: Parallel) -> Path:
    """Train as configured and return the folder of the resulting checkpoint, `run_dir/policy`."""
    parts = build(cfg, parallel)
    run_dir, sampler, engine, policy = Path(cfg.run_dir), parts.sampler, parts.engine, parts.policy
    state = resume(cfg, parts, parallel)
    logger = _logger(cfg, state.step) if parallel.is_main else None
    bar = Progress("SRPO", cfg.num_steps, start=state.step, enabled=parallel.is_main)
    with bar:
        for step in range(state.step, cfg.num_steps):  # Algorithm 1
            clock = Clock()
            engine.sync_weights(policy, version=step)  # pi_old <- pi_theta
            clock.lap("sync")
            examples = sampler.next(cfg.rollout.num_prompts)  # line 2: stage, difficulty, diversity
            rollouts = generate(parts, examples, cfg, step, parallel)  # line 4
            clock.lap("rollout")
            rollouts = score_rollouts(parts, rollouts, examples, cfg)  # lines 6-9, Eq. 5
            examples, rollouts, rounds = refill_step(parts, examples, rollouts, cfg, step, parallel)  # 4.2.1
            everyone = [r for share in parallel.all_gather_object(rollouts) for r in share]
            audited = audit(state.audit, everyone, examples, parts.schema, cfg.reward)  # the judge against gold labels
            window = sampler.stage.settings
            credit = assign_credit(
                everyone, parts.schema, cfg.advantage, cfg.loss, window, cfg.rollout.max_new_tokens
            )  # lines 10-13
            sampler.observe([e.example_id for e in examples], [credit.group_scores[g] for g in range(len(examples))])  # 4.2.1
            state = state.after(credit, window, audited.state)
            clock.lap("score")
            batches = pack_mine(rollouts, credit, cfg, parallel)
            metrics = rollout_metrics(everyone, parts.schema, credit, cfg.advantage.clip) | audited.metrics(parts.schema)
            if credit.num_in_window:
                metrics |= policy_update(parts, batches, cfg, step, parallel)  # line 16, Eq. 6
            clock.lap("update")
            metrics |= sampler.metrics() | {"rollout/num_refill_rounds": rounds}
            due = (step + 1) % cfg.train.eval_every == 0 if cfg.train.eval_every else False
            if parts.eval_examples and (due or step + 1 == cfg.num_steps):
                metrics |= evaluate_now(parts, cfg, step + 1, parallel)
                clock.lap("eval")
            if logger is not None:
                if cfg.train.log_rollouts:
                    write_rollouts(run_dir / "rollouts.jsonl", sorted(everyone, key=lambda r: r.group), step + 1)
                logger.log(step + 1, metrics | clock.metrics(parts.engine))
            if sampler.end_step(metrics):  # 4.2.2
                bar.print(f"optimizer step {step + 1}: stage {sampler.stage.name!r} begins")
            if (step + 1) % cfg.train.checkpoint_every == 0 or step + 1 == cfg.num_steps:
                if logger is not None:
                    logger.sync()
                if parts.ppo is not None:
                    parts.ppo.save(step + 1, parallel)
                save_checkpoint(
                    run_dir / "checkpoints",
                    step + 1,
                    policy,
                    parts.optimizer,
                    state.to_dict(sampler),
                    parallel,
                    cfg.train.keep_checkpoints,
                )
            for alarm in audited.news:
                bar.print(f"optimizer step {step + 1}: {alarm}")
            bar.advance(1, reward=metrics["reward/total"])
    save_policy(policy, parts.tokenizer, run_dir / "policy")
    parallel.barrier()  # no rank returns, or ends, while another still gathers or writes
    if logger is not None:
        logger.close()
    engine.close()
    return run_dir / "policy"


# ---- what the phases work on ---------------------------------------------------------------------------------------------------


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
    loaded = load_policy(cfg.policy.path, experts=cfg.policy.experts)
    engine = open_engine(cfg, loaded, parallel)
    for some in (examples, eval_examples):
        prompts = [encode(tokenizer, build_prompt(example, cfg.data.prompt)) for example in some]
        check_prompt_lengths(prompts, some, sampling_params(cfg, tokenizer), engine.max_context, cfg.train.micro_batch_tokens)
    judge = make_judge(cfg, schema, parallel)
    check_examples(examples, eval_examples, schema, judge, cfg)
    sampler = Curriculum(stages, cfg.seed)
    reference = None
    if cfg.loss.kl_coef:
        frozen = load_policy(cfg.policy.reference or cfg.policy.path, experts=cfg.policy.experts).requires_grad_(False)
        reference = parallel.shard(Policy(frozen), dtype=cfg.policy.dtype)
    policy = Policy(loaded, activation_checkpointing=cfg.policy.activation_checkpointing)
    policy = parallel.shard(policy, dtype=cfg.policy.dtype)
    ppo = Ppo.of(cfg, parallel)
    claim_run_dir(Path(cfg.run_dir), cfg, parallel.is_main)
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
    if cfg.reward.judge == "generative":
        model = nn.Module.to(load_policy(cfg.reward.judge_path, experts=cfg.policy.experts), parallel.device)
        return open_judge(model, load_tokenizer(cfg.reward.judge_path), schema, cfg.reward.judge_max_new_tokens)
    if cfg.reward.judge == "scalar":
        model = load_scalar(cfg.reward.judge_path, experts=cfg.policy.experts).to(parallel.device)
        return open_scalar_judge(model, load_tokenizer(cfg.reward.judge_path), schema, graded=cfg.reward.scalar == "probability")
    return None


def sampling_params(cfg: Config, tokenizer: Any) -> SamplingParams:
    """The behaviour policy of 5.1.5."""
    return SamplingParams(
        max_new_tokens=cfg.rollout.max_new_tokens,
        temperature=cfg.rollout.temperature,
        top_k=cfg.rollout.top_k,
        group_size=cfg.rollout.group_size,
        stop_ids=(tokenizer.eos_token_id,),
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

    def to_dict(self, sampler: Curriculum) -> dict[str, Any]:
        """As plain values, for a checkpoint of this rank, with the state of the sampler."""
        return {**vars(self), "sampler": dict(sampler.state_dict()), "torch_rng": torch.get_rng_state()}


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


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from numbers: the same numbers give the same seed, different ones unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _logger(cfg: Config, step: int) -> MetricsLogger:
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
        """The time since the last lap belongs to `phase`."""
        now = time.perf_counter()
        self._laps[phase], self._last = now - self._last, now

    def metrics(self, engine: Engine) -> dict[str, float]:
        """The `time/*` metrics."""
        laps = {f"time/{phase}_s": seconds for phase, seconds in self._laps.items()}
        return laps | {
            "time/step_s": time.perf_counter() - self._start,
            "time/rollout_tokens_per_s": engine.stats()["tokens_per_s"],
        }


# ---- the phases ----------------------------------------------------------------------------------------------------------------


def generate(
    parts: Parts, examples: Sequence[Example], cfg: Config, step: int, parallel: Parallel, first: int = 0, refill_round: int = 0
) -> list[Rollout]:
    """This rank's share of the rollouts of examples[first:]: prompt first + i is rank i % world_size's and makes that group."""
    mine = list(range(first + parallel.rank, len(examples), parallel.world_size))
    prompts = [encode(parts.tokenizer, build_prompt(examples[i], cfg.data.prompt)) for i in mine]
    params = sampling_params(cfg, parts.tokenizer)
    seed = derive_seed(cfg.seed, step, parallel.rank, *([refill_round] if refill_round else []))
    samples = parts.engine.generate(prompts, params, seed=seed)
    rollouts = to_rollouts(
        [examples[i] for i in mine], samples, prompts, parts.schema, parts.tokenizer, parts.engine.policy_version
    )
    return [replace(rollout, group=mine[rollout.group]) for rollout in rollouts]


def score_rollouts(parts: Parts, rollouts: Sequence[Rollout], examples: Sequence[Example], cfg: Config) -> list[Rollout]:
    """The rollouts with the reward of each step (Eq. 5)."""
    return score(rollouts, [examples[r.group] for r in rollouts], parts.schema, parts.judge, cfg.reward.missing_verdict)


def refill_step(
    parts: Parts, examples: Sequence[Example], rollouts: Sequence[Rollout], cfg: Config, step: int, parallel: Parallel
) -> tuple[list[Example], list[Rollout], int]:
    """(examples, this rank's scored rollouts, rounds) with up to `sampler.refill` rounds of further prompts for groups that do
    not train."""

    def sample(examples: Sequence[Example], first: int, refill_round: int) -> list[Rollout]:
        return score_rollouts(parts, generate(parts, examples, cfg, step, parallel, first, refill_round), examples, cfg)

    def count(rollouts: Sequence[Rollout]) -> int:
        _, mine = training_groups(rollouts, parts.schema, cfg.advantage.method, parts.sampler.stage.settings)
        return sum(parallel.all_gather_object(len(mine)))

    return refill(
        examples,
        rollouts,
        num_prompts=cfg.rollout.num_prompts,
        max_rounds=cfg.sampler.refill,
        count=count,
        draw=parts.sampler.more,
        sample=sample,
    )


def pack_mine(rollouts: Sequence[Rollout], credit: Credit, cfg: Config, parallel: Parallel) -> list[Batch]:
    """Micro-batches of those of this rank's rollouts that train. `credit` has the rows of all ranks, rank by rank."""
    counts = parallel.all_gather_object(len(rollouts))
    first = sum(counts[: parallel.rank])
    mine = np.flatnonzero(credit.trains[first : first + len(rollouts)]).tolist()
    rows = torch.tensor(mine, dtype=torch.long) + first
    return pack([rollouts[i] for i in mine], credit.advantages[rows], credit.weights[rows], cfg.train.micro_batch_tokens)


def policy_update(parts: Parts, batches: Sequence[Batch], cfg: Config, step: int, parallel: Parallel) -> dict[str, float]:
    """`loss.num_updates` optimizer steps on Eq. 6; metrics are the last one's, the engine's mismatch the first one's."""
    lr = learning_rate(cfg.optimizer, step, cfg.num_steps)
    set_learning_rate(parts.optimizer, lr)
    batches = with_logprobs(batches, parts.policy, parts.reference, parts.objective, parallel)
    metrics: dict[str, float] = {"train/lr": lr}
    mismatch: dict[str, float] = {}
    if parts.ppo is not None:
        batches, values = parts.ppo.advantages(batches, parallel)
        metrics |= values | parts.ppo.update(batches, step, parallel)
    for _ in range(cfg.loss.num_updates):
        metrics |= update(
            parts.policy,
            parts.optimizer,
            batches,
            parts.objective,
            parallel,
            step_names=[spec.name for spec in cfg.steps],
            grad_clip=cfg.optimizer.grad_clip,
            dump=Path(cfg.run_dir) / "non_finite.pt",
            reference=parts.reference,
            info={"step": step},
        )
        mismatch = mismatch or {k: v for k, v in metrics.items() if k.startswith("rollout/mismatch")}
    return metrics | mismatch


def evaluate_now(parts: Parts, cfg: Config, version: int, parallel: Parallel) -> dict[str, float]:
    """The `eval/*` metrics of the policy as it is."""
    parts.engine.sync_weights(parts.policy, version=version)
    results, _ = evaluate_policy(
        parts.engine,
        parts.tokenizer,
        parts.schema,
        parts.eval_examples,
        prompt_template=cfg.data.prompt,
        max_new_tokens=cfg.rollout.max_new_tokens,
        batch_size=256,
        parallel=parallel,
    )
    return evaluation_metrics(results, tuple(spec.name for spec in cfg.steps))


def main(cfg: Config) -> None:
    """The program."""
    parallel = init_parallel()
    try:
        train(cfg, parallel)
    finally:
        parallel.close()


if __name__ == "__main__":
    run_program(main, Config)
