"""Every setting is fixed, recorded, free, or known by its contents when a run goes on; a new one has to be classified here."""

from __future__ import annotations

import random
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from srpo.core.config.dpo import DpoConfig
from srpo.core.config.sft import SftConfig
from srpo.core.config.train import Config, StageConfig
from srpo.core.errors import UserError
from srpo.core.run_dir import claim_run_dir, settings_by_key
from srpo.core.settings import apply_table, dump_toml
from srpo.training.changes import SUPERVISED, TRAIN, Changes, remarks

# They decide what the run is; the others are in srpo/training/changes.py.
_OPTIMIZER = ["betas", "weight_decay", "grad_clip", "warmup_steps", "schedule", "min_lr_frac"]
_STEPS, _GRADES = ["preset", "form", "sources"], ["names", "good", "gains"]
_CHAT, _LORA = ["template", "system", "options.enable_thinking"], ["rank", "alpha", "targets"]
_FIXED = {
    "": ["seed", "curriculum"],
    "steps": _STEPS,
    "grades": _GRADES,
    "data": ["prompt", "adversarial_frac", "eval_frac"],
    "policy": ["dtype", "bos"],
    "policy.chat": _CHAT,
    "policy.lora": _LORA,
    "rollout": [
        "engine",
        "num_prompts",
        "group_size",
        "max_new_tokens",
        "temperature",
        "top_k",
        "ratio",
        "support",
        "routing",
        "oversample",
        "cut_tail",
        "off_policy_steps",
    ],
    "reward": [
        "judge",
        "judge_max_new_tokens",
        "judge_engine",
        "judge_max_context",
        "judge_model",
        "judge_api",
        "judge_error_rate",
        *(f"judge_chat.{name}" for name in _CHAT),
        "scalar",
        "missing_verdict",
        "audit_warmup",
        "audit_decay",
    ],
    "advantage": ["method", "gamma", "normalize", "scale", "clip"],
    "loss": [
        "clip_eps_low",
        "clip_eps_high",
        "kl_coef",
        "kl_estimator",
        "denominator",
        "ratio_over",
        "clip_form",
        "dual_clip",
        "importance",
        "importance_cap",
        "overlong",
        "num_updates",
    ],
    "optimizer": _OPTIMIZER,
    "critic": ["rewards", "gamma", "gae_lambda", "value_clip", "num_updates"],
    "critic.optimizer": _OPTIMIZER,
    "sampler": ["difficulty_low", "difficulty_high", "difficulty_score", "balance", "new_weight", "max_age", "refill"],
    "train": ["eval_examples"],
}
FIXED = [f"{section}.{name}".lstrip(".") for section, names in _FIXED.items() for name in names]
FIXED_SFT = ["seed", "prompt", "batch_size", "policy.dtype", "policy.bos", *(f"optimizer.{name}" for name in _OPTIMIZER)]
FIXED_SFT += [*(f"policy.chat.{name}" for name in _CHAT), *(f"policy.lora.{name}" for name in _LORA)]
FIXED_SFT += [*(f"steps.{name}" for name in _STEPS), *(f"grades.{name}" for name in _GRADES)]
FIXED_DPO = [*FIXED_SFT, "beta", "label_smoothing"]
FIXED_SFT += ["verdict_weight"]
FIXED_DPO += [f"rules.{name}" for name in ("prefer", "margin", "per_example", "balance", "seed")]
PROGRAMS = [(Config, TRAIN, FIXED), (SftConfig, SUPERVISED, FIXED_SFT), (DpoConfig, SUPERVISED, FIXED_DPO)]


@pytest.mark.parametrize(("cls", "changes", "fixed"), PROGRAMS)
def test_every_setting_is_of_one_kind(cls: type, changes: Changes, fixed: list[str]) -> None:
    kinds = {"free": changes.free, "recorded": changes.recorded, "contents": changes.contents, "fixed": fixed}
    for key in settings_by_key(cls()):
        held = [kind for kind, keys in kinds.items() if key in keys]
        assert len(held) == 1, f"{key} is {held or 'of no kind'}: name it once, here or in srpo/training/changes.py"
    known = set().union(*(settings_by_key(settings()) for settings, other, _ in PROGRAMS if other is changes))
    assert not set(changes.allowed).union(changes.contents, fixed) - known


def another(value: Any, key: str) -> Any:
    """Some other value of a setting, of the same type."""
    choices = {"schedule": ["linear", "cosine"], "impl": ["cpu"], "inputs": ["hidden"], "overlap": ["on"], "audit": ["stop"]}
    choices |= {"experts": ["loop"], "attention": ["flash_attention_2"], "judge_fallback": ["missing"]}
    if key.rpartition(".")[2] in choices:
        return random.choice(choices[key.rpartition(".")[2]])
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else value + 1 if isinstance(value, int) else value / 2


def with_value(cfg: Any, key: str, value: Any) -> Any:
    table: Any = value
    for name in reversed(key.split(".")):
        table = {name: table}
    return apply_table(cfg, table, "a test")


@pytest.mark.parametrize(("cls", "changes"), [(Config, TRAIN), (SftConfig, SUPERVISED), (DpoConfig, SUPERVISED)])
def test_free_and_recorded_settings_change_and_fixed_ones_are_refused(cls: type, changes: Changes, tmp_path: Path) -> None:
    inputs = {"the data": ("a", "1")}

    def claim(cfg: Any) -> None:
        claim_run_dir(tmp_path, cfg, True, changes.allowed, inputs, changes.contents)

    cfg, tried = cls(), 0
    claim(cfg)
    before = (tmp_path / "config.toml").read_bytes()
    for key, value in settings_by_key(cfg).items():
        if key in changes.allowed or key in changes.contents:
            claim(with_value(cfg, key, another(value, key)))
            tried += 1
    assert tried > 10
    with pytest.raises(UserError, match="holds a run with seed = 0"):
        claim(replace(cfg, seed=1))
    with pytest.raises(UserError, match=r"holds a run with optimizer\.warmup_steps"):
        claim(with_value(cfg, "optimizer.warmup_steps", 77))
    assert (tmp_path / "config.toml").read_bytes() == before


def test_the_last_stage_of_a_curriculum_may_grow_with_the_run(tmp_path: Path) -> None:
    def claim(*stages: StageConfig) -> None:
        claim_run_dir(tmp_path, replace(Config(), curriculum=stages), True, TRAIN.allowed)

    claim(StageConfig("a", num_steps=3), StageConfig("b", num_steps=4))
    claim(StageConfig("a", num_steps=3), StageConfig("b", num_steps=9))
    claim(StageConfig("a", num_steps=3), StageConfig("b"))
    for stages in ((StageConfig("a", num_steps=4), StageConfig("b")), (StageConfig("a", num_steps=3), StageConfig("c"))):
        with pytest.raises(UserError, match="holds a run with curriculum"):
            claim(*stages)
    assert dump_toml(replace(Config(), curriculum=())).count("curriculum") == 1


def test_another_length_says_which_schedules_it_changes() -> None:
    cfg = Config()
    assert is_dataclass(cfg) and set(remarks(cfg, TRAIN.recorded).values()) == {""}
    falling = with_value(with_value(cfg, "optimizer.schedule", "linear"), "critic.optimizer.schedule", "cosine")
    said = remarks(falling, TRAIN.recorded)
    assert "optimizer.schedule is 'linear' and critic.optimizer.schedule is 'cosine'" in said["num_steps"]
    assert said["optimizer.lr"] == "" and "critic" not in remarks(falling, TRAIN.recorded[:2])["num_steps"]
