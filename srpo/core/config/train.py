"""Settings of `srpo.train`: frozen dataclasses, read from sparse TOML files and the command line by `srpo.core.settings.load`.

Paper values are the defaults (5.1.5). If the paper leaves a question open, the default is the first reading in docs/paper.md.
The comment on a field is its help text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from srpo.core.config.chat import ChatConfig
from srpo.core.grades import Grades
from srpo.core.mappings import Texts
from srpo.core.ranges import (
    BelowOne,
    Count,
    Finite,
    Fraction,
    NonNegative,
    OpenFraction,
    Positive,
    PositiveFraction,
    Range,
    Seed,
    Size,
    Temperature,
)
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSchema


@dataclass(frozen=True)
class DataConfig:
    train: str = ""  # training examples: CSV, TSV, JSON Lines, Parquet, a folder of one, ESCI or WANDS (docs/data.md)
    eval: str = ""  # held-out examples in the same formats; empty: no evaluation during training
    # Template of the prompt. Replaced are {query}, {item} (title and all fields, one per line), {title}, the name of any field,
    # {instructions} (they name the steps and the grades) and {guidelines}
    prompt: str = "{instructions}\n\nQuery: {query}\nItem: {item}\n"
    guidelines: str = ""  # text file with the annotation guidelines, for {guidelines}; without it they follow the instructions
    # Share of the training pairs whose title ends, in the policy's prompt, in a fake verdict or a fake response of the best grade
    adversarial_frac: Fraction = 0.0
    # Columns of the files, by the key that each fills: query=q title=name label=judgement fields.brand=Brand. fields=* shows the
    # model all further columns, ignore=* leaves them out; a column named like a key needs no entry
    columns: Texts = field(default_factory=dict)
    eval_frac: BelowOne = 0.0  # share of the queries of train that is held out as eval, the same in every run; 0: none


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter (LoRA, by peft) that trains in place of the weights, which stay frozen (docs/adapters.md)."""

    rank: Count = 0  # rank of the adapter, such as 16; 0: train all weights, or, with `start`, the rank of that adapter
    alpha: NonNegative = 0.0  # the adapter's product counts alpha / rank times; 0: alpha is twice the rank, or that of `start`
    # Names of the layers that get an adapter, such as q_proj; empty: all linear layers of attention and MLP, or, in models
    # whose experts are stacked in one parameter, attention and experts (without routers and dense MLPs)
    targets: tuple[str, ...] = ()
    start: str = ""  # folder of an adapter in peft's format that training goes on with, and that is the reference

    @property
    def on(self) -> bool:
        """Whether an adapter trains."""
        return bool(self.rank or self.start)


