"""Settings of `srpo.demo`: the catalogue world, a tiny model, and the stages."""

from __future__ import annotations

from dataclasses import dataclass, field

from srpo.core.config.train import AdvantageConfig
from srpo.core.ranges import Count, Fraction, NonNegative, Positive, Seed, Size


@dataclass(frozen=True)
class TinyConfig:
    """A Qwen3-MoE that trains on a laptop: 2.3 M parameters with a vocabulary of 2,048, 1.1 M of them active per token."""

    hidden_size: Size = 128  # width of the residual stream
    num_layers: Size = 4  # number of decoder layers
    num_heads: Size = 4  # number of attention heads
    num_kv_heads: Size = 2  # number of key-value heads
    head_dim: Size = 32  # width of one attention head
    num_experts: Size = 8  # experts per layer
    experts_per_token: Size = 2  # experts that each token is routed to
    expert_size: Size = 128  # intermediate width of one expert
    initializer_range: Positive = 0.05  # standard deviation of the initial weights
    max_context: Size = 1024  # longest prompt plus response, in tokens
    rope_theta: Positive = 10000.0  # base of the rotary position embedding


@dataclass(frozen=True)
class TeacherBias:
    """How often the teacher makes each of its mistakes. Its later steps follow from what it wrote before.

    The teacher sees all evidence and draws the wrong conclusion: a policy warmed up on it is capable and biased, not ignorant.
    """

    misread_negation: Fraction = 0.65  # S1: "not red" becomes "red"
    mistake_mention: Fraction = 0.60  # S2: a category that the title only mentions is taken for the item's own category
    related_as_match: Fraction = 0.60  # S3: a sibling category is called a match
    overlook_missing: Fraction = 0.60  # S4: attributes that the listing does not state are accepted
    verdict_off_by_one: Fraction = 0.10  # S5: the verdict is one class too high or too low
    misread_word: Fraction = 0.0  # S1: about 130 words for categories and attributes are each read as one other word


@dataclass(frozen=True)
class DemoConfig:
    """`python -m srpo.demo --seed 1 --run-dir runs/demo-1`"""

    run_dir: str = "runs/demo"  # folder for everything that the demo writes
    seed: Seed = 0  # seed of the world, the model and all random draws
    num_demonstrations: Size = 60_000  # pairs that the teacher answers, for SFT
    num_train: Size = 8_000  # further pairs, for reinforcement learning
    num_eval: Size = 4096  # held-out pairs that are judged before and after
    vocab_size: Size = 1536  # size of the tokenizer that is trained on the demonstrations
    model: TinyConfig = field(default_factory=TinyConfig)
    bias: TeacherBias = field(default_factory=TeacherBias)
    judge_error_rate: Fraction = 0.05  # share of flipped verdicts of the simulated annotator that grades S1 and S2
    sft_steps: Size = 1300  # optimizer steps of SFT
    sft_batch: Size = 64  # responses per optimizer step of SFT
    sft_lr: NonNegative = 2e-3  # peak learning rate of SFT
    rl_steps: Count = 45  # optimizer steps of reinforcement learning
    num_prompts: Size = 96  # prompts per optimizer step of reinforcement learning
    group_size: Size = 8  # responses per prompt (G)
    rl_lr: NonNegative = 1e-4  # peak learning rate of reinforcement learning
    kl_coef: NonNegative = 0.001  # weight of the KL divergence to the policy after SFT (beta)
    max_new_tokens: Size = 80  # longest response, in tokens
    eval_every: Count = 9  # optimizer steps between evaluations during reinforcement learning
    # Share of the pairs whose title claims a verdict, in the demonstrations and in reinforcement learning (docs/data.md)
    adversarial_frac: Fraction = 0.0
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
