"""Stepwise Reward Policy Optimization (Algorithm 1): `python -m srpo.train @ configs/x.toml`, or the same under torchrun.

The loop is `train`, on one screen; each of its phases is a function that can be called alone. What the phases work on is built
once by `build`. Killed at any moment and started again, a run goes on from its last complete checkpoint and ends the same.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import torch

from srpo.core.batch import Batch, Rollout, pack, write_rollouts
from srpo.core.config.train import Config
from srpo.core.metrics import evaluation_metrics
from srpo.core.progress import Progress
from srpo.core.settings import run_program
from srpo.data.examples import Example
from srpo.data.prompts import build_prompt
from srpo.data.tokenizer import encode
from srpo.evaluate import evaluate_policy
from srpo.policy.model import save_policy
from srpo.policy.parallel import Parallel, init_parallel
from srpo.rewards.audit import audit
from srpo.rewards.hybrid import score
from srpo.rollout.rollouts import to_rollouts
from srpo.training.credit import Credit, assign_credit, rollout_metrics, training_groups
from srpo.training.optim import learning_rate, set_learning_rate
from srpo.training.prefetch import Ahead
from srpo.training.refill import refill
from srpo.training.run import Clock, Parts, build, derive_seed, judge_metrics, open_logger, resume, sampling_params, save
from srpo.training.stream import check_age, quota, stream_scored
from srpo.training.update import update, with_logprobs


def train(cfg: Config, parallel: Parallel) -> Path:
    """Train as configured and return the folder of the resulting checkpoint, `run_dir/policy`."""
    parts = build(cfg, parallel)
    run_dir, sampler, engine, policy = Path(cfg.run_dir), parts.sampler, parts.engine, parts.policy
    state = resume(cfg, parts, parallel)
    logger = open_logger(cfg, state.step) if parallel.is_main else None
    bar = Progress("SRPO", cfg.num_steps, start=state.step, enabled=parallel.is_main)
    with bar, Ahead(sampler, lambda *work: sample(parts, cfg, parallel, *work)) as ahead:
        for step in range(state.step, cfg.num_steps):  # Algorithm 1
            clock = Clock()
            taken = ahead.take()  # off_policy_steps 1: sampled beside the last update
            clock.lap("rollout")
            engine.sync_weights(policy, version=step)  # pi_old <- pi_theta
            clock.lap("sync")
            examples, rollouts, metrics = collect(parts, cfg, step, parallel, taken)  # lines 2, 4 and 6-9, Eq. 5
            clock.lap("rollout")
            everyone = gather(rollouts, cfg, step, parallel)
            audited = audit(state.audit, everyone, examples, parts.schema, cfg.reward)  # the judge against gold labels
            window, longest = sampler.stage.settings, cfg.rollout.max_new_tokens
            credit = assign_credit(everyone, parts.schema, cfg.advantage, cfg.loss, window, longest)  # lines 10-13
            sampler.observe([e.example_id for e in examples], [credit.group_scores[g] for g in range(len(examples))])  # 4.2.1
            state = state.after(credit, window, audited.state)
            metrics |= rollout_metrics(everyone, parts.schema, credit, cfg.advantage.clip) | audited.metrics(parts.schema)
            metrics |= sampler.metrics() | judge_metrics(parts.judge, parallel)
            batches = pack_mine(rollouts, credit, cfg, parallel)
            clock.lap("score")
            if cfg.rollout.off_policy_steps and step + 1 < cfg.num_steps:
                ahead.start(cfg.rollout.num_started, step + 1)
            else:
                engine.sleep()  # its memory is the update's; the next sync wakes it
            if credit.num_in_window:
                metrics |= policy_update(parts, batches, cfg, step, parallel)  # line 16, Eq. 6
            clock.lap("update")
            if parts.eval_examples and evaluation_due(cfg, step + 1):
                ahead.wait()
                metrics |= evaluate_now(parts, cfg, step + 1, parallel)
                clock.lap("eval")
            if logger is not None:
                if cfg.train.log_rollouts:
                    write_rollouts(run_dir / "rollouts.jsonl", sorted(everyone, key=lambda r: r.group), step + 1)
                logger.log(step + 1, metrics | clock.metrics(parts.engine))
            if sampler.end_step(metrics):  # 4.2.2
                ahead.drop()  # it is of the stage that is over
                bar.print(f"optimizer step {step + 1}: stage {sampler.stage.name!r} begins")
            if (step + 1) % cfg.train.checkpoint_every == 0 or step + 1 == cfg.num_steps:
                save(cfg, parts, state, ahead.sampler_state(), logger, parallel)
            for alarm in audited.news:
                bar.print(f"optimizer step {step + 1}: {alarm}")
            bar.advance(1, reward=metrics["reward/total"])
    save_policy(policy, parts.tokenizer, run_dir / "policy")
    parallel.barrier()  # no rank returns, or ends, while another still gathers or writes
    if logger is not None:
        logger.close()
    engine.close()
    return run_dir / "policy"


# ---- the phases ----------------------------------------------------------------------------------------------------------------


def collect(
    parts: Parts, cfg: Config, step: int, parallel: Parallel, taken: tuple[list[Example], list[Rollout]] | None = None
) -> tuple[list[Example], list[Rollout], dict[str, float]]:
    """(the prompts of an optimizer step by stage, difficulty and diversity, this rank's scored rollouts of them, metrics).

    taken: what was sampled beside the last update, in place of a draw. Groups that were cut are gone, and up to `sampler.refill`
    rounds of further prompts have been sampled for those that do not train (4.2.1).
    """
    if taken is None:
        examples = parts.sampler.next(cfg.rollout.num_started)
        taken = examples, sample(parts, cfg, parallel, examples, step)
    examples, rollouts, num_cut = keep_finished(parts, *taken, cfg, parallel)
    examples, rollouts, num_rounds = refill_step(parts, examples, rollouts, cfg, step, parallel)
    return examples, rollouts, {"rollout/num_refill_rounds": num_rounds} | num_cut


def sample(
    parts: Parts,
    cfg: Config,
    parallel: Parallel,
    examples: Sequence[Example],
    step: int,
    stop: Event | None = None,
    first: int = 0,
    refill_round: int = 0,
) -> list[Rollout]:
    """This rank's scored rollouts of examples[first:]; those of the first ones to finish where `rollout` says so. Not collective.

    A refill round is finished to the last group.
    """
    enough = quota(cfg.rollout.num_prompts, parallel.world_size, cfg.rollout.cut_tail) if cfg.rollout.cuts else 0
    return stream_scored(
        generate(parts, examples, cfg, step, parallel, first, refill_round),
        lambda rollouts: score_rollouts(parts, rollouts, examples, cfg),
        overlap=cfg.rollout.overlap == "on" or (cfg.rollout.overlap == "auto" and cfg.rollout.engine == "vllm"),
        enough=0 if refill_round else enough,
        stop=stop,
    )


def generate(
    parts: Parts, examples: Sequence[Example], cfg: Config, step: int, parallel: Parallel, first: int = 0, refill_round: int = 0
) -> Generator[list[Rollout], None, None]:
    """This rank's groups of examples[first:] as they finish: prompt first + i is rank i % world_size's and makes that group."""
    mine = list(range(first + parallel.rank, len(examples), parallel.world_size))
    chosen = [examples[i] for i in mine]
    prompts = [encode(parts.tokenizer, build_prompt(example, cfg.data.prompt)) for example in chosen]
    params = sampling_params(cfg, parts.tokenizer)
    seed, version = derive_seed(cfg.seed, step, refill_round), parts.engine.policy_version
    with closing(parts.engine.stream(prompts, params, seed, numbers=[i - first for i in mine])) as groups:
        for _, samples in groups:
            rollouts = to_rollouts(chosen, samples, prompts, parts.schema, parts.tokenizer, version)
            yield [replace(rollout, group=mine[rollout.group]) for rollout in rollouts]


def keep_finished(
    parts: Parts, examples: list[Example], rollouts: list[Rollout], cfg: Config, parallel: Parallel
) -> tuple[list[Example], list[Rollout], dict[str, float]]:
    """(examples, this rank's rollouts, metrics) without the groups that some rank has cut: the others are numbered anew, and the
    prompts that were cut go back to the sampler. Collective where groups may be cut."""
    if not cfg.rollout.cuts:
        return examples, rollouts, {}
    finished = sorted({group for share in parallel.all_gather_object({r.group for r in rollouts}) for group in share})
    number = {group: i for i, group in enumerate(finished)}
    cut = [example for i, example in enumerate(examples) if i not in number]
    parts.sampler.put_back(cut)
    kept = [replace(r, group=number[r.group]) for r in rollouts]
    return [examples[i] for i in finished], kept, {"rollout/num_cut_groups": len(cut)}


def score_rollouts(parts: Parts, rollouts: Sequence[Rollout], examples: Sequence[Example], cfg: Config) -> list[Rollout]:
    """The rollouts with the reward of each step (Eq. 5)."""
    return score(rollouts, [examples[r.group] for r in rollouts], parts.schema, parts.judge, cfg.reward.missing_verdict)


def refill_step(
    parts: Parts, examples: Sequence[Example], rollouts: Sequence[Rollout], cfg: Config, step: int, parallel: Parallel
) -> tuple[list[Example], list[Rollout], int]:
    """(examples, this rank's scored rollouts, rounds) with up to `sampler.refill` rounds of further prompts for groups that do
    not train."""

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
        sample=lambda examples, first, number: sample(parts, cfg, parallel, examples, step, None, first, number),
    )


def gather(rollouts: Sequence[Rollout], cfg: Config, step: int, parallel: Parallel) -> list[Rollout]:
    """The rollouts of all ranks, rank by rank, without their supports. ValueError where one is of older weights than allowed."""
    everyone = [r for share in parallel.all_gather_object([r.bare() for r in rollouts]) for r in share]
    check_age(everyone, step, cfg.rollout.off_policy_steps)
    return everyone


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
        mismatch = mismatch or {k: v for k, v in metrics.items() if k.startswith("rollout/")}
    return metrics | mismatch


def evaluation_due(cfg: Config, step: int) -> bool:
    """Whether the policy is evaluated after this many optimizer steps: every `train.eval_every`, and at the end."""
    return step == cfg.num_steps or (cfg.train.eval_every > 0 and step % cfg.train.eval_every == 0)


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
