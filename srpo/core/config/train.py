"""Every setting of a training run: frozen dataclasses, read from sparse TOML and the command line by `load`.

Paper values are the defaults (5.1.5); where the paper is silent the default is the first reading of docs/paper.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from srpo.core.steps import PAPER_STEPS, StepSpec


@dataclass(frozen=True)
class DataConfig:
    train: str = ""  # JSON Lines or Parquet of examples, a folder of such files, or of the official ESCI release (docs/data.md)
    eval: str = ""  # the same, held out; empty: no evaluation during training
    prompt: str = (
        "Query: {query}\nItem: {item}\n"  # {query}, {item} (title and fields, one per line) or {title} and any field's name
    )


@dataclass(frozen=True)
class PolicyConfig:
    path: str = ""  # folder of a Hugging Face checkpoint with its tokenizer: where training starts from
    reference: str = ""  # the same for pi_ref of Eq. 6; empty: the starting policy. Not loaded when loss.kl_coef is 0
    experts: Literal["grouped_mm", "loop", "megablocks"] = "grouped_mm"  # torch's grouped products, a plain loop, or MegaBlocks
    dtype: Literal["float32", "bfloat16"] = "float32"  # of forward, backward and sampling; master weights are always fp32
    activation_checkpointing: bool = False  # layers are computed again in the backward: slower, less memory
    max_context: int = 0  # longest prompt plus response in tokens; 0: what the model was made for


@dataclass(frozen=True)
class VllmConfig:
    """Of rollout.engine "vllm" and, as `[reward.judge_vllm]`, of reward.judge_engine "vllm"."""

    tensor_parallel_size: int = 1  # consecutive ranks of a host that share one vLLM, split over their devices; 1: one each
    max_num_seqs: int = 256  # responses that are decoded at once
    kv_cache_mib: int = 0  # of key-value cache; 0: 1024 on a CPU, what gpu_memory_frac leaves on a GPU
    gpu_memory_frac: float = 0.45  # of a GPU's memory for weights and key-value cache; the trainer needs the rest
    enforce_eager: bool = False  # without compiled kernels and CUDA graphs: starts sooner, samples slower. A CPU never compiles
    bucket_mib: int = 0  # of weights that travel at once in a sync; 0: 16 on a CPU, 512 on a GPU
    timeout_s: float = 300.0  # an engine without any sign of life for so long is stopped and started again
    start_timeout_s: float = 1800.0  # the same while it starts


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["local", "vllm"] = "local"  # vllm: in a process of its own, on the same device
    num_prompts: int = 64  # over all ranks, "rollout batch size"
    group_size: int = 16  # G
    max_new_tokens: int = 512  # longest response
    temperature: float = 0.99  # of sampling, and so of ratios, KL and entropy
    top_k: int = 100  # 0: no filter
    ratio: Literal["filtered", "unfiltered"] = "filtered"  # the distribution that importance ratios are taken on
    support: Literal["recompute", "replay"] = "recompute"  # its top_k ids: the trainer's own, or those that the engine drew from
    routing: Literal["recompute", "replay"] = "recompute"  # experts of each token: the trainer's own choice, or the engine's
    overlap: Literal["auto", "on", "off"] = "auto"  # score groups while others are sampled; auto: where the engine is vllm
    oversample: float = 0.0  # share of further prompts that are started; those that finish last are aborted. 0: none
    cut_tail: float = 0.0  # share of num_prompts that is aborted when the rest has finished; 0: none
    off_policy_steps: int = 0  # 1: sample the next step's batch while this one trains, with weights one step older
    vllm: VllmConfig = field(default_factory=VllmConfig)

    @property
    def num_started(self) -> int:
        """Prompts that an optimizer step begins to sample, over all ranks."""
        return self.num_prompts + math.ceil(self.oversample * self.num_prompts - 1e-9)

    @property
    def cuts(self) -> bool:
        """Whether groups may be aborted."""
        return bool(self.oversample or self.cut_tail)


@dataclass(frozen=True)
class RewardConfig:
    judge: Literal["none", "oracle", "generative", "scalar"] = "none"  # R_phi: who fills the steps whose sources name "judge"
    judge_path: str = ""  # checkpoint of a generative or scalar judge (srpo.train_judge)
    judge_max_new_tokens: int = 256  # of a generative judge's verdicts on one response
    judge_engine: Literal["local", "vllm", "url"] = "local"  # of a generative judge: here, in vLLM's process, or a server's
    judge_max_context: int = 0  # longest prompt plus verdicts of judge_engine local and vllm; 0: what the model was made for
    judge_vllm: VllmConfig = field(default_factory=lambda: VllmConfig(gpu_memory_frac=0.2))  # of judge_engine vllm
    judge_url: str = ""  # of judge_engine url: an OpenAI-compatible server, http://host:8000/v1; its key is in OPENAI_API_KEY
    judge_model: str = ""  # its name there; empty: the only one that the server has
    judge_api: Literal["chat", "completions"] = "chat"  # completions for a judge of srpo.train_judge: it knows no chat template
    judge_timeout_s: float = 120.0  # for one whole answer of the server
    judge_concurrency: int = 64  # calls of one rank that are under way at once
    judge_retries: int = 5  # further attempts at a call that got no answer
    judge_backoff_s: float = 1.0  # pause before the second attempt; it doubles with each, up to a minute
    judge_fallback: Literal["stop", "missing"] = "stop"  # a call without an answer at last stops the run, or is a missing verdict
    judge_cache: int = 65536  # questions whose verdicts are remembered; 0: none
    judge_error_rate: float = 0.0  # of the oracle, an annotator simulated from truths: how often a verdict is turned around
    scalar: Literal["threshold", "probability"] = "threshold"  # a scalar judge's verdict: whether p >= 0.5, or p of the reward
    missing_verdict: float = 0.0  # reward fraction of a step whose judge gave no verdict
    audit: Literal["off", "log", "warn", "stop"] = (
        "log"  # the judge against gold labels, on steps where it spoke and there are any
    )
    audit_bound: float = 0.1  # warn or stop when a step's averaged error rate is this much above that of the warm-up
    audit_min: int = 100  # verdicts in that average, below which it raises no alarm
    audit_warmup: int = 20  # optimizer steps whose error rate is the bound's measure
    audit_decay: float = 0.9  # of the average, per optimizer step


@dataclass(frozen=True)
class AdvantageConfig:
    # srpo: of each step. Of each response: grpo (verdict reward alone), grpo_star (and what labels verify of other steps),
    # grpo_step_sum (sum of step rewards), reinforce and rloo (that sum, against the batch or the others). ppo: of each token
    method: Literal["srpo", "grpo", "grpo_star", "grpo_step_sum", "reinforce", "rloo", "ppo"] = "srpo"
    gamma: float = 1.0  # discount between steps, Algorithm 1 line 12
    normalize: Literal["batch", "group", "group_step", "none"] = "batch"  # of srpo; the grpo methods are Eq. 4 by definition
    scale: Literal["std", "none"] = "std"  # divide by the std of what is normalized over; none: subtract the mean only (Dr. GRPO)
    clip: float = 2.0  # |advantage| after normalization; 0: no clip


@dataclass(frozen=True)
class LossConfig:
    clip_eps_low: float = 0.2  # epsilon of Eq. 6: ratios are clipped to 1 - this ...
    clip_eps_high: float = 0.2  # ... and 1 + this
    kl_coef: float = 0.001  # beta; 0 loads no reference model
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k3"  # full: exact, over all candidates for a token
    # Eq. 6's 1/|o_i|; token_mean: one mean over all tokens (DAPO); constant: 1/rollout.max_new_tokens for |o_i| (Dr. GRPO)
    denominator: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    ratio_over: Literal["token", "step", "sequence"] = "token"  # one ratio for each of these; sequence: GSPO
    clip_form: Literal["ppo", "cispo"] = "ppo"  # clip the surrogate; cispo: the weight of each token's gradient, so none is lost
    dual_clip: float = 0.0  # where A < 0 the ratio counts as at most this, above 1 (dual-clip PPO); 0: no bound
    # A token's weight by its ratio trainer / engine before the update. truncate: times min(ratio, cap); mask: 0 beyond 1/cap..cap
    importance: Literal["off", "truncate", "mask"] = "off"
    importance_cap: float = 2.0  # 1 or more
    overlong: Literal["train", "mask"] = "train"  # mask: what was cut at max_new_tokens is in the baseline, not the loss (DAPO)
    num_updates: int = 1  # per rollout batch; together they count as one optimizer step
    inputs: Literal["logits", "hidden"] = "logits"  # hidden: states before the head, so that logits exist for some rows at a time
    impl: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"  # of the loss; auto: the best that exists here


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-6  # of AdamW, over all parameters
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    weight_decay: float = 0.0  # of AdamW
    grad_clip: float = 1.0  # of the global norm; 0: no clip
    warmup_steps: int = 0  # optimizer steps in which the learning rate rises linearly
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # how it falls over the whole run
    min_lr_frac: float = 0.1  # of lr, at the last step of linear and cosine


@dataclass(frozen=True)
class CriticConfig:
    """Of advantage.method "ppo"; with another method there is no critic."""

    path: str = ""  # checkpoint of its backbone; empty: policy.path
    rewards: Literal["step_ends", "end"] = "step_ends"  # a step's reward on its last token, or the sum on the response's last
    gamma: float = 1.0  # discount per token
    gae_lambda: float = 0.95  # of generalized advantage estimates
    value_clip: float = 0.2  # a value moves at most so far in one optimizer step's updates; 0: no clip
    num_updates: int = 1  # of the critic per rollout batch
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))


@dataclass(frozen=True)
class SamplerConfig:
    difficulty_low: float = 0.01  # a group trains when its score lies strictly between (4.2.1, 5.1.5)
    difficulty_high: float = 0.90  # and this
    difficulty_score: Literal["total", "final"] = "total"  # group mean of total reward / maximum, or of verdict accuracy
    # Tags of the examples (query_type, domain, grade), or one: prompts are drawn evenly over all combinations of values (4.1.2)
    balance: tuple[str, ...] | str = ()
    new_weight: float = 0.5  # of a new group score in its example's solve-rate estimate, as long as the old estimate is fresh
    max_age: int = 100  # optimizer steps until an estimate has faded to nothing, and an example outside the window is tried again
    refill: int = 0  # extra generation rounds per optimizer step, at most, for groups that do not train (DAPO); 0: none

    def __post_init__(self) -> None:
        object.__setattr__(self, "balance", _names(self.balance))


@dataclass(frozen=True)
class StageConfig:
    """A stage of a curriculum (4.2.2): `[[curriculum]]` in TOML. It ends with the first of its ends; the last has none."""

    name: str  # its own, shown when it begins
    data: str = ""  # examples of its own; empty: data.train
    tags: dict[str, tuple[str, ...]] = field(default_factory=dict)  # only examples with one of these values of each tag
    solve_rate: tuple[float, float] | None = None  # only examples whose tag solve_rate, a number, lies from .. to
    balance: tuple[str, ...] | str | None = None  # unset: that of `sampler`, as the next two
    difficulty_low: float | None = None  # as in `sampler`
    difficulty_high: float | None = None  # as in `sampler`
    num_steps: int = 0  # it ends after so many optimizer steps; 0: not by their number
    metric: str = ""  # it ends when this metric (reward/total, eval/macro_f1; higher is better) stops rising; empty: not so
    min_gain: float = 0.0  # that a value has to be above the best of the stage so far, to count as a rise
    patience: int = 0  # values of the metric in a row without a rise that end the stage

    def __post_init__(self) -> None:
        if self.balance is not None:
            object.__setattr__(self, "balance", _names(self.balance))


def _names(value: tuple[str, ...] | str) -> tuple[str, ...]:
    """One name or several as a tuple, without empty ones."""
    return tuple(name for name in ((value,) if isinstance(value, str) else value) if name)


@dataclass(frozen=True)
class TrainConfig:
    micro_batch_tokens: int = 16384  # rows in one forward and backward
    checkpoint_every: int = 50  # optimizer steps; also after the last one
    keep_checkpoints: int = 2  # the newest so many stay
    eval_every: int = 0  # optimizer steps; 0: only after the last one
    eval_examples: int = 512  # the first so many of data.eval; 0: all
    log_rollouts: bool = True  # every response into run_dir/rollouts.jsonl
    tensorboard: bool = False  # metrics into run_dir/tensorboard, too
    wandb: bool = False  # and to Weights & Biases, project srpo
    trackio: bool = False  # and to trackio, project srpo


@dataclass(frozen=True)
class Config:
    """`python -m srpo.train @ configs/x.toml --loss.kl-coef 0`"""

    run_dir: str = "runs/train"  # all that the run writes; it belongs to one configuration
    seed: int = 0  # of all randomness
    num_steps: int = 200  # optimizer steps: rollout batches, each with loss.num_updates updates
    steps: tuple[StepSpec, ...] = PAPER_STEPS  # of a response, [[steps]] in TOML; a file replaces all of them
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    curriculum: tuple[StageConfig, ...] = ()  # stages one after another (4.2.2); none: all of data.train as `sampler` says
    train: TrainConfig = field(default_factory=TrainConfig)
