"""The inputs of a run by their contents, which its folder keeps and compares at every start (`claim_run_dir`)."""

from __future__ import annotations

from collections.abc import Sequence

from srpo.core.config.train import Config, PolicyConfig, RewardConfig
from srpo.core.digests import digest_of, digest_of_model
from srpo.core.run_dir import Inputs
from srpo.data.curriculum import Stage
from srpo.data.examples import Example
from srpo.data.prompts import read_guidelines

# Settings that name an input. They may change on resume if the contents do not.
PATHS = (
    "data.train",
    "data.eval",
    "data.guidelines",
    "policy.path",
    "policy.reference",
    "policy.lora.start",
    "reward.judge_path",
    "reward.judge_guidelines",
    "critic.path",
)


def run_inputs(cfg: Config, stages: Sequence[Stage], eval_examples: Sequence[Example]) -> Inputs:
    """Data and models of a run of `srpo.train`. Raises UserError for a model folder that is damaged or missing.

    A judge behind a URL has no contents to look at, but for the tokenizer in `reward.judge_path`.
    """
    models = starting_policy(cfg.policy)
    if cfg.loss.kl_coef:
        models["the reference"] = cfg.policy.reference or cfg.policy.path
    models |= judge_model(cfg.reward)
    if cfg.advantage.method == "ppo":
        models["the critic's start"] = cfg.critic.path or cfg.policy.path
    data = {}
    for stage in stages:
        name = f"the data of curriculum stage {stage.name!r}" if stage.name else "the training data"
        data[name] = (stage.ends.data or cfg.data.train, digest_of(stage.examples))
    if cfg.data.eval or cfg.data.eval_frac:
        data["the evaluation data"] = (cfg.data.eval or cfg.data.train, digest_of(eval_examples))
    for setting, path in (("data.guidelines", cfg.data.guidelines), ("reward.judge_guidelines", cfg.reward.judge_guidelines)):
        if path:
            data[f"the text of {setting}"] = (path, digest_of([read_guidelines(path, setting)]))
    return model_inputs(models) | data


def starting_policy(policy: PolicyConfig) -> dict[str, str]:
    """{"the starting policy": its folder}, and that of the adapter that it starts with."""
    return {"the starting policy": policy.path} | ({"the starting adapter": policy.lora.start} if policy.lora.start else {})


def judge_model(reward: RewardConfig) -> dict[str, str]:
    """{"the judge": its folder} if the judge is a model on the disk, or its tokenizer is."""
    by_url = reward.judge == "generative" and reward.judge_engine == "url" and not reward.judge_path
    return {"the judge": reward.judge_path} if reward.judge in ("generative", "scalar") and not by_url else {}


def model_inputs(models: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Inputs that are checkpoint folders: {"the judge": path}; each folder is read once."""
    digests = {path: digest_of_model(path) for path in dict.fromkeys(models.values())}
    return {name: (path, digests[path]) for name, path in models.items()}
