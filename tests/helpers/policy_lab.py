"""Helpers of the tests of srpo.policy, and their part that needs several ranks (`main`, called by policy_ranks.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from srpo_kernels import LossOptions
from tokenizers import Tokenizer, models
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedTokenizerFast

from srpo.core.batch import Batch, Rollout, pack
from srpo.core.config.demo import TinyConfig
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.checkpoint_folders import latest_checkpoint
from srpo.policy.model import Policy, make_tiny, save_policy
from srpo.policy.parallel import Parallel, clip_grad_norm, iter_full_params, to_local
from srpo.training.update import NonFiniteError, Objective, update, with_logprobs

VOCAB = 50
STEPS = ("first", "second", "third")
CONFIG = TinyConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, expert_size=16, initializer_range=0.3
)
ON_POLICY = Objective(
    LossOptions(clip_eps_low=0.2, clip_eps_high=0.2, kl_coef=0.05, kl_estimator="k3", temperature=0.9),
    top_k=10,
    sampling_top_k=10,
    num_updates=1,
    impl="reference",
)


def changed(objective: Objective, **changes: Any) -> Objective:
    """The objective with other values of its fields, and of the fields of its `LossOptions`."""
    options = {field.name: changes.pop(field.name) for field in fields(LossOptions) if field.name in changes}
    return replace(objective, options=replace(objective.options, **options), **changes)


# Cases of a loss computed from hidden states: (objective, options of `gradients`).
HIDDEN: dict[str, tuple[Objective, dict[str, Any]]] = {
    "untied": (replace(ON_POLICY, inputs="hidden", impl="auto"), {}),
    "tied": (replace(ON_POLICY, inputs="hidden", impl="auto"), {"tied": True, "activation_checkpointing": True}),
    "idle_rank": (replace(ON_POLICY, inputs="hidden"), {"tied": True}),
    "several_updates": (replace(ON_POLICY, inputs="hidden", num_updates=2), {}),
    "full": (changed(ON_POLICY, inputs="hidden", kl_estimator="full"), {}),
    "bfloat16": (replace(ON_POLICY, inputs="hidden"), {"tied": True, "dtype": "bfloat16"}),
}


def tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny(seed: int = 0, config: TinyConfig = CONFIG, *, tied: bool = False, **options: Any) -> Any:
    model = make_tiny(tokenizer(), config, seed, **options)
    if tied:  # head and embedding are one parameter
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def biased(vocab_size: int = VOCAB) -> Glm4MoeForCausalLM:
    """A model whose routers have a buffer that is stored in checkpoints, with values from 1 to 2."""
    config = Glm4MoeConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        n_routed_experts=6,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    model = Glm4MoeForCausalLM(config)
    for buffer in biases(model).values():
        buffer.copy_(torch.rand(buffer.shape) + 1)
    return model


def biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of the routers of a `biased` model."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}


def one_process() -> Parallel:
    return Parallel(0, 1, 0, torch.device("cpu"))


def rollouts(seed: int, lengths: Sequence[tuple[int, int]]) -> list[Rollout]:
    """Random responses; lengths: (prompt, response) of each rollout."""
    random = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (n,), generator=random).tolist())

    drawn = []
    for i, (prompt, response) in enumerate(lengths):
        cuts = torch.randint(0, response + 1, (len(STEPS) - 1,), generator=random).sort().values.tolist()
        drawn.append(
            Rollout(
                example_id=str(i),
                group=i // 2,
                prompt_ids=tokens(prompt),
                response_ids=tokens(response),
                sampling_logprobs=tuple((-torch.rand(response, generator=random)).tolist()),
                step_ends=(*cuts, response),
                answers=(None,) * len(STEPS),
                text="",
                finish="stop",
                policy_version=0,
            )
        )
    return drawn


def batches(seed: int, max_tokens: int | None = None, part: slice = slice(None), *, routed: bool = False) -> list[Batch]:
    """Micro-batches of `part` of eight random rollouts; weights and advantages do not depend on `part`.

    routed: with random experts for about half of the tokens of each layer and -1 for the others.
    """
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (8, 2), generator=random).tolist()
    advantages = torch.randn(8, len(STEPS), generator=random)
    weights = torch.rand(8, generator=random) / 8
    drawn = rollouts(seed, lengths)
    if routed:
        shape = (CONFIG.num_layers, CONFIG.num_experts)
        for i, rollout in enumerate(drawn):
            size = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
            table = torch.rand(size, *shape, generator=random).topk(CONFIG.experts_per_token).indices.to(torch.int16)
            table[torch.rand(size, CONFIG.num_layers, generator=random) < 0.5] = -1
            drawn[i] = replace(rollout, routed=table.numpy())
    return pack(drawn[part], advantages[part], weights[part], max_tokens)


class Recorder(torch.optim.SGD):
    """An optimizer that records gradients and changes no parameter."""

    def __init__(self, policy: Any) -> None:
        super().__init__(policy.parameters(), lr=0.0)
        self.policy = policy
        self.gradients: dict[str, torch.Tensor] = {}

    def step(self, closure: Any = None) -> None:
        self.gradients = {name: full(p.grad).clone() for name, p in self.policy.model.named_parameters()}


def full(tensor: Any) -> torch.Tensor:
    return cast(torch.Tensor, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


def gradients(
    parts: Sequence[Batch],
    parallel: Parallel,
    dump: Path,
    objective: Objective = ON_POLICY,
    dtype: str = "float32",
    tied: bool = False,
    **options: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """(unsharded gradients by parameter name, metrics) of one update; `options` go to `Policy`."""
    policy = parallel.shard(Policy(tiny(1, tied=tied), **options), dtype=dtype)
    reference = parallel.shard(Policy(tiny(2, tied=tied)), dtype=dtype)
    recorder = Recorder(policy)
    ready = with_logprobs(parts, policy, reference, objective, parallel)
    metrics = update(
        policy, recorder, ready, objective, parallel, step_names=STEPS, grad_clip=0.0, dump=dump, reference=reference
    )
    return recorder.gradients, metrics


def adam_update(policy: Policy, optimizer: torch.optim.Optimizer, seed: int, parallel: Parallel, dump: Path) -> None:
    """One real optimizer step on this rank's share of random data."""
    parts = batches(seed, 20, slice(parallel.rank, None, parallel.world_size))
    objective = changed(ON_POLICY, kl_coef=0.0)
    update(policy, optimizer, parts, objective, parallel, step_names=STEPS, grad_clip=1.0, dump=dump)


