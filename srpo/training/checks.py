"""Checks before a run starts: each raises UserError for settings or data that would fail later, and says what to change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from srpo_kernels.dispatch import choose

from srpo.core.batch import Rollout
from srpo.core.config.train import Config, PolicyConfig
from srpo.core.errors import UserError
from srpo.core.ranges import check_ranges
from srpo.core.steps import StepSchema
from srpo.data.curriculum import check_curriculum
from srpo.data.examples import Example
from srpo.policy.parallel import Parallel
from srpo.policy.varlen_kernels import check_kernel
from srpo.rewards.hybrid import score
from srpo.rewards.judge import Judge, OracleJudge
from srpo.rewards.judge_service import check_service
from srpo.rollout.engine import SamplingParams, check_prompts
from srpo.scores.tally import true_grades
from srpo.training.best import check_best
from srpo.training.stream import quota


def check_settings(cfg: Config, world_size: int = 1) -> None:
    """Raise UserError for settings of `srpo.train` that fail with any data, or that `world_size` processes cannot share."""
    check_ranges(cfg)
    _check_loss(cfg)
    method, normalize = cfg.advantage.method, cfg.advantage.normalize
    compares = normalize in ("group", "group_step") if method == "srpo" else method not in ("reinforce", "ppo")
    if cfg.rollout.group_size < 2 and compares:
        baseline = f"advantage.normalize {normalize!r}" if method == "srpo" else f"advantage.method {method!r}"
        raise UserError(
            f"rollout.group_size is {cfg.rollout.group_size}, but {baseline} compares the rollouts of a group: "
            "set it to 2 or more, or use advantage.method srpo with advantage.normalize batch"
        )
    check_rollout(cfg)
    _check_sampler(cfg)
    low, high = cfg.sampler.difficulty_low, cfg.sampler.difficulty_high
    if not (low < high and low < 1 and high > 0):
        raise UserError(
            f"sampler.difficulty_low is {low} and sampler.difficulty_high {high}: this window filters out everything, because "
            "scores lie in 0..1; set difficulty_low below 1 and below difficulty_high, and difficulty_high above 0"
        )
    if cfg.rollout.num_prompts % world_size:
        raise UserError(
            f"rollout.num_prompts is {cfg.rollout.num_prompts}, which {world_size} processes cannot share equally: set it to a "
            f"multiple of {world_size}"
        )
    share = cfg.rollout.num_prompts // world_size
    if cfg.rollout.cut_tail and quota(cfg.rollout.num_prompts, world_size, cfg.rollout.cut_tail) == share:
        raise UserError(
            f"rollout.cut_tail is {cfg.rollout.cut_tail}, less than one of the {share} prompts of a process, so it cuts nothing: "
            f"set it to {1 / share:.3g} or more, or to 0"
        )
    if not cfg.data.train and not (cfg.curriculum and all(stage.data for stage in cfg.curriculum)):
        raise UserError("data.train is not set: name a file of judged pairs (docs/data.md)")
    if cfg.data.eval_frac:
        _check_held_out(cfg)
    check_judge(cfg)
    check_best(cfg)


def _check_held_out(cfg: Config) -> None:
    frac = f"data.eval_frac is {cfg.data.eval_frac}"
    if cfg.data.eval:
        raise UserError(
            f"{frac} and data.eval {cfg.data.eval!r}: set one of them, for pairs held out of data.train or a file of them"
        )
    if named := [stage.name for stage in cfg.curriculum if stage.data]:
        raise UserError(
            f"{frac}, but curriculum stage {named[0]!r} has data of its own, which may hold the same queries: put held-out pairs "
            "into a file, data.eval"
        )


def check_device(policy: PolicyConfig, parallel: Parallel) -> None:
    """Raise UserError if the attention of these settings cannot run on this device, before anything is loaded.

    Prints one line on the main rank for float32 on a GPU, which is right and slow.
    """
    check_kernel(policy.attention, parallel.device, getattr(torch, policy.dtype))
    if parallel.is_main and parallel.device.type == "cuda" and policy.dtype == "float32":
        print(
            "policy.dtype is float32: on a GPU attention and experts then run without their fast kernels, and take several times "
            'as long and more memory. Set policy.dtype to "bfloat16" (the master weights stay float32)',
            flush=True,
        )


def check_judge(cfg: Config) -> None:
    """Raise UserError for settings of the judge that fail with any data."""
    reward = cfg.reward
    service = reward.judge == "generative" and reward.judge_engine == "url"
    if reward.judge in ("generative", "scalar") and not service and not reward.judge_path:
        raise UserError(
            f"reward.judge is {reward.judge} but reward.judge_path is not set: name the checkpoint that srpo.train_judge made"
        )
    if reward.judge != "generative" and reward.judge_engine != "local":
        raise UserError(
            f"reward.judge_engine is {reward.judge_engine} and reward.judge {reward.judge}: only a generative judge has an "
            "engine, set reward.judge_engine to 'local' or reward.judge to 'generative'"
        )
    if reward.judge_url and not service:
        raise UserError(
            "reward.judge_url is set, but only reward.judge 'generative' with reward.judge_engine 'url' uses it: set these two, "
            "or remove reward.judge_url"
        )
    if service and not reward.judge_url:
        raise UserError(
            "reward.judge_engine is url but reward.judge_url is not set: set it, for example http://127.0.0.1:8000/v1"
        )
    if service:
        check_service(reward)
    memory = cfg.rollout.vllm.gpu_memory_frac + reward.judge_vllm.gpu_memory_frac
    if cfg.rollout.engine == reward.judge_engine == "vllm" and memory >= 1:
        raise UserError(
            f"rollout.vllm.gpu_memory_frac and reward.judge_vllm.gpu_memory_frac add up to {memory:g}: lower one of "
            "them, because policy and judge share a GPU with the trainer"
        )


def check_rollout(cfg: Config) -> None:
    """The part of `check_settings` on aborted groups, samples of older weights, importance weights and the replayed support."""
    rollout, loss = cfg.rollout, cfg.loss
    if rollout.cut_tail and cfg.sampler.refill:
        raise UserError(
            f"rollout.cut_tail is {rollout.cut_tail} and sampler.refill {cfg.sampler.refill}: refill would sample other prompts "
            "in place of those that cut_tail aborts, so set one of them to 0"
        )
    if rollout.off_policy_steps and loss.importance == "off":
        raise UserError(
            "rollout.off_policy_steps is 1 and loss.importance off: samples of older weights need importance weights, set "
            "loss.importance to 'truncate' or 'mask'"
        )
    if rollout.support == "replay" and (not rollout.top_k or rollout.ratio != "filtered"):
        raise UserError(
            f"rollout.support is 'replay' with rollout.top_k {rollout.top_k} and rollout.ratio {rollout.ratio!r}: only a "
            "filtered distribution has a support, set top_k above 0 and ratio to 'filtered', or support to 'recompute'"
        )


def loss_impl(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel of the loss that `impl` names on this machine; "auto" is the best one. UserError if it cannot run here."""
    try:
        return choose("loss.impl", impl, device, dtype)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_reference(cfg: Config, vocab_size: int, reference_vocab_size: int) -> None:
    """Raise UserError if the KL over all candidates (loss.kl_estimator "full") has no probability of some of them."""
    if cfg.loss.kl_estimator == "full" and vocab_size != reference_vocab_size:
        raise UserError(
            f"loss.kl_estimator is 'full', but the reference has {reference_vocab_size} tokens and the policy has "
            f"{vocab_size}: set it to 'k3', or give a reference with the policy's vocabulary"
        )


