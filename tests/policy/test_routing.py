"""Routing replay: tokens are routed to the given experts, with gate weights and gradients of the model's own routers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import policy_lab as lab
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from srpo.core.batch import Batch, Rollout, pack
from srpo.policy.model import Policy
from srpo.policy.routing import UNKNOWN, Routers, Routing
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.training.update import Objective, update

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def near_ties(apart: float = 3e-7, **sizes: int) -> Any:
    """A model whose routers have almost equal rows (`apart`), so that rounding decides which experts are chosen."""
    model = lab.tiny(1, replace(lab.CONFIG, **sizes))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate.copy_(gate[:1] + apart * torch.randn(gate.shape, generator=random))
    return model


def sampled(model: Any, seed: int, routing: bool = True) -> list[Rollout]:
    """Rollouts sampled by the local engine, with the experts that it routed each token to."""
    prompts = [r.prompt_ids for r in lab.rollouts(seed, [(n, 1) for n in (3, 9, 5)])]
    params = SamplingParams(20, 0.9, 10, group_size=4, stop_ids=(4, 7), routing=routing)
    engine = LocalEngine(model)
    rollouts = []
    for i, sample in enumerate(engine.generate(prompts, params, seed)):
        length = len(sample.response_ids)
        fields = (sample.sampling_logprobs, (0, length, length), (None,) * 3, "", sample.finish, 0)
        rollouts.append(Rollout(str(i), i // 4, prompts[sample.prompt_index], sample.response_ids, *fields, routed=sample.routed))
    return rollouts


def packed(rollouts: list[Rollout], max_tokens: int | None) -> list[Batch]:
    n = len(rollouts)
    return pack(rollouts, torch.ones(n, len(lab.STEPS)), torch.full((n,), 1 / n), max_tokens)


def metrics_of(policy: Policy, parts: list[Batch], dump: Path, objective: Objective) -> dict[str, float]:
    return update(
        policy, lab.Recorder(policy), parts, objective, lab.one_process(), step_names=lab.STEPS, grad_clip=0.0, dump=dump
    )


@pytest.mark.parametrize("perturbed", ["float64", "packing"])
def test_a_flip_of_near_ties_is_undone(tmp_path: Path, perturbed: str) -> None:
    """The trainer computes in fp64, or packs sequences in fp32 that the engine computed side by side."""
    model = near_ties()
    rollouts = sampled(model, seed=3)
    objective = lab.changed(lab.ON_POLICY, kl_coef=0.0)
    parts = packed(rollouts, 40)
    if perturbed == "float64":
        model = model.double()
    own = metrics_of(Policy(model), parts, tmp_path / "dump.pt", objective)
    replayed = metrics_of(Policy(model, replay_routing=True), parts, tmp_path / "dump.pt", objective)
    assert own["rollout/mismatch_max"] > 1e-2 and "rollout/routing_flip_frac" not in own
    assert replayed["rollout/mismatch_max"] < 2e-5
    assert 0.001 < replayed["rollout/routing_flip_frac"] < 0.999


def test_old_logprobs_are_replayed_too(tmp_path: Path) -> None:
    """With two updates the mismatch is that of `old_logprobs`, which `with_logprobs` computes."""
    model = near_ties()
    parts = packed(sampled(model, seed=4), None)
    objective = lab.changed(lab.ON_POLICY, kl_coef=0.0, num_updates=2)
    policy = Policy(model.double(), replay_routing=True)
    ready = lab.with_logprobs(parts, policy, None, objective, lab.one_process())
    metrics = metrics_of(policy, ready, tmp_path / "dump.pt", objective)
    assert metrics["rollout/mismatch_max"] < 2e-5 and metrics["rollout/routing_flip_frac"] > 0
    forgotten = [batch.with_(routed_experts=None) for batch in parts]
    ready = lab.with_logprobs(forgotten, policy, None, objective, lab.one_process())
    assert metrics_of(policy, ready, tmp_path / "dump.pt", objective)["rollout/mismatch_max"] > 1e-2


def test_without_experts_given_the_bits_are_those_of_a_plain_policy() -> None:
    (batch,) = lab.batches(3)
    plain, policy = Policy(lab.tiny(1)), Policy(lab.tiny(1), replay_routing=True)
    want = plain(batch)
    assert torch.equal(policy(batch), want) and policy.take_flips().tolist() == [0, 0]
    assert torch.equal(plain(lab.batches(3, routed=True)[0]), want)  # "recompute" reads none
    routing = Routing(keep_own=True)
    policy.model.base_model(batch.input_ids[None], routing=routing, **attention(batch))
    own = batch.with_(routed_experts=routing.table(2))
    assert torch.equal(policy(own), want) and policy.take_flips().tolist() == [0, 2 * len(batch.labels)]


def attention(batch: Batch) -> dict[str, Any]:
    return {
        "position_ids": batch.position_ids[None],
        "cu_seq_lens_q": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "use_cache": False,
    }


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_the_router_s_gradient_is_that_of_the_formula(norm_topk_prob: bool) -> None:
    """Weights w of experts S: p_i / sum_S p or p_i, with p = softmax(W x) and u = dL/dw. Also checks that a token gets its given
    experts, and that the router keeps its own choice for a row with -1."""
    model = lab.tiny(1).double()
    policy = Policy(model, replay_routing=True)
    (batch,) = lab.batches(5, routed=True)
    table = batch.routed_experts
    assert table is not None
    seen: dict[int, Any] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            out[1].retain_grad()
            seen[layer] = args[0], out[0], out[1], out[2]

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.mlp.gate.norm_topk_prob = norm_topk_prob
        layer.mlp.gate.register_forward_hook(keep(i))
    policy(batch).square().sum().backward()
    num_flips = 0
    for i, (x, logits, weights, ids) in seen.items():
        given, own = table[:, i].long(), logits.topk(2).indices
        known = (given >= 0).all(-1)
        assert 0 < known.sum() < len(known)
        assert ids[known].equal(given[known]) and ids[~known].equal(own[~known])
        num_flips += int((given.sort().values != own.sort().values).any(-1)[known].sum())
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
        p, u = logits.softmax(-1), torch.zeros_like(logits).scatter(1, ids, weights.grad)
        share = (p * chosen) / (p * chosen).sum(-1, keepdim=True) if norm_topk_prob else p * chosen
        assert torch.allclose(weights, share.gather(1, ids), rtol=1e-5)
        wide = share if norm_topk_prob else p  # the softmax whose entries the weights are
        dlogits = share * u - wide * (share * u).sum(-1, keepdim=True)
        want = dlogits.T @ x
        gate = model.model.layers[i].mlp.gate.weight
        assert (gate.grad - want).norm() < 1e-5 * want.norm()
    num_given = int((table >= 0).all(-1).sum())
    assert num_flips > 0 and policy.take_flips().tolist() == [num_flips, num_given]


def test_layers_that_are_computed_again_are_told_the_same(tmp_path: Path) -> None:
    parts, one = lab.batches(7, 23, routed=True), lab.one_process()
    want, metrics = lab.gradients(parts, one, tmp_path / "dump.pt", replay_routing=True)
    got, again = lab.gradients(parts, one, tmp_path / "dump.pt", replay_routing=True, activation_checkpointing=True)
    own, _ = lab.gradients(parts, one, tmp_path / "dump.pt")
    assert again == metrics and lab.same_bits(got, want)
    assert any((own[name] - grad).norm() > 1e-2 * grad.norm() for name, grad in want.items())


def test_two_ranks_replay_as_one(two_ranks: Path, tmp_path: Path) -> None:
    """Sharded (FSDP2), with activation checkpointing, one rank with fewer micro-batches than the other."""
    want, metrics = lab.gradients(
        lab.batches(7, routed=True), lab.one_process(), tmp_path / "dump.pt", replay_routing=True, activation_checkpointing=True
    )
    got, sharded = torch.load(two_ranks / "tensors.pt")["updates"]["routing"]
    assert sharded == pytest.approx(metrics, rel=1e-5, abs=1e-7) and 0 < metrics["rollout/routing_flip_frac"] < 1
    assert all((got[name] - grad).norm() < 1e-5 * grad.norm() for name, grad in want.items())


def test_packed_experts_lie_beside_their_tokens() -> None:
    rollouts = lab.rollouts(3, [(3, 5), (2, 7), (4, 1)])
    tables = [np.full((len(r.prompt_ids) + len(r.response_ids) - 1, 2, 3), i, np.int16) for i, r in enumerate(rollouts)]
    rollouts = [replace(r, routed=table) if i != 1 else r for i, (r, table) in enumerate(zip(rollouts, tables, strict=True))]
    (batch,) = packed(rollouts, None)
    assert batch.routed_experts is not None and batch.routed_experts.dtype == torch.int16
    rows = torch.tensor([0] * 7 + [UNKNOWN] * 8 + [2] * 4, dtype=torch.int16)  # the second rollout has no experts
    assert batch.routed_experts.equal(rows[:, None, None].expand(-1, 2, 3))
    assert batch.rows()[1].routed_experts.equal(batch.routed_experts[batch.labels >= 0])  # pyright: ignore
    assert packed(lab.rollouts(3, [(3, 5)]), None)[0].routed_experts is None


# ---- models --------------------------------------------------------------------------------------------------------------------


def deepseek() -> Any:
    """Sigmoid scores, groups of experts, a first layer without experts."""
    more: dict[str, Any] = {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 8,
    }
    lora: dict[str, Any] = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(SIZES | more | lora)))


MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=5)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=5, sliding_window=64)),
    "deepseek_v3": deepseek,
}


@pytest.mark.parametrize("name", MODELS)
def test_other_routers(name: str) -> None:
    """Replaying a router's own choice changes nothing; other given experts are used, with weights from the router's scores."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = torch.randint(0, 50, (1, 9))
    gates = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        routers = Routers(model)
        assert torch.equal(model(ids, use_cache=False).logits, want)
        routers.open()
        noted = Routing(keep_own=True)
        assert torch.equal(model(ids, use_cache=False, routing=noted).logits, want)
        table = noted.table(2)
        assert list(noted.own) == [1] if name == "deepseek_v3" else [0, 1]
        assert (table[:, 0] == UNKNOWN).all() == (name == "deepseek_v3") and (table[:, 1] >= 0).all()
        assert torch.equal(model(ids, use_cache=False, routing=routers.replay(table)).logits, want)
        other = routers.replay((table + 1) % 5)
        taken: list[Any] = []
        gates[-1].register_forward_hook(lambda module, args, out: taken.append(out))
        assert not torch.allclose(model(ids, use_cache=False, routing=other).logits, want)
        assert any(torch.equal(x, (table[:, 1].long() + 1) % 5) for x in taken[0])
        assert other.flips is not None and other.flips[0] > 0


