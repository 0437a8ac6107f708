"""Settings of `srpo.start`: judged pairs, a pretrained model, and the size of each stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from tyro.conf import Positional

from srpo.core.config.train import DataConfig, PolicyConfig
from srpo.core.grades import Grades
from srpo.core.mappings import Texts
from srpo.core.ranges import Count, Fraction, NonNegative, OpenFraction, Seed, Size
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSchema


@dataclass(frozen=True)
class StartConfig:
    """`python -m srpo.start pairs.csv --model DIR`"""

    data: Positional[str] = ""  # judged pairs (docs/data.md)
    model: str = ""  # folder of a Hugging Face checkpoint, with its tokenizer: the model that becomes the judge
    run_dir: str = "runs/start"  # folder for everything that the stages write
    check: bool = False  # only look at data and model and say what would be done
    seed: Seed = 0  # seed of the split and of all random draws
    # Columns of data by the key that each fills, as data.columns of srpo.train: query=q title=name label=judgement
    columns: Texts = field(default_factory=dict)
    grades: Grades = field(default_factory=Grades)
    steps: StepsConfig = field(default_factory=lambda: StepsConfig(sources="labels"))
    prompt: str = DataConfig().prompt  # template of the prompt, as data.prompt of srpo.train
    guidelines: str = ""  # text file with the annotation guidelines, as data.guidelines of srpo.train
    drop_fields: tuple[str, ...] = ("text",)  # product fields of data that are left out of prompts, such as long descriptions
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    eval_frac: OpenFraction = 0.2  # share of the queries that is held out
    dev_frac: OpenFraction = 0.1  # share of the other queries that chooses the best policy of SRPO
    num_eval: Count = 400  # held-out pairs, spread over the queries, that are judged before and after training; 0: all
    num_demonstrations: Size = 4000  # responses that SFT learns from, balanced over the grades
    num_own: Count = 4  # responses that the model samples per pair for demonstrations of its own; 0: templates only
    min_parse_rate: Fraction = 0.1  # least share of its responses that parse for the model to be asked for demonstrations
    max_new_tokens: Size = 128  # longest response, in tokens
    # SRPO also rewards category and attribute match, by labels that are read off the words of the pair as demonstrations are
    read_labels: bool = True
    verdict_weight: NonNegative = 5.0  # weight of the verdict's tokens in SFT, relative to the other steps'
    sft_steps: Size = 400  # optimizer steps of SFT
    sft_batch: Size = 8  # responses per optimizer step of SFT
    sft_lr: NonNegative = 0.0  # peak learning rate of SFT; 0: by the size of the model
    rl_steps: Size = 40  # optimizer steps of SRPO
    num_prompts: Size = 16  # prompts per optimizer step of SRPO
    group_size: Size = 8  # responses per prompt (G)
    rl_lr: NonNegative = 0.0  # peak learning rate of SRPO; 0: by the size of the model
    kl_coef: NonNegative = 0.001  # weight of the KL divergence to the policy after SFT (beta)
    eval_every: Count = 10  # optimizer steps of SRPO between evaluations, of which the best checkpoint is kept
    eval_examples: Count = 200  # pairs of these evaluations, spread over the queries; 0: all of dev_frac
    micro_batch_tokens: Size = 4096  # most tokens in one forward and backward pass; lower it if memory runs out

    @property
    def schema(self) -> StepSchema:
        """The steps and grades of these settings."""
        return self.steps.schema(self.grades)
