"""The rollouts of an optimizer step: prompts, responses of the engine, and the reward of each step (Algorithm 1, lines 2-9)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from threading import Event

from srpo.core.batch import Rollout
from srpo.data.examples import Example
from srpo.data.tokenizer import encode_prompts
from srpo.rewards.hybrid import score
from srpo.rollout.rollouts import to_rollouts
from srpo.training.credit import training_groups
from srpo.training.refill import refill
from srpo.training.run import Run, derive_seed
from srpo.training.stream import check_age, quota, stream_scored


def collect(
    run: Run, step: int, prefetched: tuple[list[Example], list[Rollout]] | None = None
) -> tuple[list[Example], list[Rollout], dict[str, float]]:
    """(the prompts of an optimizer step by stage, difficulty and diversity, this rank's scored rollouts of them, metrics).

    prefetched: examples and rollouts that were sampled during the last update; None draws and samples them now. Aborted groups
    are removed, and up to `sampler.refill` rounds of further prompts replace groups that do not train (4.2.1). Collective.
    """
    if prefetched is None:
        examples = run.sampler.next(run.cfg.rollout.num_started)
        rollouts = sample(run, examples, step)
    else:
        examples, rollouts = prefetched
    examples, rollouts, cut_metrics = keep_finished(run, examples, rollouts)
    examples, rollouts, num_rounds = refill_step(run, examples, rollouts, step)
    return examples, rollouts, {"rollout/num_refill_rounds": num_rounds} | cut_metrics


def sample(
    run: Run, examples: Sequence[Example], step: int, stop: Event | None = None, first: int = 0, refill_round: int = 0
) -> list[Rollout]:
    """This rank's scored rollouts of examples[first:]. Not collective.

    With `rollout.oversample` or `cut_tail` only the first groups to finish; a refill round always finishes all of its groups.
    """
    cfg = run.cfg.rollout
    enough = quota(cfg.num_prompts, run.parallel.world_size, cfg.cut_tail) if cfg.cuts and not refill_round else 0
    return stream_scored(
        generate(run, examples, step, first, refill_round),
        lambda rollouts: score_rollouts(run, rollouts, examples),
        overlap=cfg.overlap == "on" or (cfg.overlap == "auto" and cfg.engine == "vllm"),
        enough=enough,
        stop=stop,
    )


def generate(
    run: Run, examples: Sequence[Example], step: int, first: int = 0, refill_round: int = 0
) -> Generator[list[Rollout], None, None]:
    """This rank's groups of examples[first:] as they finish. Prompt first + i belongs to rank i % world_size."""
    indices = list(range(first + run.parallel.rank, len(examples), run.parallel.world_size))
    chosen = [examples[i] for i in indices]
    prompts = encode_prompts(run.tokenizer, chosen, run.form)
    seed, version = derive_seed(run.cfg.seed, step, refill_round), run.engine.policy_version
    with closing(run.engine.stream(prompts, run.params, seed, numbers=[i - first for i in indices])) as groups:
        for _, samples in groups:
            rollouts = to_rollouts(chosen, samples, prompts, run.schema, run.tokenizer, version)
            yield [replace(rollout, group=indices[rollout.group]) for rollout in rollouts]


def score_rollouts(run: Run, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> list[Rollout]:
    """The rollouts with the reward of each step (Eq. 5)."""
    return score(rollouts, [examples[r.group] for r in rollouts], run.schema, run.judge, run.cfg.reward.missing_verdict)


def keep_finished(
    run: Run, examples: list[Example], rollouts: list[Rollout]
) -> tuple[list[Example], list[Rollout], dict[str, float]]:
    """(examples, this rank's rollouts, metrics) without the groups that any rank aborted.

    The remaining groups are renumbered, and the prompts of aborted groups return to the sampler. Collective if groups may be
    aborted.
    """
    if not run.cfg.rollout.cuts:
        return examples, rollouts, {}
    finished = sorted({group for share in run.parallel.all_gather_object({r.group for r in rollouts}) for group in share})
    number = {group: i for i, group in enumerate(finished)}
    aborted = [example for i, example in enumerate(examples) if i not in number]
    run.sampler.put_back(aborted)
    kept = [replace(r, group=number[r.group]) for r in rollouts]
    return [examples[i] for i in finished], kept, {"rollout/num_cut_groups": len(aborted)}


def refill_step(
    run: Run, examples: Sequence[Example], rollouts: Sequence[Rollout], step: int
) -> tuple[list[Example], list[Rollout], int]:
    """(examples, this rank's scored rollouts, rounds), after up to `sampler.refill` rounds of further prompts. Collective."""

    def count(rollouts: Sequence[Rollout]) -> int:
        _, groups = training_groups(rollouts, run.schema, run.cfg.advantage.method, run.sampler.stage.settings)
        return sum(run.parallel.all_gather_object(len(groups)))

    return refill(
        examples,
        rollouts,
        num_prompts=run.cfg.rollout.num_prompts,
        max_rounds=run.cfg.sampler.refill,
        count=count,
        draw=run.sampler.more,
        sample=lambda examples, first, number: sample(run, examples, step, None, first, number),
    )


def gather(run: Run, rollouts: Sequence[Rollout], step: int) -> list[Rollout]:
    """The rollouts of all ranks, rank by rank, without their large arrays. Collective.

    Raises ValueError if one was sampled with older weights than `rollout.off_policy_steps` allows.
    """
    everyone = [r for share in run.parallel.all_gather_object([r.bare() for r in rollouts]) for r in share]
    check_age(everyone, step, run.cfg.rollout.off_policy_steps)
    return everyone