@dataclass(frozen=True)
class PolicyConfig:
    path: str = ""  # folder of the Hugging Face checkpoint, with its tokenizer, that training starts from
    # Checkpoint of pi_ref of Eq. 6; empty: the starting policy (with lora, no second model). Not loaded if loss.kl_coef is 0
    reference: str = ""
    # Implementation of the experts' products: torch's grouped_mm, a Python loop (the reference), or MegaBlocks
    experts: Literal["grouped_mm", "loop", "megablocks"] = "grouped_mm"
    # Attention kernel in training: torch's own on a GPU in bfloat16 (padded sequences elsewhere), or a FlashAttention package
    attention: Literal["torch", "flash_attention_2", "flash_attention_4"] = "torch"
    # Number format of forward, backward and sampling; the master weights are always float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False  # recompute each layer in the backward pass: less memory, more time
    max_context: Count = 0  # longest prompt plus response, in tokens; 0: the context length of the model
    # Begin prompts with the BOS token: as the tokenizer does by itself, always or never. Saved with the tokenizer of a checkpoint
    bos: Literal["tokenizer", "add", "none"] = "tokenizer"
    chat: ChatConfig = field(default_factory=ChatConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class VllmConfig:
    """Settings of a vLLM engine: the policy's (`rollout.vllm`) or the judge's (`reward.judge_vllm`)."""

    tensor_parallel_size: Size = 1  # consecutive ranks that share one vLLM, split over their devices; 1: one vLLM per rank
    max_num_seqs: Size = 256  # largest number of responses that are decoded at once
    kv_cache_mib: Count = 0  # size of the key-value cache in MiB; 0: 1024 on a CPU, the rest of gpu_memory_frac on a GPU
    # Share of the GPU's memory for vLLM's weights and key-value cache; the trainer needs the rest
    gpu_memory_frac: OpenFraction = 0.45
    enforce_eager: bool = False  # start without compilation and CUDA graphs: starts sooner, samples slower. Always so on a CPU
    bucket_mib: Count = 0  # MiB of weights sent at once in a weight sync; 0: 16 on a CPU, 512 on a GPU
    timeout_s: Positive = 300.0  # seconds without a sign of life after which the engine is stopped and started again
    start_timeout_s: Positive = 1800.0  # the same limit while the engine starts, in seconds


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["local", "vllm"] = "local"  # sample with the trainer's own model, or with vLLM in its own process
    num_prompts: Size = 64  # prompts per optimizer step, over all ranks ("rollout batch size")
    group_size: Size = 16  # responses per prompt (G)
    max_new_tokens: Size = 512  # longest response, in tokens
    temperature: Temperature = 0.99  # sampling temperature; ratios, KL and entropy are taken at the same temperature
    top_k: Count = 100  # sample among the k most likely tokens; 0: no filter
    ratio: Literal["filtered", "unfiltered"] = "filtered"  # distribution of the ratios: with or without top-k filter
    # Top-k ids of the filtered ratio: recomputed by the trainer, or replayed as the engine reported them
    support: Literal["recompute", "replay"] = "recompute"
    # Experts of each token in the update: recomputed by the trainer's router, or replayed as the engine chose them
    routing: Literal["recompute", "replay"] = "recompute"
    overlap: Literal["auto", "on", "off"] = "auto"  # score finished groups while others are still sampled; auto: only with vllm
    oversample: NonNegative = 0.0  # start this share of num_prompts in addition and abort the groups that finish last; 0: none
    cut_tail: BelowOne = 0.0  # abort this share of num_prompts once all other groups have finished; 0: none
    # 1: sample the next batch during the update, with weights that are one optimizer step old; 0: wait
    off_policy_steps: Annotated[int, Range(0, 1)] = 0
    vllm: VllmConfig = field(default_factory=VllmConfig)

    @property
    def num_started(self) -> int:
        """Number of prompts whose sampling an optimizer step starts, over all ranks."""
        return self.num_prompts + math.ceil(self.oversample * self.num_prompts - 1e-9)

    @property
    def cuts(self) -> bool:
        """Whether groups may be aborted."""
        return bool(self.oversample or self.cut_tail)


@dataclass(frozen=True)
class RewardConfig:
    judge: Literal["none", "oracle", "generative", "scalar"] = "none"  # R_phi: grades the steps whose sources name "judge"
    # Checkpoint of a generative or scalar judge, as srpo.train_judge writes it; for judge_engine url with judge_api completions
    # the folder of its tokenizer, which then makes the token ids of its prompts; empty: the server's tokenizer does
    judge_path: str = ""
    # Chat template around the judge's prompts; a server gets `system` and `options` by judge_api chat, else needs judge_path
    judge_chat: ChatConfig = field(default_factory=ChatConfig)
    # Text file that the judge's prompt begins with; empty: for a judge of srpo.train_judge the `guidelines` of its training
    judge_guidelines: str = ""
    judge_max_new_tokens: Size = 256  # longest text of verdicts that a generative judge writes on one response, in tokens
    # Where a generative judge runs: in this process, in a vLLM process, or behind the URL of a server
    judge_engine: Literal["local", "vllm", "url"] = "local"
    # Longest prompt plus verdicts, in tokens, for judge_engine local and vllm; 0: the model's context
    judge_max_context: Count = 0
    judge_vllm: VllmConfig = field(default_factory=lambda: VllmConfig(gpu_memory_frac=0.2))
    # OpenAI-compatible server for judge_engine url, such as http://host:8000/v1; the key is read from OPENAI_API_KEY
    judge_url: str = ""
    judge_model: str = ""  # name of the judge on that server; empty: the only model that the server has
    judge_api: Literal["chat", "completions"] = "chat"  # completions for a judge of srpo.train_judge, with judge_path
    judge_timeout_s: Positive = 120.0  # seconds to wait for one complete answer of the server
    judge_concurrency: Size = 64  # largest number of calls that one rank has in flight
    judge_retries: Count = 5  # further attempts after a call has failed
    judge_backoff_s: NonNegative = 1.0  # seconds before the second attempt; doubled for each further one, up to 60 s
    # After the last attempt has failed: stop the run, or count the verdict as missing
    judge_fallback: Literal["stop", "missing"] = "stop"
    judge_cache: Count = 65536  # number of judged responses whose verdicts are remembered; 0: none
    # Share of verdicts that the oracle flips; it simulates an annotator from the examples' `truth`
    judge_error_rate: Fraction = 0.0
    # Verdict of a scalar judge: correct if p >= 0.5, or the share p of the step's reward
    scalar: Literal["threshold", "probability"] = "threshold"
    # Share of a step's reward if the judge gave no verdict on it; above 0, a policy that keeps the judge silent earns it
    missing_verdict: Fraction = 0.0
    # Compare the judge with gold labels, on steps that have both: off, log the metrics, also warn, or also stop the run
    audit: Literal["off", "log", "warn", "stop"] = "log"
    # Say so (audit log, warn) or stop if more than this share of the steps left to the judge get no verdict; 1: never
    audit_missing: Fraction = 0.9
    audit_bound: Positive = 0.1  # warn or stop if a step's average error rate exceeds that of the warm-up by this much
    audit_min: Count = 100  # least number of verdicts in the average before it can warn or stop
    audit_warmup: Size = 20  # optimizer steps whose error rate the bound is measured from
    audit_decay: BelowOne = 0.9  # decay of the average, per optimizer step


@dataclass(frozen=True)
class AdvantageConfig:
    # One advantage per step: srpo. One per response: grpo (verdict reward), grpo_star (verdict and verified steps),
    # grpo_step_sum (sum of step rewards), reinforce and rloo (that sum against the batch or the rest of the group). One per
    # token: ppo
    method: Literal["srpo", "grpo", "grpo_star", "grpo_step_sum", "reinforce", "rloo", "ppo"] = "srpo"
    gamma: Fraction = 1.0  # discount between steps (Algorithm 1, line 12)
    # Set over which srpo's returns are normalized; the grpo methods normalize within the group, by Eq. 4
    normalize: Literal["batch", "group", "group_step", "none"] = "batch"
    scale: Literal["std", "none"] = "std"  # divide by the standard deviation, or only subtract the mean (none: Dr. GRPO)
    clip: NonNegative = 2.0  # bound on |advantage| after normalization; 0: no bound


@dataclass(frozen=True)
class LossConfig:
    clip_eps_low: NonNegative = 0.2  # lower epsilon of Eq. 6: ratios are clipped from below at 1 - clip_eps_low
    clip_eps_high: NonNegative = 0.2  # upper epsilon of Eq. 6: ratios are clipped from above at 1 + clip_eps_high
    kl_coef: NonNegative = 0.001  # weight of the KL divergence to the reference (beta); 0: no reference model is loaded
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k3"  # estimate from the sampled token, or full: exact, over all candidates
    # Divide a token by the length of its response (Eq. 6), the number of all tokens (DAPO), or rollout.max_new_tokens (Dr. GRPO)
    denominator: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    ratio_over: Literal["token", "step", "sequence"] = "token"  # one importance ratio per token, per step, or per response (GSPO)
    clip_form: Literal["ppo", "cispo"] = "ppo"  # clip the surrogate, or (cispo) only the weight of each token's gradient
    dual_clip: NonNegative = 0.0  # bound above 1 on the ratio of tokens with a negative advantage (dual-clip PPO); 0: no bound
    # Correct each token for its ratio trainer / engine: not at all, weight times min(ratio, cap), or weight 0 outside 1/cap..cap
    importance: Literal["off", "truncate", "mask"] = "off"
    importance_cap: Annotated[float, Range(1)] = 2.0  # cap of `importance`, at least 1
    # Responses that were cut at max_new_tokens: train on them, or count them in the baseline alone (mask: DAPO)
    overlong: Literal["train", "mask"] = "train"
    num_updates: Size = 1  # updates per rollout batch; together they count as one optimizer step
    # Input of the loss: logits, or hidden states, so that logits exist for only some rows at a time (less memory)
    inputs: Literal["logits", "hidden"] = "logits"
    impl: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"  # loss kernel; auto: the fastest that works here


@dataclass(frozen=True)
class OptimizerConfig:
    lr: NonNegative = 1e-6  # peak learning rate of AdamW
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)  # decay rates of AdamW's two moments
    weight_decay: NonNegative = 0.0  # decoupled weight decay of AdamW
    grad_clip: NonNegative = 1.0  # bound on the global gradient norm; 0: no bound
    warmup_steps: Count = 0  # optimizer steps over which the learning rate rises linearly
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # shape of the learning rate after the warm-up
    min_lr_frac: Fraction = 0.1  # learning rate at the last step as a share of lr, for linear and cosine


