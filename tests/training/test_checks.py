from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
import small_world as small
import torch

from srpo.core.config.dpo import DpoConfig
from srpo.core.config.sft import SftConfig
from srpo.core.config.train import Config, DataConfig, PolicyConfig
from srpo.core.errors import UserError
from srpo.core.step_presets import PAPER
from srpo.core.steps import StepSchema
from srpo.data.examples import Example
from srpo.dpo import dpo
from srpo.judge_training.scalar import train_scalar
from srpo.rewards.judge import OracleJudge
from srpo.rollout.engine import SamplingParams
from srpo.sft import sft
from srpo.training.checks import (
    check_device,
    check_examples,
    check_prompt_lengths,
    check_reference,
    check_settings,
    check_support,
    loss_impl,
    seen_in_training,
)
from srpo.training.run import Run

GOOD = Config(data=DataConfig(train="pairs.jsonl"))
SCHEMA = PAPER
LABELLED = Example("e1", "q", "query", "title", gold=(None, None, "match", "match", "L4"), truth=("a", "b", None, None, None))


def test_the_defaults_with_data_pass() -> None:
    check_settings(GOOD)
    check_settings(GOOD, world_size=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": -1}, "num_steps is -1: set it to 0 or more"),
        ({"seed": -3}, "seed is -3"),
        ({"data": {"train": ""}}, "data.train is not set"),
        ({"rollout": {"num_prompts": 0}}, "rollout.num_prompts is 0: set it to 1 or more"),
        ({"loss": {"num_updates": 0}}, "loss.num_updates is 0"),
        ({"loss": {"kl_coef": -0.1}}, "loss.kl_coef is -0.1: set it to 0 or more"),
        ({"loss": {"kl_coef": float("nan")}}, "loss.kl_coef is nan"),
        ({"train": {"micro_batch_tokens": 0}}, "train.micro_batch_tokens is 0"),
        ({"train": {"checkpoint_every": 0}}, "train.checkpoint_every is 0"),
        ({"train": {"keep_checkpoints": 0}}, "train.keep_checkpoints is 0"),
        ({"train": {"eval_every": -1}}, "train.eval_every is -1"),
        ({"optimizer": {"lr": -1.0}}, "optimizer.lr is -1.0"),
        ({"advantage": {"clip": -2.0}}, "advantage.clip is -2.0"),
        ({"advantage": {"gamma": 1.5}}, "advantage.gamma is 1.5: set it to a number from 0 to 1"),
        ({"loss": {"clip_eps_low": -0.1}}, "loss.clip_eps_low is -0.1: set it to 0 or more"),
        ({"loss": {"dual_clip": 1.0}}, "loss.dual_clip is 1.0: set it above 1, or to 0"),
        ({"loss": {"dual_clip": 3.0, "clip_form": "cispo"}}, "loss.dual_clip is 3.0 and loss.clip_form cispo: .*dual_clip to 0"),
        ({"rollout": {"oversample": -0.1}}, "rollout.oversample is -0.1: set it to 0 or more"),
        ({"rollout": {"cut_tail": 1.0}}, "rollout.cut_tail is 1.0: set it to a number from 0 to below 1"),
        (
            {"rollout": {"cut_tail": 0.01}},
            "cut_tail is 0.01, less than one of the 64 prompts of a process, .*: set it to 0.0156 or more",
        ),
        ({"rollout": {"cut_tail": 0.25}, "sampler": {"refill": 1}}, "cut_tail is 0.25 and sampler.refill 1"),
        ({"rollout": {"off_policy_steps": 2}}, "rollout.off_policy_steps is 2: set it to a number from 0 to 1"),
        (
            {"rollout": {"off_policy_steps": 1}},
            "off_policy_steps is 1 and loss.importance off: .*set loss.importance to 'truncate'",
        ),
        ({"loss": {"importance_cap": 0.9}}, "loss.importance_cap is 0.9: set it to 1 or more"),
        ({"rollout": {"support": "replay", "top_k": 0}}, "rollout.support is 'replay' with rollout.top_k 0"),
        ({"rollout": {"support": "replay", "ratio": "unfiltered"}}, "'replay' with .* rollout.ratio 'unfiltered'"),
        ({"advantage": {"method": "ppo"}, "loss": {"ratio_over": "step"}}, "set loss.ratio_over to 'token'"),
        ({"advantage": {"method": "ppo"}, "critic": {"num_updates": 0}}, "critic.num_updates is 0"),
        (
            {"advantage": {"method": "ppo"}, "critic": {"gae_lambda": 1.1}},
            "critic.gae_lambda is 1.1: set it to a number from 0 to 1",
        ),
        ({"advantage": {"method": "ppo"}, "critic": {"value_clip": -1.0}}, "critic.value_clip is -1.0"),
        ({"reward": {"judge": "generative"}}, "reward.judge_path is not set"),
        ({"sampler": {"difficulty_low": 0.9, "difficulty_high": 0.9}}, "filters out everything.*set difficulty_low below 1"),
        ({"sampler": {"difficulty_low": 1.0, "difficulty_high": 2.0}}, "filters out everything"),
        ({"sampler": {"difficulty_low": -1.0, "difficulty_high": 0.0}}, "filters out everything"),
    ],
)
def test_settings_that_cannot_make_a_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(small.changed(GOOD, changes))