def check_support(cfg: Config, vocab_size: int) -> None:
    """Raise UserError if rollout.support is "replay" and rollout.top_k keeps the whole vocabulary."""
    if cfg.rollout.support == "replay" and cfg.rollout.top_k >= vocab_size:
        raise UserError(
            f"rollout.support is 'replay' and rollout.top_k {cfg.rollout.top_k} keeps the whole vocabulary of {vocab_size}: "
            "lower rollout.top_k, or set rollout.support to 'recompute'"
        )


def _check_sampler(cfg: Config) -> None:
    """The part of `check_settings` on the prompt sampler and the curriculum."""
    if cfg.sampler.refill and cfg.rollout.group_size < 2:
        raise UserError(
            f"sampler.refill is {cfg.sampler.refill} and rollout.group_size {cfg.rollout.group_size}: refill replaces groups "
            "without differences, and a group of one has none; set sampler.refill to 0 or rollout.group_size to 2 or more"
        )
    check_curriculum(cfg)


def _check_loss(cfg: Config) -> None:
    """The part of `check_settings` on the loss and, if advantage.method is ppo, on the critic."""
    if cfg.loss.dual_clip and not cfg.loss.dual_clip > 1:
        raise UserError(f"loss.dual_clip is {cfg.loss.dual_clip}: set it above 1, or to 0 for no bound")
    if cfg.loss.dual_clip and cfg.loss.clip_form != "ppo":
        raise UserError(
            f"loss.dual_clip is {cfg.loss.dual_clip} and loss.clip_form {cfg.loss.clip_form}: only the surrogate of clip_form "
            "'ppo' has this bound, set loss.dual_clip to 0 or loss.clip_form to 'ppo'"
        )
    if cfg.advantage.method != "ppo":
        return
    if cfg.loss.ratio_over != "token":
        raise UserError(
            f"loss.ratio_over is {cfg.loss.ratio_over} and advantage.method ppo: each token has its own advantage and needs its "
            "own ratio, set loss.ratio_over to 'token'"
        )


