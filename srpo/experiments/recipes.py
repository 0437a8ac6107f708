"""How each row of the paper's tables is trained: its settings on top of `base`, and the starting checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from srpo.core.config.reproduce import Scale
from srpo.core.config.train import (
    Config,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from srpo.core.settings import apply_table
from srpo.core.step_presets import StepChange, StepsConfig
from srpo.experiments.start import PROMPT


@dataclass(frozen=True)
class Recipe:
    """One trained policy, or with train=False the starting checkpoint itself."""

    train: bool = True
    start: Literal["sft", "dpo"] = "dpo"  # "Training begins from the Tbstar-DPO checkpoint" (5.1.7)
    settings: Mapping[str, Any] = field(default_factory=dict)  # tables as in a TOML file of srpo.train
    steps: StepsConfig = field(default_factory=StepsConfig)
    data: Literal["train", "selected", "random_half"] = "train"
    share: float = 1.0  # fraction of Scale.num_steps
    judge: Literal["", "generative", "scalar"] = ""  # a trained judge that replaces the simulated annotator
    curve: bool = False  # whether to evaluate during training


# "Reward Model Only" (5.4.1): the judge grades S3 and S4, too; S5 is still graded by its label.
_JUDGED = StepsConfig(named={name: StepChange(sources=("judge",)) for name in ("category_match", "attribute_match")})
_GRPO = {"advantage": {"method": "grpo"}}
_LABELS, _QUERIES = {"balance": ["grade"]}, {"balance": ["query_type"]}
_EASY, _HARD = {"tags": {"difficulty": ["easy", "medium"]}}, {"tags": {"difficulty": ["hard"]}}


def _stages(*stages: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """GRPO in curriculum stages of equal length; the last one lasts to the end.

    `num_steps` -1 stands for the stage's share of the run, which `config_of` fills in.
    """
    last = len(stages) - 1
    return _GRPO | {"curriculum": [{"name": n, **s, "num_steps": 0 if i == last else -1} for i, (n, s) in enumerate(stages)]}


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "sft": Recipe(train=False, start="sft"),
        "dpo": Recipe(train=False),
        "grpo": Recipe(settings=_GRPO, curve=True),
        "grpo_star": Recipe(settings={"advantage": {"method": "grpo_star"}}),
        "step_reward_judged": Recipe(steps=_JUDGED, settings={"advantage": {"method": "grpo_step_sum"}}),
        "srpo_judged": Recipe(steps=_JUDGED),
        "step_reward": Recipe(settings={"advantage": {"method": "grpo_step_sum"}}),
        "srpo": Recipe(curve=True),
        "srpo_group_step": Recipe(settings={"advantage": {"normalize": "group_step"}}),
        "srpo_discounted": Recipe(settings={"advantage": {"normalize": "group_step", "gamma": 0.5}}, curve=True),
        "grpo_diverse": Recipe(settings=_GRPO | {"sampler": {"balance": ["query_type", "grade"]}}),
        "grpo_easier": Recipe(settings=_stages(("easier", _EASY | _LABELS))),
        "grpo_harder": Recipe(settings=_stages(("harder", _HARD | _LABELS))),
        "grpo_labels": Recipe(settings=_stages(("labels", _LABELS))),
        "grpo_easier_harder": Recipe(settings=_stages(("easier", _EASY | _LABELS), ("harder", _HARD | _LABELS))),
        "grpo_harder_half_run": Recipe(settings=_stages(("harder", _HARD | _LABELS)), share=0.5),
        "grpo_easier_harder_double": Recipe(
            settings=_stages(("easier", _EASY | _LABELS), ("harder", _HARD | _LABELS)), share=2.0
        ),
        "grpo_queries": Recipe(settings=_stages(("queries", _QUERIES))),
        "grpo_queries_labels": Recipe(settings=_stages(("queries", _QUERIES), ("labels", _LABELS))),
        "grpo_selected": Recipe(settings=_GRPO, data="selected", share=0.5),
        "grpo_random_half": Recipe(settings=_GRPO, data="random_half", share=0.5),
        "srpo_scalar": Recipe(judge="scalar", settings={"reward": {"scalar": "probability"}}),
        "srpo_generative": Recipe(judge="generative"),
    }
)


def base(scale: Scale, run_dir: Path, data: Path, eval_data: Path, policy: Path, seed: int) -> Config:
    """The settings that all rows share (5.1.5): SRPO with the hybrid reward, one update per batch, sized by `scale`."""
    return Config(
        run_dir=str(run_dir),
        seed=seed,
        num_steps=scale.num_steps,
        data=DataConfig(train=str(data), eval=str(eval_data), prompt=PROMPT),
        policy=PolicyConfig(path=str(policy)),
        rollout=RolloutConfig(num_prompts=scale.num_prompts, group_size=scale.group_size, max_new_tokens=80),
        reward=RewardConfig(judge="oracle", judge_error_rate=scale.judge_error_rate),
        loss=LossConfig(kl_coef=0.001),
        optimizer=OptimizerConfig(lr=scale.lr, warmup_steps=3, schedule="linear", min_lr_frac=0.1),
        train=TrainConfig(
            micro_batch_tokens=4096,
            checkpoint_every=10,
            keep_checkpoints=1,
            eval_every=scale.eval_every,
            eval_examples=scale.eval_examples,
        ),
    )


def config_of(recipe: Recipe, common: Config, judge_path: Path | None = None) -> Config:
    """The settings of a row: those of its recipe on top of `common`."""
    settings: dict[str, Any] = {**recipe.settings, "num_steps": max(1, round(recipe.share * common.num_steps))}
    if not recipe.curve:
        settings["train"] = {"eval_every": 0}
    if "curriculum" in settings:
        stages, length = settings["curriculum"], settings["num_steps"]
        parts = [length // len(stages) if stage["num_steps"] < 0 else stage["num_steps"] for stage in stages]
        settings["curriculum"] = [{**stage, "num_steps": part} for stage, part in zip(stages, parts, strict=True)]
    if recipe.judge:
        reward = {"judge": recipe.judge, "judge_path": str(judge_path), "judge_error_rate": 0.0}
        settings["reward"] = {**settings.get("reward", {}), **reward}
    return apply_table(replace(common, steps=recipe.steps), settings, "recipe")