@pytest.mark.parametrize(
    ("advantage", "names"),
    [
        ({"method": "grpo"}, "advantage.method 'grpo'"),
        ({"method": "grpo_step_sum"}, "advantage.method 'grpo_step_sum'"),
        ({"method": "rloo"}, "advantage.method 'rloo'"),
        ({"normalize": "group"}, "advantage.normalize 'group'"),
        ({"normalize": "group_step"}, "advantage.normalize 'group_step'"),
    ],
)
def test_a_group_of_one_cannot_be_its_own_baseline(advantage: dict[str, Any], names: str) -> None:
    alone = small.changed(GOOD, {"rollout": {"group_size": 1}})
    check_settings(alone)  # whitening over the batch needs no group
    with pytest.raises(ValueError, match=f"group_size is 1, but {names} compares .*: set it to 2 or more"):
        check_settings(small.changed(alone, {"advantage": advantage}))


def test_prompts_are_dealt_out_evenly() -> None:
    with pytest.raises(ValueError, match="num_prompts is 64, which 5 processes cannot share equally: set it to a multiple of 5"):
        check_settings(GOOD, world_size=5)


def test_prompts_have_to_fit_with_their_responses() -> None:
    examples = [LABELLED, replace(LABELLED, example_id="e2")]
    params = SamplingParams(max_new_tokens=10)
    check_prompt_lengths([(1,), (1,) * 11], examples, params, max_context=21, max_rows=20)
    with pytest.raises(ValueError, match=r"example e2 has 11 tokens.*context of 20: lower"):
        check_prompt_lengths([(1,), (1,) * 11], examples, params, max_context=20, max_rows=20)
    with pytest.raises(ValueError, match=r"example e2 has 11 tokens, .*train\.micro_batch_tokens = 19: raise"):
        check_prompt_lengths([(1,), (1,) * 11], examples, params, max_context=21, max_rows=19)


def check(examples: list[Example], eval_examples: list[Example] | None = None, judge: bool = True, num_prompts: int = 1) -> None:
    cfg = replace(GOOD, rollout=replace(GOOD.rollout, num_prompts=num_prompts))
    check_examples(examples, eval_examples or [], SCHEMA, OracleJudge(0.0, 0, SCHEMA) if judge else None, cfg)


def test_examples_that_can_be_trained_on_pass() -> None:
    check([LABELLED], [LABELLED])


def test_pairs_that_are_trained_on_are_counted_in_the_evaluation() -> None:
    others = [replace(LABELLED, example_id=f"e{i}", title=f"title {i}") for i in range(3)]
    assert seen_in_training([LABELLED], others[:1]) == seen_in_training([LABELLED], []) == ""
    same_id, same_texts = replace(others[0], example_id="e1"), replace(LABELLED, example_id="other")
    note = seen_in_training([LABELLED], [same_id, same_texts, others[2]])
    assert note.startswith("2 of 3 examples are also in data.train")


def test_fake_verdicts_need_pairs_to_put_them_on() -> None:
    cfg = replace(GOOD, data=replace(GOOD.data, adversarial_frac=0.5), rollout=replace(GOOD.rollout, num_prompts=1))
    with pytest.raises(ValueError, match=r"data\.adversarial_frac is 0\.5, but no example got a fake verdict"):
        check_examples([LABELLED], [], SCHEMA, OracleJudge(0.0, 0, SCHEMA), cfg)


def test_a_full_kl_needs_the_policy_s_vocabulary() -> None:
    full = replace(GOOD, loss=replace(GOOD.loss, kl_estimator="full"))
    check_reference(full, 500, 500)
    check_reference(GOOD, 500, 512)
    with pytest.raises(UserError, match="the reference has 512 tokens and the policy has 500: set it to 'k3'"):
        check_reference(full, 500, 512)


