"""Stepwise Reward Policy Optimization (Algorithm 1): `python -m srpo.train @ configs/x.toml`, or the same under torchrun.

How SRPO differs from GRPO:
1. A response is J reasoning steps, and each step has its own reward, not only the verdict (rewards/hybrid.py, Eq. 5).
2. Verifiable steps are graded by labels, open steps by a step judge R_phi: a language model that writes a verdict per step.
3. The return of a step is its reward plus the discounted rewards of later steps (algorithm/advantages.py, Algorithm 1 line 12).
4. Returns are normalized over the batch; each token carries the advantage of its own step (srpo_kernels/segments.py, line 11).
5. Groups train only inside a difficulty window, and prompts are drawn by difficulty and diversity (data/sampler.py, 4.2.1).
6. The loss is GRPO's clipped ratio with a KL term, with the advantage per step (srpo_kernels/reference.py, Eq. 6).

The loop is `train`; each of its phases is a function that can be called alone and works on a `Run`. A run that was killed at any
moment continues from its last complete checkpoint and ends with the same result. docs/method.md maps each formula to its line.
"""

from __future__ import annotations

from srpo.core.config.train import Config
from srpo.core.settings import check_command_line, run_program

if __name__ == "__main__":
    check_command_line(Config)  # -h and mistakes answer before torch is imported

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from srpo.core.batch import Batch, Rollout, pack, write_rollouts
from srpo.core.metrics import evaluation_metrics
from srpo.core.progress import Progress
from srpo.core.run_lock import locks_run_dir
from srpo.experiments.first_run import WORLD, first_run
from srpo.policy.parallel import Parallel, distributed
from srpo.rewards.audit import audit
from srpo.rewards.build import judge_metrics
from srpo.training.collect import collect, gather, sample
from srpo.training.credit import Credit, assign_credit, rollout_metrics
from srpo.training.evaluation import evaluate_policy
from srpo.training.optim import learning_rate, set_learning_rate
from srpo.training.prefetch import Prefetch
from srpo.training.run import Clock, Run, State
from srpo.training.update import update, with_logprobs


@locks_run_dir
def train(cfg: Config, parallel: Parallel, files: Mapping[str, str] | None = None) -> Path:
    """Train as configured and return the folder of the resulting checkpoint, `run_dir/policy`. Collective.

    files: further ones of that folder, {name: text}.
    """
    run = replace(Run.build(cfg, parallel), files=files or {})
    sampler, engine = run.sampler, run.engine
    state = run.resume()
    logger = run.open_logger(state.step)
    bar = Progress("SRPO", cfg.num_steps, start=state.step, enabled=parallel.is_main)
    with bar, Prefetch(sampler, lambda *work: sample(run, *work)) as prefetch:
        for step in range(state.step, cfg.num_steps):  # Algorithm 1
            if state.best is not None and state.best.ends(cfg.train):
                break
            clock = Clock()
            prefetched = prefetch.take()  # off_policy_steps 1: sampled during the last update
            clock.lap("rollout")
            engine.sync_weights(run.policy, version=step)  # pi_old <- pi_theta
            clock.lap("sync")
            examples, rollouts, metrics = collect(run, step, prefetched)  # lines 2-9, Eq. 5
            clock.lap("rollout")
            everyone = gather(run, rollouts, step)
            audited = audit(state.audit, everyone, examples, run.schema, cfg.reward)  # the judge against gold labels
            window, longest = sampler.stage.settings, cfg.rollout.max_new_tokens
            credit = assign_credit(everyone, run.schema, cfg.advantage, cfg.loss, window, longest)  # lines 10-13
            sampler.observe([e.example_id for e in examples], [credit.group_scores[g] for g in range(len(examples))])  # 4.2.1
            state = state.after(credit, window, audited.state)
            metrics |= rollout_metrics(everyone, run.schema, credit) | audited.metrics(run.schema)
            metrics |= sampler.metrics() | judge_metrics(run.judge, parallel)
            if cfg.data.adversarial_frac:
                metrics["sampler/adversarial_frac"] = sum(bool(e.attack) for e in examples) / len(examples)
            batches = pack_own(run, rollouts, credit)
            clock.lap("score")
            if cfg.rollout.off_policy_steps and step + 1 < cfg.num_steps:
                prefetch.start(cfg.rollout.num_started, step + 1)
            else:
                engine.sleep()  # frees its memory for the update; the next sync wakes it
            if credit.num_in_window:
                metrics |= policy_update(run, batches, step)  # line 16, Eq. 6
            clock.lap("update")
            if run.eval_examples and evaluation_due(cfg, step + 1):
                prefetch.wait()
                metrics |= evaluate_now(run, step + 1)
                state = state.evaluated(metrics, cfg.train.best)
                metrics |= state.best.metrics() if state.best is not None else {}
                clock.lap("eval")
            if logger is not None:
                if cfg.train.log_rollouts:
                    write_rollouts(run.run_dir / "rollouts.jsonl", sorted(everyone, key=lambda r: r.group), step + 1)
                logger.log(step + 1, metrics | clock.metrics(engine))
            if sampler.end_step(metrics):  # 4.2.2
                prefetch.drop()  # it was drawn from the stage that has ended
                bar.print(f"optimizer step {step + 1}: stage {sampler.stage.name!r} begins")
            if checkpoint_due(cfg, state):
                run.save(state, prefetch.sampler_state(), logger)
            for alarm in audited.news:
                bar.print(f"optimizer step {step + 1}: {alarm}")
            bar.advance(1, reward=metrics["reward/total"])
    if parallel.is_main and (text := ended_early(cfg, state)):
        print(text, flush=True)
    run.save_policies(state)
    parallel.barrier()  # no rank returns while another still gathers or writes
    if logger is not None:
        logger.close()
    engine.close()
    return run.run_dir / "policy"