def test_a_copy_of_a_policy_that_replays_has_routers_of_its_own() -> None:
    """The local engine copies its model and samples from the last weights synced to it."""
    policy, other = Policy(lab.tiny(1), replay_routing=True), lab.tiny(2)
    engine = LocalEngine(policy)
    engine.sync_weights(other, 1)
    params = SamplingParams(6, 0.9, 10, group_size=3, routing=True)
    want = LocalEngine(other).generate([(3, 4, 5)], params, seed=0)
    for a, b in zip(engine.generate([(3, 4, 5)], params, seed=0), want, strict=True):
        assert a == b and np.array_equal(a.routed, b.routed)  # pyright: ignore[reportArgumentType]
    assert policy.take_flips().tolist() == [0, 0]


def test_what_cannot_be_replayed_is_refused() -> None:
    dense = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SIZES.items() if k != "num_experts_per_tok"}))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no experts to route to: set rollout.routing"):
        Policy(dense, replay_routing=True)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no experts to route to"):
        LocalEngine(dense).stream([(1, 2)], SamplingParams(4, routing=True), seed=0)
    mixer = PhimoeForCausalLM(PhimoeConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, num_local_experts=4))
    with pytest.raises(ValueError, match=r"PhimoeTopKRouter does not choose its experts by one top-k"):
        Policy(mixer, replay_routing=True)
    (batch,) = lab.batches(3)
    policy = Policy(lab.tiny(1), replay_routing=True)
    with pytest.raises(ValueError, match=r"reports experts \[layers, experts per token\] of \[3, 2\], the policy has \[2, 2\]"):
        policy(batch.with_(routed_experts=torch.zeros(len(batch.labels), 3, 2, dtype=torch.int16)))
