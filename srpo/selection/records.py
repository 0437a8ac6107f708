"""`Record`: statistics of one example, from its scored group of responses. `RecordSettings`: the settings that it depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from srpo.core.batch import Rollout
from srpo.core.config.chat import ChatConfig
from srpo.core.config.train import Config
from srpo.core.grades import Grades
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSchema
from srpo.data.prompts import read_guidelines
from srpo.training.credit import group_scores

_NOT_GRADED = ("skip", "no_verdict")


@dataclass(frozen=True)
class Record:
    """Statistics of the group of responses to one example: means over the group, None if nothing was graded."""

    example_id: str
    solve_rate: float | None  # total reward / maximum (`srpo.training.credit.group_scores`)
    verdict_accuracy: float | None  # reward / maximum of the last step alone
    step_rewards: tuple[float, ...]  # [J]
    judge_score: float | None  # mean verdict of the judge over all steps that have one, even if a label or rule graded the step
    judge_scores: tuple[float | None, ...]  # [J] mean verdict of the judge per step
    right_verdict_wrong_steps_frac: float | None  # share of responses with a right verdict and a wrong step before it
    wrong_verdict_right_steps_frac: float | None  # share of responses with a wrong verdict and no wrong step before it
    num_responses: int
    num_different: int  # number of different texts among the responses
    num_reward_patterns: int  # number of different rows of step rewards among the responses; 1: the group is uniform
    num_verdicts: int  # number of steps, over all responses, whose reward the judge had to give
    num_no_verdict: int  # number of these steps without a verdict
    tags: dict[str, str]  # `srpo.data.strata.tags_with_grade`


@dataclass(frozen=True)
class RecordSettings:
    """The settings that records depend on. All records in a folder have the same settings."""

    seed: int
    shard_examples: int
    data: str
    columns: dict[str, str]
    eval_frac: float
    prompt: str
    guidelines: str
    chat: ChatConfig
    judge_guidelines: str
    judge_chat: ChatConfig
    policy: str
    dtype: str
    max_context: int
    engine: str
    group_size: int
    max_new_tokens: int
    temperature: float
    top_k: int
    judge: str
    judge_path: str
    judge_max_new_tokens: int
    judge_error_rate: float
    scalar: str
    missing_verdict: float
    steps: StepsConfig
    grades: Grades

    @classmethod
    def from_config(cls, cfg: Config, shard_examples: int) -> RecordSettings:
        """The settings of `cfg` that records depend on."""
        rollout, reward = cfg.rollout, cfg.reward
        by_url = reward.judge == "generative" and reward.judge_engine == "url"
        return cls(
            seed=cfg.seed,
            shard_examples=shard_examples,
            data=cfg.data.train,
            columns=cfg.data.columns,
            eval_frac=cfg.data.eval_frac,
            prompt=cfg.data.prompt,
            guidelines=read_guidelines(cfg.data.guidelines, "data.guidelines"),
            chat=cfg.policy.chat,
            judge_guidelines=read_guidelines(cfg.reward.judge_guidelines, "reward.judge_guidelines"),
            judge_chat=cfg.reward.judge_chat,
            policy=cfg.policy.path,
            dtype=cfg.policy.dtype,
            max_context=cfg.policy.max_context,
            engine=rollout.engine,
            group_size=rollout.group_size,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            judge=reward.judge,
            judge_path=f"{reward.judge_model or reward.judge_url} ({reward.judge_api})" if by_url else reward.judge_path,
            judge_max_new_tokens=reward.judge_max_new_tokens,
            judge_error_rate=reward.judge_error_rate,
            scalar=reward.scalar,
            missing_verdict=reward.missing_verdict,
            steps=cfg.steps,
            grades=cfg.grades,
        )


def record_of(group: Sequence[Rollout], schema: StepSchema, tags: Mapping[str, str]) -> Record:
    """The record of one example from its group of scored responses.

    A response contradicts itself if its verdict is right and a graded step before it is wrong, or if its verdict is wrong and no
    graded step before it is. A step is right if it earns at least half of its reward; a step without an answer is wrong.
    """
    assert len({rollout.group for rollout in group}) == 1
    verdicts = [rollout.verdicts for rollout in group if rollout.verdicts is not None]
    judged = [[float(verdict) for verdict in column if verdict is not None] for column in zip(*verdicts, strict=True)]
    rights = [_right(rollout, schema) for rollout in group]
    both = [(bool(right[-1]), all(step for step in right[:-1] if step is not None)) for right in rights if _comparable(right)]
    counts = [_counts(rollout, schema) for rollout in group]
    return Record(
        example_id=group[0].example_id,
        solve_rate=_of_group(group, schema, "total") if any(map(any, counts)) else None,
        verdict_accuracy=_of_group(group, schema, "final") if any(each[-1] for each in counts) else None,
        step_rewards=tuple(_mean(column) or 0.0 for column in zip(*(r.step_rewards or () for r in group), strict=True)),
        judge_score=_mean([value for values in judged for value in values]),
        judge_scores=tuple(map(_mean, judged)) or (None,) * schema.num_steps,
        right_verdict_wrong_steps_frac=_mean([verdict and not steps for verdict, steps in both]),
        wrong_verdict_right_steps_frac=_mean([not verdict and steps for verdict, steps in both]),
        num_responses=len(group),
        num_different=len({rollout.text for rollout in group}),
        num_reward_patterns=len({rollout.step_rewards for rollout in group}),
        num_verdicts=sum(source in ("judge", "no_verdict") for rollout in group for source in rollout.reward_sources or ()),
        num_no_verdict=sum(source == "no_verdict" for rollout in group for source in rollout.reward_sources or ()),
        tags=dict(tags),
    )


def unsampled(example_id: str, num_steps: int, tags: Mapping[str, str]) -> Record:
    """The record of an example that was not sampled because none of its steps can be graded."""
    return Record(example_id, None, None, (0.0,) * num_steps, None, (None,) * num_steps, None, None, 0, 0, 0, 0, 0, dict(tags))


def _of_group(group: Sequence[Rollout], schema: StepSchema, which: str) -> float:
    return group_scores(group, schema, which)[group[0].group]


def _counts(rollout: Rollout, schema: StepSchema) -> list[bool]:
    """Whether each step of a response counts towards the maximum reward, [J]."""
    assert rollout.reward_sources is not None, "rollouts are scored before they become a record"
    return [source != "skip" and spec.reward > 0 for spec, source in zip(schema.specs, rollout.reward_sources, strict=True)]


def _right(rollout: Rollout, schema: StepSchema) -> list[bool | None]:
    """Whether each step is right, [J]; None for a step that was not graded."""
    steps = zip(schema.specs, rollout.step_rewards or (), rollout.reward_sources or (), strict=True)
    return [None if source in _NOT_GRADED or not spec.reward else reward >= spec.reward / 2 for spec, reward, source in steps]


def _comparable(right: Sequence[bool | None]) -> bool:
    """Whether the verdict and at least one step before it are graded."""
    return right[-1] is not None and any(step is not None for step in right[:-1])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
