"""The settings that may change when a run goes on. Every other setting is fixed: it is part of what the run is.

A resumed run keeps the past as it was trained. So a setting is

    free       if the numbers of an optimizer step do not depend on it, or in their rounding alone: it concerns waiting, memory,
               files, and which steps are saved, logged and evaluated. A change needs no word.
    recorded   if people steer a run by it and it moves numbers: `changes.jsonl` has each change with its optimizer step.
    contents   if it names an input, which is known by its contents (`inputs.json`): the path may change.
    fixed      if the run would be another experiment, or its series of numbers would no longer be one.

"Killed and resumed gives the same numbers" holds for equal settings. tests/training/test_changes.py holds all settings by kind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from srpo.training.inputs import PATHS

# Kernels and memory: the same numbers up to rounding.
_COMPUTING = (
    "policy.experts",
    "policy.attention",
    "policy.activation_checkpointing",  # the second forward of a layer computes what the first one did
    "policy.max_context",  # a bound that is checked before the run: no response is cut by it
)
# Processes of vLLM: their memory, speed and waiting.
_VLLM = (
    "tensor_parallel_size",
    "max_num_seqs",
    "kv_cache_mib",
    "gpu_memory_frac",
    "enforce_eager",
    "bucket_mib",
    "timeout_s",
    "start_timeout_s",
)
_TRAIN = (
    "run_dir",  # folders can be moved
    *_COMPUTING,
    "rollout.overlap",  # when groups are scored, not how
    *(f"{engine}.{name}" for engine in ("rollout.vllm", "reward.judge_vllm") for name in _VLLM),
    # The judge's server. The judge itself (judge_model, judge_engine, judge_max_context) is fixed.
    *(f"reward.judge_{name}" for name in ("url", "timeout_s", "concurrency", "retries", "backoff_s", "fallback")),
    "reward.judge_cache",
    # Alarms: a run that the audit has stopped can go on. The settings of its averages (audit_warmup, audit_decay) are fixed.
    *(f"reward.audit{name}" for name in ("", "_missing", "_bound", "_min")),
    "loss.impl",  # a kernel that is named; if "auto" would take another one, `check_impl` says so
    "loss.inputs",
    "train.micro_batch_tokens",  # the order of sums
    "train.checkpoint_every",
    "train.keep_checkpoints",
    # The evaluations that are logged stay. eval_examples and data.eval are fixed, because train.best, train.patience and the
    # stages of a curriculum compare evaluations with each other.
    "train.eval_every",  # a stage that waits for an eval/* metric may then end at another step: the future alone
    "train.best",  # a new score begins with the logged evaluations whose checkpoints are there
    "train.patience",
    "train.log_rollouts",
    "train.tensorboard",
    "train.wandb",
    "train.trackio",
)


@dataclass(frozen=True)
class Changes:
    """Dotted keys of the settings of a program that may change."""

    free: frozenset[str]
    recorded: tuple[str, ...]
    contents: tuple[str, ...]
    cadence: str  # the number of optimizer steps between checkpoints

    @property
    def allowed(self) -> frozenset[str]:
        """Settings that `claim_run_dir` does not compare."""
        return self.free.union(self.recorded)


TRAIN = Changes(
    free=frozenset(_TRAIN),
    recorded=("num_steps", "optimizer.lr", "critic.optimizer.lr"),
    contents=PATHS,
    cadence="train.checkpoint_every",
)
# The kinds for srpo.sft, srpo.dpo and the scalar reward model.
SUPERVISED = Changes(
    free=frozenset(("run_dir", *_COMPUTING, "inputs", "micro_batch_tokens", "checkpoint_every")),
    recorded=("num_steps", "optimizer.lr"),
    contents=("data", "pairs", "rollouts", "policy.path", "policy.reference", "policy.lora.start"),
    cadence="checkpoint_every",
)


def remarks(cfg: Any, recorded: Collection[str]) -> Mapping[str, str]:
    """{recorded setting: how the line on its change ends}: another length is another schedule of the learning rate."""
    parts = {"optimizer": cfg.optimizer}
    if "critic.optimizer.lr" in recorded:
        parts["critic.optimizer"] = cfg.critic.optimizer
    falling = [f"{name}.schedule is {part.schedule!r}" for name, part in parts.items() if part.schedule != "constant"]
    past = f"; {' and '.join(falling)}: the steps so far had the learning rates of the old length" if falling else ""
    return dict.fromkeys(recorded, "") | {"num_steps": past}
