"""Settings of `srpo.train_judge` (4.3.1, 5.1.6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from srpo.core.config.sft import SftConfig
from srpo.core.config.train import LossConfig, OptimizerConfig, RolloutConfig, SamplerConfig, TrainConfig
from srpo.core.grades import Grades
from srpo.core.mappings import Texts
from srpo.core.ranges import LARGEST_INT, Count, Finite, Fraction, Range, Size
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSchema


@dataclass(frozen=True)
class MineConfig:
    """How hard cases are mined between the two stages of training."""

    pool: str = ""  # rollouts.jsonl of further responses to mine; empty: the judgments of the first stage
    num_responses: Count = 0  # number of responses of the pool, from its start; 0: all
    num_votes: Annotated[int, Range(2, LARGEST_INT)] = 8  # verdicts sampled on each response
    num_cases: Size = 13_000  # most cases that are chosen (5.1.6)
    solve_low: Finite = 0.01  # a case is chosen if its share of right verdicts lies strictly above this bound ...
    solve_high: Finite = 0.99  # ... and strictly below this one
    # Tags whose values come equally often among the cases, together with step and verdict; may be empty
    balance: tuple[str, ...] = ("query_type",)


@dataclass(frozen=True)
class JudgeGrpoConfig:
    """Settings of the second stage, a run of `srpo.train`. The policy's settings are those of `sft.policy`."""

    num_steps: Size = 100  # number of optimizer steps
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # Mined cases are neither solved nor hopeless, so only groups that are all right or all wrong are left out.
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(difficulty_low=0.0, difficulty_high=1.0))
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class JudgeConfig:
    """`python -m srpo.train_judge --data train.jsonl --judgments judged.jsonl --sft.policy.path base`"""

    run_dir: str = "runs/judge"  # folder for everything that the stages write
    kind: Literal["generative", "scalar"] = "generative"  # a judge that writes verdicts, or a probability per step (Appendix A)
    stage: Literal["all", "sft", "mine", "grpo"] = "all"  # stage to run; all: every stage whose result does not exist yet
    data: str = ""  # examples that the judgments refer to
    columns: Texts = field(default_factory=dict)  # columns of the files of data, by the key that each fills, as data.columns
    judgments: str = ""  # JSON Lines of human judgments (docs/programs/train_judge.md)
    # Instead of judgments: a rollouts.jsonl that a simulated annotator judges; its examples need `truth`, as the world's have
    rollouts: str = ""
    annotator_error_rate: Fraction = 0.0  # share of the simulated annotator's verdicts that are flipped
    annotator_reasons: bool = True  # let the simulated annotator give a reason for each verdict, from `truth`
    verified: str = ""  # copy of judge_queue.jsonl with its field "human" filled in
    unverified: Literal["drop", "use"] = "drop"  # cases that are not filled in: drop them, or use them with the labels they have
    simulate_human: bool = True  # with rollouts and without verified: the simulated annotator fills in the queue
    human_error_rate: Fraction = 0.0  # share of flipped verdicts in the queue that the simulated annotator fills in
    guidelines: str = ""  # text file that the judge's prompts begin with; kept with the judge, for training and selection
    max_new_tokens: Size = 256  # longest text of verdicts on one response, in tokens
    held_out: Size = 200  # number of judgments, from the end, that measure the judge and do not train it
    num_votes: Size = 8  # verdicts sampled on each held-out response; their share of "correct" is the judge's confidence
    steps: StepsConfig = field(default_factory=StepsConfig)
    grades: Grades = field(default_factory=Grades)
    sft: SftConfig = field(default_factory=lambda: SftConfig(num_steps=500))
    mine: MineConfig = field(default_factory=MineConfig)
    grpo: JudgeGrpoConfig = field(default_factory=JudgeGrpoConfig)

    @property
    def schema(self) -> StepSchema:
        """The steps and grades of these settings."""
        return self.steps.schema(self.grades)
