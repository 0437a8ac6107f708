"""Settings of `srpo.dpo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from srpo.core.config.train import OptimizerConfig, PolicyConfig
from srpo.core.grades import Grades
from srpo.core.mappings import Texts
from srpo.core.ranges import Count, NonNegative, Positive, Range, Seed, Size
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSchema


@dataclass(frozen=True)
class PairRules:
    """How sampled responses become pairs of a chosen and a rejected one."""

    prefer: Literal["verdict", "total"] = "verdict"  # prefer the right verdict over a wrong one, or the larger total reward
    margin: NonNegative = 0.0  # least difference of the total rewards, for prefer total
    per_example: Count = 4  # most pairs of one example, drawn from all of its pairs; 0: all
    balance: bool = False  # keep equally many pairs of each grade, as many as the rarest grade has
    seed: Seed = 0  # seed of the draws


@dataclass(frozen=True)
class DpoConfig:
    """`python -m srpo.dpo --rollouts runs/demo/rollouts.jsonl --policy.path runs/demo/sft/policy`"""

    run_dir: str = "runs/dpo"  # folder for everything that the run writes; it belongs to one configuration
    seed: Seed = 0  # seed of the order of the pairs
    pairs: str = ""  # JSON Lines of {"prompt": "...", "chosen": "...", "rejected": "..."}
    # Text around each prompt of pairs, such as a chat template; its special tokens are special, those in pairs are plain text
    prompt: str = "{prompt}"
    rollouts: str = ""  # instead of pairs: a rollouts.jsonl that was sampled with the same tokenizer
    # With rollouts: graded examples, whose labels decide which verdict is right; empty: the rewards in the rollouts decide
    data: str = ""
    columns: Texts = field(default_factory=dict)  # columns of the files of data, by the key that each fills, as data.columns
    rules: PairRules = field(default_factory=PairRules)
    steps: StepsConfig = field(default_factory=StepsConfig)
    grades: Grades = field(default_factory=Grades)
    num_steps: Size = 200  # number of optimizer steps
    batch_size: Size = 32  # pairs per optimizer step, over all ranks
    micro_batch_tokens: Size = 16384  # most tokens in one forward and backward pass; lower it if memory runs out
    checkpoint_every: Size = 100  # optimizer steps between checkpoints; the last step always writes one
    # Input of the loss: logits, or hidden states, so that logits exist for only some rows at a time (less memory)
    inputs: Literal["logits", "hidden"] = "logits"
    beta: Positive = 0.1  # strength of the pull towards the reference; a larger beta keeps the policy closer to it
    label_smoothing: Annotated[float, Range(0, 0.5, below=True)] = 0.0  # assumed share of wrong preferences, from 0 to below 0.5
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6, warmup_steps=10, schedule="linear"))

    @property
    def schema(self) -> StepSchema:
        """The steps and grades of these settings."""
        return self.steps.schema(self.grades)
