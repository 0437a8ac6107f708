"""The work of `srpo.train_judge` around its trainings: score a judge, sample its verdicts, configure the second stage.

Every function that takes `parallel` is called on all ranks and returns the same on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from srpo.core.batch import Rollout
from srpo.core.config.judge import JudgeGrpoConfig
from srpo.core.config.train import (
    AdvantageConfig,
    Config,
    DataConfig,
    PolicyConfig,
    RewardConfig,
)
from srpo.core.grades import Grades
from srpo.core.progress import Progress
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.data.tokenizer import load_tokenizer
from srpo.judge_training.evaluation import judge_scores, vote_shares
from srpo.judge_training.hard_cases import CASE_PROMPT, Case, make_case, verdict_steps
from srpo.judge_training.judgments import Judgment, as_rollout
from srpo.policy.model import load_policy
from srpo.policy.parallel import Parallel
from srpo.policy.scalar import load_scalar
from srpo.rewards.build import open_judge, open_scalar_judge
from srpo.rewards.judge import GenerativeJudge, Verdicts
from srpo.rewards.scalar import ScalarJudge
from srpo.rewards.verdicts import parse_verdicts

X = TypeVar("X")
CHUNK = 64  # number of responses per call of the judge; the progress bar advances after each call


def over_ranks(title: str, num: int, work: Callable[[Sequence[int], int], Sequence[X]], parallel: Parallel) -> list[X]:
    """[num] results of `work(indices, chunk number)`, called on chunks of 0..num-1, which the ranks share.

    The chunks do not depend on the number of ranks, so neither do the results.
    """
    chunks = [range(first, min(first + CHUNK, num)) for first in range(0, num, CHUNK)]
    done: dict[int, X] = {}
    with Progress(title, num, enabled=parallel.is_main) as bar:
        for number in range(parallel.rank, len(chunks), parallel.world_size):
            done |= dict(zip(chunks[number], work(chunks[number], number), strict=True))
            bar.advance(len(chunks[number]) * parallel.world_size)
    merged = {i: result for share in parallel.all_gather_object(done) for i, result in share.items()}
    return [merged[i] for i in range(num)]


def load_judge(
    kind: str,
    path: Path,
    schema: StepSchema,
    max_new_tokens: int,
    policy: PolicyConfig,
    parallel: Parallel,
    guidelines: str = "",
) -> GenerativeJudge | ScalarJudge:
    """The judge of a checkpoint folder, on this rank's device."""
    tokenizer = load_tokenizer(path, policy.bos, policy.chat)
    if kind == "scalar":
        return open_scalar_judge(load_scalar(path, experts=policy.experts).to(parallel.device), tokenizer, schema)
    model = nn.Module.to(load_policy(path, experts=policy.experts), parallel.device)
    return open_judge(model, tokenizer, schema, max_new_tokens, guidelines=guidelines)


def evaluate_judge(
    judge: GenerativeJudge | ScalarJudge,
    judgments: Sequence[Judgment],
    examples: dict[str, Example],
    schema: StepSchema,
    num_votes: int,
    seed: int,
    parallel: Parallel,
) -> dict[str, Any]:
    """`judge_scores` of a judge on judgments (Table 2).

    The probability of "correct" is its share among `num_votes` sampled verdicts (generative judge) or p (scalar judge).
    """

    def work(indices: Sequence[int], chunk: int) -> list[tuple[Verdicts, tuple[float | None, ...]]]:
        rollouts, pairs = asked_about([judgments[i] for i in indices], examples, schema)
        verdicts = judge.judge(rollouts, pairs)
        if isinstance(judge, ScalarJudge):
            return list(zip(verdicts, judge.probabilities(rollouts, pairs), strict=True))
        return list(zip(verdicts, vote_shares(judge.votes(rollouts, pairs, num_votes, seed + chunk)), strict=True))

    verdicts, shares = zip(*over_ranks("judging held-out responses", len(judgments), work, parallel), strict=True)
    return judge_scores(verdicts, [j.verdicts for j in judgments], shares, [spec.name for spec in schema.specs])


def asked_about(
    judgments: Sequence[Judgment], examples: dict[str, Example], schema: StepSchema
) -> tuple[list[Rollout], list[Example]]:
    """The input of a judge: the responses as rollouts, and their examples."""
    return [as_rollout(j.example_id, j.response, schema) for j in judgments], [examples[j.example_id] for j in judgments]


def vote_on(
    judge: GenerativeJudge,
    pool: Sequence[Judgment],
    examples: dict[str, Example],
    schema: StepSchema,
    num_votes: int,
    seed: int,
    parallel: Parallel,
) -> list[Case]:
    """A case per response of a pool, with `num_votes` sampled verdicts of the judge; `hard_cases.mine` chooses among them."""

    def work(indices: Sequence[int], chunk: int) -> list[Case]:
        chosen = [pool[i] for i in indices]
        rollouts, pairs = asked_about(chosen, examples, schema)
        params = replace(judge.params, group_size=num_votes, greedy=False)
        cases = []
        for judgment, pair, texts in zip(chosen, pairs, judge.write(rollouts, pairs, params, seed + chunk), strict=True):
            votes = [parse_verdicts(text, schema.num_steps) for text in texts]
            cases.append(make_case(pair, judgment.response, judgment.verdicts, votes, schema, reason=texts[0]))
        return cases

    return over_ranks("sampling verdicts", len(pool), work, parallel)


def grpo_config(
    cfg: JudgeGrpoConfig, *, run_dir: Path, data: Path, policy: PolicyConfig, schema: StepSchema, max_new_tokens: int, seed: int
) -> Config:
    """Settings of the second stage (4.3.1), a run of `srpo.train`: GRPO (Eq. 2-4) of the judge on the cases in `data`.

    The verdicts are its reasoning steps; its reward is the share of right verdicts (`grpo_step_sum` over J rewards of 1/J).
    """
    return Config(
        run_dir=str(run_dir),
        seed=seed,
        num_steps=cfg.num_steps,
        steps=StepsConfig.of(verdict_steps(schema)),
        grades=Grades(verdict_steps(schema)[-1].options),
        data=DataConfig(train=str(data), prompt=CASE_PROMPT),
        policy=policy,
        rollout=replace(cfg.rollout, max_new_tokens=max_new_tokens),
        reward=RewardConfig(judge="none", audit="off"),
        advantage=AdvantageConfig(method="grpo_step_sum"),
        loss=cfg.loss,
        optimizer=cfg.optimizer,
        sampler=cfg.sampler,
        train=cfg.train,
    )
