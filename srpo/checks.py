"""What can be known of a run before it starts: whatever could not work later stops it here, with what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from srpo.batch import Rollout
from srpo.config import Config
from srpo.data.examples import Example
from srpo.evaluation import true_grades
from srpo.rewards.hybrid import score
from srpo.rewards.judge import Judge
from srpo.rollout.engine import SamplingParams, check_prompts
from srpo.steps import StepSchema


def check_settings(cfg: Config, world_size: int = 1) -> None:
    """Raise ValueError for settings that cannot make a run, whatever the data."""
    for key in ("loss.num_updates", "rollout.num_prompts", "train.micro_batch_tokens"):
        _at_least(cfg, key, 1)
    for key in ("train.checkpoint_every", "train.keep_checkpoints"):
        _at_least(cfg, key, 1)
    for key in ("seed", "num_steps", "loss.kl_coef", "optimizer.lr", "advantage.clip", "train.eval_every", "train.eval_examples"):
        _at_least(cfg, key, 0)
    if not 0 <= cfg.advantage.gamma <= 1:
        raise ValueError(f"advantage.gamma is {cfg.advantage.gamma}: a discount lies between 0 and 1")
    method, normalize = cfg.advantage.method, cfg.advantage.normalize
    if cfg.rollout.group_size < 2 and (method != "srpo" or normalize in ("group", "group_step")):
        baseline = f"advantage.normalize {normalize!r}" if method == "srpo" else f"advantage.method {method!r}"
        raise ValueError(
            f"rollout.group_size is {cfg.rollout.group_size}, but {baseline} compares the rollouts of a group: "
            "use 2 or more, or advantage.method srpo with advantage.normalize batch"
        )
    low, high = cfg.sampler.difficulty_low, cfg.sampler.difficulty_high
    if not (low < high and low < 1 and high > 0):
        raise ValueError(
            f"the difficulty window ({low}, {high}) filters out everything: scores lie in 0..1, and "
            "sampler.difficulty_low must be below sampler.difficulty_high"
        )
    if cfg.rollout.num_prompts % world_size:
        raise ValueError(
            f"rollout.num_prompts {cfg.rollout.num_prompts} cannot be shared by {world_size} processes: use a multiple"
        )
    if not cfg.data.train:
        raise ValueError("data.train is not set: name a file of judged pairs (docs/data.md)")
    if cfg.reward.judge == "generative" and not cfg.reward.judge_path:
        raise ValueError(
            "reward.judge is generative but reward.judge_path is not set: name the checkpoint that srpo.train_judge made"
        )


def _at_least(cfg: Config, key: str, least: int) -> None:
    value = cfg
    for name in key.split("."):
        value = getattr(value, name)
    if not value >= least:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{key} is {value}: set it to {least} or more")


def check_prompt_lengths(
    prompts: Sequence[Sequence[int]], examples: Sequence[Example], params: SamplingParams, max_context: int, max_rows: int
) -> None:
    """Raise ValueError for a prompt that leaves no room for its response in the context or in a micro-batch of `max_rows`."""
    check_prompts(prompts, params, max_context, [example.example_id for example in examples])
    for prompt, example in zip(prompts, examples, strict=True):
        rows = len(prompt) + params.max_new_tokens - 1
        if rows > max_rows:
            raise ValueError(
                f"the prompt of example {example.example_id} has {len(prompt)} tokens, with its response {rows} rows, more than "
                f"train.micro_batch_tokens = {max_rows}: raise that, lower rollout.max_new_tokens or shorten data.prompt"
            )


def check_examples(
    examples: Sequence[Example], eval_examples: Sequence[Example], schema: StepSchema, judge: Judge | None, cfg: Config
) -> None:
    """Raise ValueError where there are fewer examples than prompts in a step, where nothing can grade a step of a training
    example, and where an evaluation example has no grade."""
    if len(examples) < cfg.rollout.num_prompts:
        raise ValueError(
            f"{cfg.data.train} has {len(examples)} examples, fewer than rollout.num_prompts = {cfg.rollout.num_prompts}: "
            "lower that or give more data"
        )
    silence = [_silence(example, schema.num_steps) for example in examples]
    score(silence, examples, schema, judge, cfg.reward.missing_verdict)  # a judge is not asked about missing answers
    if eval_examples:
        true_grades(eval_examples)


def _silence(example: Example, num_steps: int) -> Rollout:
    """A response without a word."""
    return Rollout(example.example_id, 0, (), (), (), (0,) * num_steps, (None,) * num_steps, "", "stop", 0)
