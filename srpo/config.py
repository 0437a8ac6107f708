"""Every setting of a training run: frozen dataclasses, read from sparse TOML and the command line by `load`.

Paper values are the defaults (5.1.5); where the paper is silent the default is the first reading of docs/paper.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from srpo.steps import PAPER_STEPS, StepSpec


@dataclass(frozen=True)
class DataConfig:
    train: str = ""  # JSON Lines or Parquet of examples (docs/data.md), or a folder of official ESCI Parquet files
    eval: str = ""  # the same, held out; empty: no evaluation during training
    prompt: str = (
        "Query: {query}\nItem: {item}\n"  # {query}, {item} (title and fields, one per line) or {title} and any field's name
    )


@dataclass(frozen=True)
class PolicyConfig:
    path: str = ""  # folder of a Hugging Face checkpoint with its tokenizer: where training starts from
    reference: str = ""  # the same for pi_ref of Eq. 6; empty: the starting policy. Not loaded when loss.kl_coef is 0
    experts: Literal["grouped_mm", "loop", "megablocks"] = "grouped_mm"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward and backward; master weights are always fp32
    activation_checkpointing: bool = False
    max_context: int = 0  # longest prompt plus response in tokens; 0: what the model was made for


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["local"] = "local"
    num_prompts: int = 64  # over all ranks, "rollout batch size"
    group_size: int = 16  # G
    max_new_tokens: int = 512
    temperature: float = 0.99
    top_k: int = 100  # 0: no filter
    ratio: Literal["filtered", "unfiltered"] = "filtered"  # the distribution that importance ratios are taken on


@dataclass(frozen=True)
class RewardConfig:
    judge: Literal["none", "oracle", "generative"] = "none"  # R_phi: who fills the steps whose sources name "judge"
    judge_path: str = ""  # checkpoint of a generative judge
    judge_max_new_tokens: int = 256  # of a generative judge's verdicts on one response
    judge_error_rate: float = 0.0  # of the oracle (a simulated annotator): how often a verdict is turned around
    missing_verdict: float = 0.0  # reward fraction of a step whose judge gave no verdict


@dataclass(frozen=True)
class AdvantageConfig:
    method: Literal["srpo", "grpo", "grpo_step_sum"] = "srpo"  # grpo: verdict reward alone; grpo_step_sum: sum of step rewards
    gamma: float = 1.0  # discount between steps, Algorithm 1 line 12
    normalize: Literal["batch", "group", "group_step", "none"] = "batch"  # of srpo; the grpo methods are Eq. 4 by definition
    clip: float = 2.0  # |advantage| after normalization; 0: no clip


@dataclass(frozen=True)
class LossConfig:
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    kl_coef: float = 0.001  # beta; 0 loads no reference model
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k3"
    denominator: Literal["sequence_mean", "token_mean"] = "sequence_mean"  # Eq. 6's 1/|o_i|, or one mean over all tokens
    num_updates: int = 1  # optimizer steps per rollout batch
    impl: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # of the global norm; 0: no clip
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    min_lr_frac: float = 0.1  # of lr, at the last step of linear and cosine


@dataclass(frozen=True)
class SamplerConfig:
    difficulty_low: float = 0.01  # a group trains when its score lies strictly between (4.2.1, 5.1.5)
    difficulty_high: float = 0.90
    difficulty_score: Literal["total", "final"] = "total"  # group mean of total reward / maximum, or of verdict accuracy
    balance: str = ""  # a tag of the examples (query_type, domain, grade): prompts are drawn evenly over its values (4.1.2)


@dataclass(frozen=True)
class TrainConfig:
    micro_batch_tokens: int = 16384  # rows in one forward and backward
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    eval_every: int = 0  # 0: only after the last step
    eval_examples: int = 512  # 0: all
    log_rollouts: bool = True
    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False


@dataclass(frozen=True)
class Config:
    """`python -m srpo.train @ configs/x.toml --loss.kl-coef 0`"""

    run_dir: str = "runs/train"
    seed: int = 0
    num_steps: int = 200
    steps: tuple[StepSpec, ...] = PAPER_STEPS
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