def train_state(policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """This rank's shard of every parameter and optimizer tensor."""
    state = {}
    for name, p in policy.named_parameters():
        state[name] = to_local(p.detach()).clone()
        state |= {f"{name}/{field}": to_local(value).clone() for field, value in optimizer.state.get(p, {}).items()}
    return state


def same_bits(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def large_gradient() -> torch.Tensor:
    """More elements than a sum in fp32 can add up to 1e-6."""
    return torch.randn(3 << 20, generator=torch.Generator().manual_seed(5))


def with_gradient(grad: torch.Tensor) -> torch.nn.Module:
    """A module with one parameter, whose gradient is `grad`."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros_like(grad))
    module.weight.grad = grad.clone()
    return module


def main(out: Path, parallel: Parallel) -> None:
    """The part for two ranks. Rank 0 writes the results that the tests read."""
    results: dict[str, Any] = {}
    share = large_gradient().tensor_split([1 << 20])[parallel.rank]
    results["large_norm"] = parallel.all_gather_object(clip_grad_norm(with_gradient(share), 0.0, parallel))
    saved = {}
    # Rank 0 has six sequences in several micro-batches, rank 1 two in one.
    uneven = slice(0, 6) if parallel.is_main else slice(6, 8)
    for name, part, max_tokens, objective, dtype in (
        ("even", slice(parallel.rank, None, 2), None, ON_POLICY, "float32"),
        ("uneven", uneven, 23, ON_POLICY, "float32"),
        ("several_updates", uneven, 23, replace(ON_POLICY, num_updates=2), "float32"),
        ("idle_rank", slice(0, 8) if parallel.is_main else slice(0, 0), 40, ON_POLICY, "float32"),
        ("bfloat16", uneven, 23, ON_POLICY, "bfloat16"),
    ):
        parts = batches(7, max_tokens, part)
        saved[name] = gradients(parts, parallel, out / "unused.pt", objective, dtype)
        results[f"{name}_micro_batches"] = parallel.all_gather_object(len(parts))
    for name, (objective, options) in HIDDEN.items():
        parts = batches(7, 23, uneven) if name != "idle_rank" else batches(7, 40, slice(0, 8 if parallel.is_main else 0))
        saved[f"hidden_{name}"] = gradients(parts, parallel, out / "unused.pt", objective, **options)
    parts = batches(7, 23, uneven, routed=True)
    saved["routing"] = gradients(parts, parallel, out / "unused.pt", replay_routing=True, activation_checkpointing=True)

    policy = parallel.shard(Policy(tiny(3)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for seed in range(2):
        adam_update(policy, optimizer, seed, parallel, out / "unused.pt")
    save_checkpoint(out / "checkpoints", 2, policy, optimizer, {"rank": parallel.rank}, parallel)
    other = parallel.shard(Policy(tiny(4)))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1.0)
    path = latest_checkpoint(out / "checkpoints")
    assert path is not None
    extra = load_checkpoint(path, other, other_optimizer, parallel)
    same = same_bits(train_state(policy, optimizer), train_state(other, other_optimizer))
    results["loaded_bits"] = parallel.all_gather_object(same)
    results["extra"] = parallel.all_gather_object(extra)
    adam_update(policy, optimizer, 2, parallel, out / "unused.pt")
    adam_update(other, other_optimizer, 2, parallel, out / "unused.pt")
    same = same_bits(train_state(policy, optimizer), train_state(other, other_optimizer))
    results["continued_bits"] = parallel.all_gather_object(same)
    save_policy(policy, tokenizer(), out / "hf")
    parameters = {name: tensor.clone() for name, tensor in iter_full_params(policy)}

    broken = batches(7, 23, uneven)
    if not parallel.is_main:  # a failure of one rank must stop all ranks
        broken = [b.with_(weights=b.weights * float("nan")) for b in broken]
    try:
        gradients(broken, parallel, out / "dump.pt")
        stopped = False
    except NonFiniteError:
        stopped = True
    results["stopped"] = parallel.all_gather_object(stopped)
    if parallel.is_main:
        torch.save({"updates": saved, "parameters": parameters}, out / "tensors.pt")
        (out / "results.json").write_text(json.dumps(results))