def check_prompt_lengths(
    prompts: Sequence[Sequence[int]], examples: Sequence[Example], params: SamplingParams, max_context: int, max_rows: int
) -> None:
    """Raise UserError for a prompt whose longest response exceeds the context (`max_context`) or a micro-batch (`max_rows`)."""
    check_prompts(prompts, params, max_context, [example.shown for example in examples])
    for prompt, example in zip(prompts, examples, strict=True):
        rows = len(prompt) + params.max_new_tokens - 1
        if rows > max_rows:
            raise UserError(
                f"the prompt of {example.shown} has {len(prompt)} tokens, and with its longest response {rows} "
                f"rows, more than train.micro_batch_tokens = {max_rows}: raise that, lower rollout.max_new_tokens or shorten "
                "data.prompt"
            )


def check_examples(
    examples: Sequence[Example], eval_examples: Sequence[Example], schema: StepSchema, judge: Judge | None, cfg: Config
) -> None:
    """Raise UserError for fewer training examples than an optimizer step has prompts, a step of a training example that nothing
    can grade, or an evaluation example without a grade.

    The simulated annotator (reward.judge "oracle") can grade a step only if the example has its truth.
    """
    if len(examples) < cfg.rollout.num_started:
        more = f" with rollout.oversample = {cfg.rollout.oversample}" if cfg.rollout.oversample else ""
        raise UserError(
            f"{cfg.data.train} has {len(examples)} examples, fewer than rollout.num_prompts = {cfg.rollout.num_prompts}{more}: "
            "lower num_prompts, or give more data"
        )
    if cfg.data.adversarial_frac and not any(example.attack for example in examples):
        raise UserError(
            f"data.adversarial_frac is {cfg.data.adversarial_frac}, but no example got a fake verdict: raise it, give more data, "
            "or set it to 0"
        )
    unanswered = [Rollout.from_answers(example.example_id, (None,) * schema.num_steps) for example in examples]
    score(unanswered, examples, schema, judge, cfg.reward.missing_verdict)  # calls no judge: all answers are missing
    if isinstance(judge, OracleJudge):
        _check_truths(examples, schema)
    if eval_examples:
        true_grades(eval_examples, schema.grades)


def seen_in_training(examples: Sequence[Example], eval_examples: Sequence[Example]) -> str:
    """A sentence on the evaluation examples that are trained on, by id or by query and title; "" if there is none."""
    known = {example.example_id for example in examples} | {(example.query, example.title) for example in examples}
    num_seen = sum(e.example_id in known or (e.query, e.title) in known for e in eval_examples)
    if not num_seen:
        return ""
    return f"{num_seen:,} of {len(eval_examples):,} examples are also in data.train, so eval/* does not measure held-out pairs"


def _check_truths(examples: Sequence[Example], schema: StepSchema) -> None:
    """Raise UserError for a step that only the simulated annotator could grade, if the example lacks its right answer."""
    unknown = (None,) * schema.num_steps
    for example in examples:
        for spec, label, truth in zip(schema.specs, example.gold or unknown, example.truth or unknown, strict=True):
            others = {"skip", "rule"} | ({"gold"} if label is not None else set())
            if truth is None and others.isdisjoint(spec.sources):
                raise UserError(
                    f"reward.judge is oracle, which reads right answers from `truth`, but {example.shown} has no "
                    f"truth for step {spec.name!r}, so the step would earn nothing: add the truth, train a judge "
                    "(srpo.train_judge), or end the step's sources with 'skip'"
                )
