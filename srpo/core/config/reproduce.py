"""Settings of `srpo.reproduce`: which table, which seeds, and the size of its experiments."""

from __future__ import annotations

from dataclasses import dataclass, field

from tyro.conf import Positional

from srpo.core.config.demo import TeacherBias, TinyConfig
from srpo.core.ranges import Count, Fraction, NonNegative, Seed, Size


@dataclass(frozen=True)
class Scale:
    """The size of the experiments: the paper's in miniature."""

    model: TinyConfig = field(default_factory=TinyConfig)
    num_demonstrations: Size = 60_000  # pairs that the imperfect teacher answers, for SFT
    bias: TeacherBias = field(default_factory=lambda: TeacherBias(misread_word=0.6))
    sft_steps: Size = 1300  # optimizer steps of SFT
    sft_lr: NonNegative = 2e-3  # peak learning rate of SFT
    num_train: Size = 8_000  # pairs for DPO and reinforcement learning
    num_steps: Size = 40  # optimizer steps of reinforcement learning
    num_prompts: Size = 48  # prompts per optimizer step of reinforcement learning
    group_size: Size = 8  # responses per prompt (G)
    # Peak learning rate of reinforcement learning: the better of 1e-4 and 3e-4 for GRPO, on a seed of no table
    lr: NonNegative = 3e-4
    eval_every: Count = 4  # optimizer steps between evaluations, for curves
    eval_examples: Count = 512  # pairs of the table's test set in each of these evaluations
    num_eval: Size = 4096  # pairs of each test set in the tables
    judge_error_rate: Fraction = 0.1  # share of flipped verdicts of the simulated annotator that stands for R_phi, as in Table 2
    dpo_prompts: Size = 1000  # prompts of which the SFT policy samples group_size responses each, for DPO's pairs
    dpo_steps: Size = 60  # optimizer steps of DPO
    dpo_lr: NonNegative = 2e-5  # peak learning rate of DPO
    judge_pairs: Size = 16_000  # pairs with one response of the SFT policy each, judged by the annotator, for training the judges
    judge_sft_steps: Size = 1500  # optimizer steps of the judges' SFT
    judge_grpo_steps: Size = 40  # optimizer steps of the generative judge's GRPO
    judge_lr: NonNegative = 3e-5  # peak learning rate of the generative judge's GRPO


@dataclass(frozen=True)
class ReproduceConfig:
    """`python -m srpo.reproduce table3 --seeds 0 1 2`"""

    table: Positional[str] = ""  # table1, table2, ... (not table7: an online experiment), headline, or all
    run_dir: str = "runs/reproduce"  # folder for all runs and tables
    seeds: tuple[Seed, ...] = (0, 1, 2)  # seeds of the runs; each has its own folder
    train_only: bool = False  # train what these seeds need and write no table: for one of several parallel processes
    background: bool = False  # continue in a separate process, with its output in run_dir/TABLE.log
    scale: Scale = field(default_factory=Scale)