# ---- the other phases; collect and gather are in training/collect.py -----------------------------------------------------------


def pack_own(run: Run, rollouts: Sequence[Rollout], credit: Credit) -> list[Batch]:
    """Micro-batches of this rank's rollouts that train. The rows of `credit` are the rollouts of all ranks, rank by rank."""
    counts = run.parallel.all_gather_object(len(rollouts))
    first = sum(counts[: run.parallel.rank])
    indices = np.flatnonzero(credit.trains[first : first + len(rollouts)]).tolist()
    rows = torch.tensor(indices, dtype=torch.long) + first
    chosen = [rollouts[i] for i in indices]
    return pack(chosen, credit.advantages[rows], credit.weights[rows], run.cfg.train.micro_batch_tokens)


def policy_update(run: Run, batches: Sequence[Batch], step: int) -> dict[str, float]:
    """`loss.num_updates` updates on Eq. 6. Metrics are those of the last update, the engine's mismatch that of the first."""
    cfg = run.cfg
    lr = learning_rate(cfg.optimizer, step, cfg.num_steps)
    set_learning_rate(run.optimizer, lr)
    batches = with_logprobs(batches, run.policy, run.reference, run.objective, run.parallel)
    metrics: dict[str, float] = {"train/lr": lr}
    mismatch: dict[str, float] = {}
    if run.ppo is not None:
        batches, values = run.ppo.advantages(batches, run.parallel)
        metrics |= values | run.ppo.update(batches, step, run.parallel)
    for _ in range(cfg.loss.num_updates):
        metrics |= update(
            run.policy,
            run.optimizer,
            batches,
            run.objective,
            run.parallel,
            step_names=run.schema.names,
            grad_clip=cfg.optimizer.grad_clip,
            dump=run.run_dir / "non_finite.pt",
            reference=run.reference,
            info={"step": step},
        )
        mismatch = mismatch or {k: v for k, v in metrics.items() if k.startswith("rollout/")}
    return metrics | mismatch


def evaluation_due(cfg: Config, step: int) -> bool:
    """Whether the policy is evaluated after this many optimizer steps: every `train.eval_every`, and at the end."""
    return step == cfg.num_steps or (cfg.train.eval_every > 0 and step % cfg.train.eval_every == 0)


def checkpoint_due(cfg: Config, state: State) -> bool:
    """Whether a checkpoint is written after this optimizer step: every `train.checkpoint_every`, at the end, for a new best."""
    best = state.best is not None and (state.best.step == state.step or state.best.ends(cfg.train))
    return state.step % cfg.train.checkpoint_every == 0 or state.step == cfg.num_steps or best


def ended_early(cfg: Config, state: State) -> str:
    """A sentence if the run has ended before num_steps; "" if not."""
    if state.best is None or state.step == cfg.num_steps:
        return ""
    return (
        f"ended after optimizer step {state.step} of {cfg.num_steps}: {cfg.train.best} has not risen in {state.best.num_stalled} "
        f"evaluations (train.patience is {cfg.train.patience}; a larger one, or 0, goes on)"
    )


def evaluate_now(run: Run, version: int) -> dict[str, float]:
    """The `eval/*` metrics of the policy's present weights. Collective."""
    run.engine.sync_weights(run.policy, version=version)
    results, _ = evaluate_policy(
        run.engine,
        run.tokenizer,
        run.schema,
        run.eval_examples,
        form=run.form,
        max_new_tokens=run.cfg.rollout.max_new_tokens,
        batch_size=256,
        parallel=run.parallel,
    )
    return evaluation_metrics(results, run.schema.names)


main = distributed(train)
main_of_world = distributed(lambda _, parallel: train(first_run(WORLD, parallel), parallel))

if __name__ == "__main__":
    run_program(main if sys.argv[1:] else main_of_world, Config)  # without any argument on the built-in world