@dataclass(frozen=True)
class CriticConfig:
    """Settings of the critic of advantage.method "ppo"; other methods have no critic."""

    path: str = ""  # checkpoint of the critic's backbone; empty: policy.path
    # Where rewards are placed: each step's on its last token, or their sum on the last token of the response
    rewards: Literal["step_ends", "end"] = "step_ends"
    gamma: Fraction = 1.0  # discount per token
    gae_lambda: Fraction = 0.95  # lambda of generalized advantage estimation
    value_clip: NonNegative = 0.2  # bound on the change of a value within one optimizer step; 0: no bound
    num_updates: Size = 1  # critic updates per rollout batch
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))


@dataclass(frozen=True)
class SamplerConfig:
    difficulty_low: Finite = 0.01  # a group trains if its score lies strictly above this bound (4.2.1, 5.1.5) ...
    difficulty_high: Finite = 0.90  # ... and strictly below this one
    difficulty_score: Literal["total", "final"] = "total"  # group mean of total reward / maximum, or of verdict accuracy
    # Tags of the examples (query_type, domain, grade), one or several: prompts are drawn evenly over their values (4.1.2)
    balance: tuple[str, ...] | str = ()
    new_weight: PositiveFraction = 0.5  # weight of a new group score in the running solve rate of its example
    max_age: Count = 100  # optimizer steps after which a solve rate is forgotten, so that a skipped example is tried again
    refill: Count = 0  # most extra sampling rounds per step that replace groups that do not train (DAPO); 0: none

    def __post_init__(self) -> None:
        object.__setattr__(self, "balance", _names(self.balance))