def test_the_simulated_annotator_needs_a_truth_where_nothing_else_grades() -> None:
    silent = replace(LABELLED, truth=None)
    judged = [spec.name for spec in SCHEMA.specs if not {"gold", "rule", "skip"} & set(spec.sources)]
    with pytest.raises(ValueError, match=f"{silent.example_id} has no truth for step '{judged[0]}', so .* earn nothing: add"):
        check([LABELLED, silent])
    skipped = StepSchema(tuple(replace(spec, sources=(*spec.sources, "skip")) for spec in SCHEMA.specs))
    check_examples(
        [silent], [], skipped, OracleJudge(0.0, 0, skipped), replace(GOOD, rollout=replace(GOOD.rollout, num_prompts=1))
    )


def test_examples_have_to_fill_a_step() -> None:
    with pytest.raises(ValueError, match=r"pairs\.jsonl has 1 examples, fewer than rollout\.num_prompts = 2"):
        check([LABELLED], num_prompts=2)


def test_examples_have_to_fill_what_a_step_starts() -> None:
    cfg = replace(GOOD, rollout=replace(GOOD.rollout, num_prompts=4, oversample=0.3))
    assert cfg.rollout.num_started == 6 and replace(cfg.rollout, oversample=0.25).num_started == 5
    examples = [replace(LABELLED, example_id=f"e{i}") for i in range(6)]
    judge = OracleJudge(0.0, 0, SCHEMA)
    check_examples(examples, [], SCHEMA, judge, cfg)
    with pytest.raises(
        ValueError, match=r"has 5 examples, fewer than rollout.num_prompts = 4 with rollout.oversample = 0.3: lower"
    ):
        check_examples(examples[:5], [], SCHEMA, judge, cfg)


def test_a_filter_that_keeps_all_has_no_support_to_replay() -> None:
    cfg = replace(GOOD, rollout=replace(GOOD.rollout, support="replay", top_k=50))
    check_support(cfg, 51)
    check_support(GOOD, 50)
    with pytest.raises(ValueError, match=r"top_k 50 keeps the whole vocabulary of 50: lower rollout.top_k"):
        check_support(cfg, 50)


def test_every_step_of_every_example_needs_a_grader() -> None:
    with pytest.raises(ValueError, match=r"nothing can grade step 'query_intent' of example e1: .*set reward\.judge"):
        check([LABELLED], judge=False)
    ungraded = replace(LABELLED, example_id="e7", gold=())
    with pytest.raises(ValueError, match="nothing can grade step 'verdict' of example e7"):
        check([LABELLED, ungraded])


def test_every_evaluation_example_needs_a_grade() -> None:
    with pytest.raises(ValueError, match="e7 has no grade"):
        check([LABELLED], [LABELLED, replace(LABELLED, example_id="e7", gold=())])


def test_a_loss_kernel_that_cannot_run_here() -> None:
    cpu = torch.device("cpu")
    assert (
        loss_impl("auto", cpu, torch.float32) in ("cpu", "reference")
        and loss_impl("reference", cpu, torch.float32) == "reference"
    )
    with pytest.raises(UserError, match=r"^loss\.impl: implementation 'triton' cannot be used because .*: give one of auto, "):
        loss_impl("triton", cpu, torch.float32)


def test_float32_on_a_gpu_is_said_once_and_is_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    gpu = replace(lab.one_process(), device=torch.device("cuda"))
    check_device(PolicyConfig(), gpu)
    (line,) = capsys.readouterr().out.splitlines()
    assert 'policy.dtype to "bfloat16"' in line
    check_device(PolicyConfig(), replace(gpu, rank=1, world_size=2))
    check_device(PolicyConfig(dtype="bfloat16"), gpu)
    check_device(PolicyConfig(), lab.one_process())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("program", ["train", "sft", "dpo", "train_judge"])
def test_training_asks_for_its_attention_before_it_reads_anything(program: str, tmp_path: Path) -> None:
    """No file that the settings name exists, and the first error is that of the attention."""
    policy = PolicyConfig(path=str(tmp_path / "absent"), attention="flash_attention_4", dtype="bfloat16")
    run_dir, one = str(tmp_path / "run"), lab.one_process()
    start = {
        "train": lambda: Run.build(Config(run_dir=run_dir, data=DataConfig(train="absent.jsonl"), policy=policy), one),
        "sft": lambda: sft(SftConfig(run_dir=run_dir, data="absent.jsonl", policy=policy), one),
        "dpo": lambda: dpo(DpoConfig(run_dir=run_dir, pairs="absent.jsonl", policy=policy), one),
        "train_judge": lambda: train_scalar(SftConfig(run_dir=run_dir, policy=policy), [], {}, SCHEMA, one),
    }[program]
    with pytest.raises(UserError, match=r"policy\.attention is 'flash_attention_4', which needs an NVIDIA GPU"):
        start()
