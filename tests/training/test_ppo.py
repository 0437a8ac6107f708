"""The baselines as runs: every file of configs/baselines trains, PPO resumes with its critic, and rewards rise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small

import srpo.train
import srpo.training.ppo
import srpo.training.run
from srpo.core.config.demo import TinyConfig
from srpo.core.config.train import Config
from srpo.core.grades import Grades
from srpo.core.metrics import check_key
from srpo.core.settings import apply_toml
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSpec
from srpo.data.readers import write_examples
from srpo.data.tokenizer import load_tokenizer
from srpo.policy.checkpoint_folders import latest_checkpoint
from srpo.policy.model import make_tiny
from srpo.train import train

BASELINES = sorted((Path(__file__).resolve().parents[2] / "configs" / "baselines").glob("*.toml"))
PPO: dict[str, Any] = {
    "advantage": {"method": "ppo"},
    "loss": {"num_updates": 2},
    "critic": {"num_updates": 2, "optimizer": {"lr": 1e-3}},
}


def test_the_baselines_are_there() -> None:
    names = (
        "cispo dapo dpo dr_grpo dual_clip gspo grpo grpo_star grpo_step_sum ppo reinforce rloo srpo_group_step srpo_step_ratio"
    )
    assert {path.stem for path in BASELINES} >= set(names.split())


@pytest.mark.parametrize("path", [path for path in BASELINES if path.stem != "dpo"], ids=lambda path: path.stem)
def test_every_baseline_trains(world: Any, tmp_path: Path, path: Path) -> None:
    cfg = replace(apply_toml(world.config(tmp_path / "run", num_steps=2), path), run_dir=str(tmp_path / "run"))
    assert cfg != world.config(tmp_path / "run", num_steps=2)
    train(cfg, small.ONE)
    lines = small.metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert all(value is not None and math.isfinite(value) for value in line.values())
        assert all(key == "step" or check_key(key) is None for key in line)
        assert line["train/grad_norm"] > 0 and abs(line["rollout/mismatch_kl"]) < 1e-6
    assert ("critic/loss" in lines[0]) == (path.stem == "ppo")
    assert not small.same_bits(small.parameters_of(tmp_path / "run" / "policy"), small.parameters_of(world.policy))


def test_cut_responses_stay_out_of_the_loss_and_are_counted(world: Any, tmp_path: Path) -> None:
    cfg = world.config(
        tmp_path, num_steps=1, rollout={"max_new_tokens": 38}, loss={"overlong": "mask"}, sampler={"difficulty_low": -1.0}
    )
    train(cfg, small.ONE)
    (line,) = small.metrics_of(tmp_path)
    assert (
        line["rollout/num_masked"] == pytest.approx(16 * line["rollout/truncated_frac"]) and 0 < line["rollout/num_masked"] < 16
    )
    assert 0 < line["train/num_tokens"] <= 16 * line["rollout/response_length"] - 38 * line["rollout/num_masked"] + 1e-6


def test_a_step_whose_responses_are_all_masked_is_no_trouble(world: Any, tmp_path: Path) -> None:
    cfg = world.config(
        tmp_path, num_steps=1, rollout={"max_new_tokens": 2}, loss={"overlong": "mask"}, sampler={"difficulty_low": -1.0}
    )
    for method in ("srpo", "ppo"):
        train(small.changed(cfg, {"run_dir": str(tmp_path / method), "advantage": {"method": method}}), small.ONE)
        (line,) = small.metrics_of(tmp_path / method)
        assert line["rollout/num_masked"] == 16 and line["train/num_tokens"] == 0 and line["train/grad_norm"] == 0
        assert small.same_bits(small.parameters_of(tmp_path / method / "policy"), small.parameters_of(world.policy))


@pytest.mark.parametrize("rewards", ["step_ends", "end"])
def test_the_critic_s_first_advantages_are_the_rewards_to_go(world: Any, tmp_path: Path, rewards: str) -> None:
    """With a critic of 0 and lambda 1, advantages are whitened rewards to go. With rewards at the end each token has the total of
    its response, as in REINFORCE; with rewards at the step ends it has the return of its step, as in SRPO."""
    same = {"advantage": {"method": "reinforce"}} if rewards == "end" else {}
    ppo = {"advantage": {"method": "ppo"}, "critic": {"rewards": rewards, "gae_lambda": 1.0}}
    lines = []
    for name, changes in (("one", same), ("other", ppo)):
        train(world.config(tmp_path / name, num_steps=1, **changes), small.ONE)
        lines += small.metrics_of(tmp_path / name)
    assert lines[0] == pytest.approx({key: lines[1][key] for key in lines[0]}, rel=1e-5, abs=1e-6)


def five_steps(world: Any, run_dir: Path) -> Config:
    return world.config(run_dir, num_steps=5, train={"checkpoint_every": 1, "keep_checkpoints": 1}, **PPO)


@pytest.fixture(scope="module")
def uninterrupted(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    run_dir = tmp_path_factory.mktemp("ppo") / "uninterrupted"
    train(five_steps(world, run_dir), small.ONE)
    return run_dir


@pytest.mark.parametrize("where", ["assign_credit", "policy checkpoint", "save_policy"])
def test_stopped_anywhere_ppo_ends_the_same(
    world: Any, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    stopped = five_steps(world, tmp_path / "stopped")
    name = "save_checkpoint" if where == "policy checkpoint" else where  # run.py's call, for the policy: the critic is saved
    module = srpo.train if where == "assign_credit" else srpo.training.run
    original, calls = getattr(module, name), []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == {"assign_credit": 4, "save_checkpoint": 3, "save_policy": 1}[name]:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, small.ONE)
    if where == "policy checkpoint":
        critic, policy = (latest_checkpoint(tmp_path / "stopped" / folder) for folder in ("critic", "checkpoints"))
        assert critic is not None and policy is not None and (critic.name, policy.name) == ("step_000003", "step_000002")
    train(stopped, small.ONE)
    for file in ("metrics.jsonl", "rollouts.jsonl"):
        assert (uninterrupted / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()
    assert small.same_bits(*(small.parameters_of(run / "policy") for run in (uninterrupted, tmp_path / "stopped")))
    assert len(list((tmp_path / "stopped" / "critic").iterdir())) == 2


def test_without_its_critic_a_run_does_not_go_on(world: Any, tmp_path: Path) -> None:
    cfg = world.config(tmp_path, num_steps=1, **PPO)
    train(cfg, small.ONE)
    (tmp_path / "critic").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="critic/step_000001 is not a complete checkpoint"):
        train(cfg, small.ONE)


STEPS = (
    StepSpec("look", r"\A.", r"([a-z])", tuple("abcdefg"), ("rule",), 0.5),
    StepSpec("verdict", r"[^a-z\s]", r"([a-z])", ("k", "w"), ("rule",), 1.0),
)


def toy(world: Any, folder: Path, **changes: Any) -> Config:
    """A policy that writes random text and is rewarded for certain letters, which it learns in a few steps."""
    tokenizer = load_tokenizer(world.base)
    make_tiny(tokenizer, TinyConfig(**{**vars(small.TINY), "initializer_range": 0.2}), 5).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    unlabelled = (None, None)
    write_examples(folder / "pairs.jsonl", (replace(e, gold=unlabelled, truth=unlabelled, tags={}) for e in world.examples()))
    cfg = world.config(
        folder / "run",
        steps=StepsConfig.of(STEPS),
        grades=Grades(STEPS[-1].options),
        num_steps=24,
        data={"train": str(folder / "pairs.jsonl")},
        policy={"path": str(folder / "base")},
        rollout={"num_prompts": 8, "group_size": 8, "max_new_tokens": 12},
        reward={"judge": "none"},
        optimizer={"lr": 1e-2, "warmup_steps": 0, "schedule": "constant"},
        train={"checkpoint_every": 100, "micro_batch_tokens": 100_000},
        sampler={"difficulty_low": -1.0, "difficulty_high": 2.0},
        loss={"kl_coef": 0.0},
    )
    return small.changed(cfg, changes)


@pytest.mark.parametrize("method", [pytest.param("reinforce", marks=pytest.mark.slow), "rloo", "ppo"])
def test_rewards_rise(world: Any, tmp_path: Path, method: str) -> None:
    """REINFORCE is marked slow: test_the_critic_s_first_advantages_are_the_rewards_to_go[end] compares it with PPO."""
    train(toy(world, tmp_path, advantage={"method": method}, critic={"optimizer": {"lr": 1e-3}}), small.ONE)
    rewards = [line["reward/total"] for line in small.metrics_of(tmp_path / "run")]
    assert sum(rewards[-12:]) / 12 > sum(rewards[:6]) / 6 + 0.1, rewards  # the noise of one step is 0.08