@dataclass(frozen=True)
class StageConfig:
    """A stage of a curriculum (4.2.2), `[[curriculum]]` in TOML. It ends at the first of its ends; the last stage has none."""

    name: str  # unique name, printed when the stage begins
    data: str = ""  # examples of this stage alone; empty: data.train
    tags: dict[str, tuple[str, ...]] = field(default_factory=dict)  # keep examples that have one of these values of each tag
    solve_rate: tuple[Fraction, Fraction] | None = None  # keep examples whose tag solve_rate lies in this closed range
    balance: tuple[str, ...] | str | None = None  # replaces sampler.balance; unset: sampler.balance
    difficulty_low: Finite | None = None  # replaces sampler.difficulty_low; unset: sampler.difficulty_low
    difficulty_high: Finite | None = None  # replaces sampler.difficulty_high; unset: sampler.difficulty_high
    num_steps: Count = 0  # length of the stage in optimizer steps; 0: no fixed length
    metric: str = ""  # the stage ends when this metric stops rising (reward/total, eval/macro_f1, ...); empty: not used
    min_gain: NonNegative = 0.0  # a value counts as a rise if it exceeds the best value of the stage by more than this
    patience: Count = 0  # the stage ends after this many values of the metric in a row without a rise

    def __post_init__(self) -> None:
        if self.balance is not None:
            object.__setattr__(self, "balance", _names(self.balance))


def _names(value: tuple[str, ...] | str) -> tuple[str, ...]:
    """One name or several as a tuple, without empty ones."""
    return tuple(name for name in ((value,) if isinstance(value, str) else value) if name)


@dataclass(frozen=True)
class TrainConfig:
    micro_batch_tokens: Size = 16384  # most tokens in one forward and backward pass; lower it if memory runs out
    checkpoint_every: Size = 50  # optimizer steps between checkpoints; the last step always writes one
    keep_checkpoints: Size = 2  # number of newest checkpoints that are kept, besides the best one's
    eval_every: Count = 0  # optimizer steps between evaluations on data.eval; 0: only after the last step
    eval_examples: Count = 512  # evaluated examples: the first of data.eval, or of data.eval_frac spread over its queries; 0: all
    # Score whose best evaluation is kept, as run_dir/policy-best: eval/macro_f1, eval/accuracy, ...; empty: only the last policy
    best: str = ""
    patience: Count = 0  # the run ends after this many evaluations in a row without a rise of `best`; 0: at num_steps
    log_rollouts: bool = True  # write every response to run_dir/rollouts.jsonl
    tensorboard: bool = False  # also log metrics to run_dir/tensorboard
    wandb: bool = False  # also log metrics to Weights & Biases, project srpo
    trackio: bool = False  # also log metrics to trackio, project srpo


@dataclass(frozen=True)
class Config:
    """`python -m srpo.train @ configs/x.toml --loss.kl-coef 0`"""

    run_dir: str = "runs/train"  # folder for everything that the run writes; it belongs to one configuration
    seed: Seed = 0  # seed of all random draws
    num_steps: Count = 200  # number of optimizer steps, each a rollout batch with loss.num_updates updates
    steps: StepsConfig = field(default_factory=StepsConfig)
    grades: Grades = field(default_factory=Grades)
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    curriculum: tuple[StageConfig, ...] = ()  # stages in order (4.2.2), [[curriculum]] in TOML; none: all of data.train
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def schema(self) -> StepSchema:
        """The steps and grades of these settings."""
        return self.steps.schema(self.grades)
