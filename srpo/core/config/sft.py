"""Settings of `srpo.sft`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from srpo.core.config.train import OptimizerConfig, PolicyConfig
from srpo.core.grades import Grades
from srpo.core.ranges import NonNegative, Seed, Size
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSchema


@dataclass(frozen=True)
class SftConfig:
    """`python -m srpo.sft --data pairs.jsonl --policy.path base --run-dir runs/sft`"""

    run_dir: str = "runs/sft"  # folder for everything that the run writes; it belongs to one configuration
    seed: Seed = 0  # seed of the order of the pairs
    data: str = ""  # JSON Lines of {"prompt": "...", "response": "..."}
    # Text around each prompt of data, such as a chat template; its special tokens are special, those in data are plain text
    prompt: str = "{prompt}"
    # Weight of each token of a response's last step, the verdict, relative to the tokens before; a response keeps its weight
    verdict_weight: NonNegative = 1.0
    steps: StepsConfig = field(default_factory=StepsConfig)
    grades: Grades = field(default_factory=Grades)
    num_steps: Size = 1000  # number of optimizer steps
    batch_size: Size = 64  # responses per optimizer step, over all ranks
    micro_batch_tokens: Size = 16384  # most tokens in one forward and backward pass; lower it if memory runs out
    checkpoint_every: Size = 500  # optimizer steps between checkpoints; the last step always writes one
    # Input of the loss: logits, or hidden states, so that logits exist for only some rows at a time (less memory)
    inputs: Literal["logits", "hidden"] = "logits"
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=2e-5, warmup_steps=30, schedule="linear", min_lr_frac=0.1)
    )

    @property
    def schema(self) -> StepSchema:
        """The steps and grades of these settings."""
        return self.steps.schema(self.grades)
