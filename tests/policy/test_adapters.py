"""Adapters (`policy.lora`): gradients, the reference without a second model, checkpoints, peft's format, refusals."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapter_lab
import policy_lab as lab
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from srpo.core.config.train import OptimizerConfig
from srpo.core.errors import UserError
from srpo.policy.adapters import CONFIG, WEIGHTS, add_adapter, iter_merged_params, save_adapter
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.loading import load_to_shard
from srpo.policy.model import Policy, Start, load_policy, save_policy
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.training.optim import make_optimizer

MODELS = {"experts": adapter_lab.experts, "dense": adapter_lab.dense}


def relative_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)


def draw() -> int:
    return random.randrange(1 << 20)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_policy(Policy(lab.tiny(1)), lab.tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def exported(base: Path, folder: Path) -> Path:
    """The folder of a trained adapter of this base."""
    policy = Policy(adapter_lab.adapted(load_policy(base), adapter_lab.settings(base), seed=draw()))
    save_policy(policy, lab.tokenizer(), folder / "policy")
    return folder / "adapter"


def damaged(adapter: Path, folder: Path, config: dict[str, Any], change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """A copy of the adapter with other fields of its config and other tensors, not vouched for by COMPLETE."""
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("COMPLETE"))
    fields = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(fields))
    if change is not None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
    return folder


# ---- gradients -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_the_factors_are_those_of_the_merged_weights(kind: str) -> None:
    """Autograd through W + 2 B A in the model without adapter; the sum is written out here for each expert."""
    seed = draw()
    policy, plain = Policy(adapter_lab.adapted(MODELS[kind](seed))), Policy(MODELS[kind](seed))
    batch = lab.batches(seed)[0]
    direction = torch.randn_like(policy(batch))
    (policy(batch) * direction).sum().backward()
    factors = {name: p.detach().clone().requires_grad_() for name, p in adapter_lab.trained(policy).items()}
    weights = {name: p.detach() for name, p in plain.named_parameters()}
    merged = dict(weights)
    for name, b in factors.items():
        if ".lora_B." not in name:
            continue
        a, module = factors[name.replace("lora_B", "lora_A")], name.partition(".lora_B.")[0]
        if module.endswith("experts.base_layer"):  # peft wraps one parameter after the other
            module = module.removesuffix(".base_layer") + ".gate_up_proj"
        elif module.endswith("experts"):
            module += ".down_proj"
        else:
            module += ".weight"
        w = weights[module]
        if w.ndim == 2:
            merged[module] = w + 2 * b @ a
        else:  # A: one expert after the other; B: the experts of rank 1, then those of rank 2
            merged[module] = torch.stack(
                [w[e] + 2 * b[:, e :: len(w)] @ a[e * adapter_lab.RANK : (e + 1) * adapter_lab.RANK] for e in range(len(w))]
            )
    (functional_call(plain, merged, (batch,)) * direction).sum().backward()
    got = {name: p.grad for name, p in adapter_lab.trained(policy).items() if p.grad is not None}
    want = {name: p.grad for name, p in factors.items() if p.grad is not None}
    assert len(got) == len(factors) and relative_error(got, want) < 1e-5
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", adapter_lab.CASES)
def test_the_reference_is_the_model_without_its_adapter(name: str, tmp_path: Path) -> None:
    """The same update with a second model in memory; also inside the policy's forward, and where micro-batches are packed."""
    objective, options = adapter_lab.CASES[name]
    one, seed = lab.one_process(), draw()
    results = [
        adapter_lab.gradients(lab.batches(seed, 23), one, tmp_path / "unused.pt", objective, reference, **options)
        for reference in (None, Policy(adapter_lab.experts(1)))
    ]
    assert results[0][1] == results[1][1] and results[0][1]["policy/kl"] > 0.01
    assert lab.same_bits(results[0][0], results[1][0])
    packed = adapter_lab.gradients(lab.batches(seed), one, tmp_path / "unused.pt", objective, **options)
    assert relative_error(results[0][0], packed[0]) < 1e-5 and len(lab.batches(seed, 23)) > 1


@pytest.mark.parametrize("name", adapter_lab.CASES)
def test_two_ranks_are_one(name: str, ranks: Path, tmp_path: Path) -> None:
    objective, options = adapter_lab.CASES[name]
    gradients, metrics = torch.load(ranks / "adapter_lab" / "tensors.pt")[name]
    alone = adapter_lab.gradients(lab.batches(7), lab.one_process(), tmp_path / "unused.pt", objective, **options)
    assert relative_error(gradients, alone[0]) < 1e-5
    assert metrics == pytest.approx(alone[1], rel=1e-5, abs=1e-7)


def test_two_ranks_resume_and_write_one_adapter(ranks: Path) -> None:
    folder = ranks / "adapter_lab"
    results = torch.load(folder / "tensors.pt")
    assert results["continued_bits"] == [True, True] and results["started_bits"] == [[True, True]] * 2
    cfg = adapter_lab.settings(folder / "no base on this disk", rank=0, start=str(folder / "adapter"))
    model = add_adapter(adapter_lab.experts(1), cfg, 0)
    assert lab.same_bits({name: t.clone() for name, t in iter_merged_params(model)}, results["merged"])


def test_replayed_routing_is_not_that_of_the_reference(tmp_path: Path) -> None:
    seed = draw()
    policy = Policy(adapter_lab.adapted(lab.tiny(1)), replay_routing=True)
    (batch,) = lab.batches(seed, routed=True)
    reference = Start(policy)(batch)
    assert torch.equal(reference, Policy(lab.tiny(1))(batch))
    assert not policy.take_flips().any()
    policy(batch)
    assert policy.take_flips()[1] > 0


# ---- state on the disk ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    seed, one = draw(), lab.one_process()
    policy = Policy(adapter_lab.adapted(lab.tiny(seed), moved=False, seed=1))
    optimizer = torch.optim.AdamW(adapter_lab.trained(policy).values(), lr=1e-2)
    frozen = {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}
    for i in range(2):
        lab.adam_update(policy, optimizer, i, one, tmp_path / "unused.pt")
    path = save_checkpoint(tmp_path / "checkpoints", 2, policy, optimizer, {}, one)
    other = Policy(adapter_lab.adapted(lab.tiny(seed), moved=False, seed=2))
    other_optimizer = torch.optim.AdamW(adapter_lab.trained(other).values(), lr=1.0)
    load_checkpoint(path, other, other_optimizer, one)
    for each, its in ((policy, optimizer), (other, other_optimizer)):
        lab.adam_update(each, its, 2, one, tmp_path / "unused.pt")
    assert lab.same_bits(lab.train_state(policy, optimizer), lab.train_state(other, other_optimizer))
    assert lab.same_bits(frozen, {name: p.detach() for name, p in policy.named_parameters() if not p.requires_grad})
    with pytest.raises(UserError, match=r"is a checkpoint of another model: .* is absent there and"):
        load_checkpoint(path, Policy(lab.tiny(seed)), torch.optim.AdamW(policy.parameters()), one)


def test_an_adapter_needs_a_fraction_of_the_bytes(tmp_path: Path) -> None:
    """At a width of 512; the full run's bytes are counted, weights and two moments in fp32."""
    one = lab.one_process()
    policy = Policy(adapter_lab.adapted(adapter_lab.dense(0, 512, 2), adapter_lab.settings(rank=4), moved=False))
    full = sum(p.nbytes for p in Policy(adapter_lab.dense(0, 512, 2)).parameters())
    optimizer = make_optimizer(policy.parameters(), OptimizerConfig())
    policy(lab.batches(0)[0]).square().sum().backward()
    gradients = sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    optimizer.step()
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert 0 < gradients + moments < 0.05 * 3 * full
    path = save_checkpoint(tmp_path, 1, policy, optimizer, {}, one)
    assert sum(file.stat().st_size for file in path.iterdir()) < 0.02 * 3 * full


@pytest.mark.parametrize("kind", MODELS)
def test_the_exported_adapter_is_pefts_and_the_policy_has_it_merged(kind: str, tmp_path: Path) -> None:
    seed = draw()
    save_policy(Policy(MODELS[kind](seed)), lab.tokenizer(), tmp_path / "base")
    policy = Policy(adapter_lab.adapted(load_policy(tmp_path / "base"), adapter_lab.settings(tmp_path / "base"), seed=seed))
    save_policy(policy, lab.tokenizer(), tmp_path / "run" / "policy")
    ids = torch.randint(3, lab.VOCAB, (2, 20))
    base, merged = (
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", experts_implementation="eager").double()
        for path in (tmp_path / "base", tmp_path / "run" / "policy")
    )
    with torch.no_grad():
        alone = base(ids).logits
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).double()(ids).logits
        assert (alone - theirs).abs().max() > 0.1
        assert float((merged(ids).logits - theirs).abs().max() / theirs.abs().max()) < 1e-6
        (batch,) = lab.batches(seed)
        torch.testing.assert_close(Policy(load_policy(tmp_path / "run" / "policy"))(batch), policy(batch), atol=1e-4, rtol=0)


def test_a_run_goes_on_from_an_adapter_which_is_also_its_reference(base: Path, tmp_path: Path) -> None:
    """The new adapter is relative to the same base: nothing of the first is merged into it."""
    start = exported(base, tmp_path / "first")
    (batch,) = lab.batches(draw())
    policy = Policy(add_adapter(load_policy(base), adapter_lab.settings(base, rank=0, start=str(start)), 0))
    want = Policy(load_policy(tmp_path / "first" / "policy"))(batch)
    before = policy(batch)
    torch.testing.assert_close(before, want, atol=1e-4, rtol=0)
    optimizer = torch.optim.AdamW(adapter_lab.trained(policy).values(), lr=1e-2)
    lab.adam_update(policy, optimizer, 0, lab.one_process(), tmp_path / "unused.pt")
    assert torch.equal(Start(policy)(batch), before) and not torch.equal(policy(batch), before)
    save_adapter(policy, tmp_path / "second")
    again = Policy(add_adapter(load_policy(base), adapter_lab.settings(base, rank=0, start=str(tmp_path / "second")), 0))
    assert torch.equal(again(batch), policy(batch))


# ---- engine --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_engine_samples_with_the_adapter(kind: str) -> None:
    seed = draw()
    engine = LocalEngine(MODELS[kind](seed))
    policy = Policy(adapter_lab.adapted(MODELS[kind](seed), seed=seed))
    engine.sync_weights(policy, 1)
    params = SamplingParams(max_new_tokens=6, group_size=2, temperature=1.0, top_k=0)
    for sample in engine.generate([(3, 4, 5), (6, 7)], params, seed):
        prompt = ((3, 4, 5), (6, 7))[sample.prompt_index]
        rollout = replace(lab.rollouts(0, [(1, 1)])[0], prompt_ids=prompt, response_ids=sample.response_ids)
        rollout = replace(rollout, sampling_logprobs=sample.sampling_logprobs, step_ends=(0, 0, len(sample.response_ids)))
        (batch,) = lab.pack([rollout], torch.zeros(1, 3), torch.ones(1))
        logprobs = policy(batch).log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.sampling_logprobs), logprobs.detach(), atol=1e-5, rtol=0)
    with pytest.raises(AssertionError, match="an engine has merged weights"):
        LocalEngine(policy)


# ---- targets and refusals ------------------------------------------------------------------------------------------------------


def test_targets_are_all_layers_or_those_that_are_named() -> None:
    def layers(model: Any, *targets: str) -> set[str]:
        adapter_lab.adapted(model, adapter_lab.settings(targets=targets))
        changed = {name for name, p in iter_merged_params(model) if not torch.equal(p, dict(twin.named_parameters())[name])}
        return {name.partition("layers.")[2].removesuffix(".weight") for name in changed}

    twin = adapter_lab.dense(0)
    attention = {f"{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"}
    assert layers(adapter_lab.dense(0)) == attention | {
        f"{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")
    }
    assert layers(adapter_lab.dense(0), "q_proj", "1.mlp.up_proj") == {
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.mlp.up_proj",
    }
    twin = lab.tiny(0)
    assert layers(lab.tiny(0)) == attention | {f"{i}.mlp.experts.{name}_proj" for i in range(2) for name in ("gate_up", "down")}
    assert layers(lab.tiny(0), "experts.down_proj") == {f"{i}.mlp.experts.down_proj" for i in range(2)}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ("q_proj", "no_proj")}, "policy.lora.targets names 'no_proj'.*name some of down_proj, gate_up_proj, k_proj"),
        ({"targets": ("lm_head",)}, "policy.lora.targets names 'lm_head', which the model does not have"),
        ({"rank": 0, "alpha": 2.0}, "policy.lora.rank is 0, so no adapter trains"),
        ({"start": "nowhere"}, "no adapter_config.json in 'nowhere': policy.lora.start must be the folder of an adapter"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_adapter(lab.tiny(0), adapter_lab.settings(**lora), 0)


def test_an_adapter_that_does_not_fit_is_one_line(base: Path, tmp_path: Path) -> None:
    start = exported(base, tmp_path / "run")
    key = next(iter(load_file(start / WEIGHTS)))
    other = tmp_path / "other"
    save_policy(Policy(lab.tiny(0, replace(lab.CONFIG, hidden_size=40))), lab.tokenizer(), other)
    cases: list[tuple[Path, dict[str, Any], Callable[[dict[str, Any]], Any] | None, dict[str, Any], str]] = [
        (base, {"peft_type": "IA3"}, None, {}, "is of peft_type 'IA3', and srpo trains LORA"),
        (base, {"use_dora": True}, None, {}, "sets use_dora to True, which srpo does not support"),
        (base, {"init_lora_weights": "pissa"}, None, {}, "sets init_lora_weights to 'pissa', which srpo does not support"),
        (base, {}, None, {"rank": 5}, "policy.lora.rank is 5 and that of .* is 3: leave it at 0"),
        (base, {}, None, {"targets": ("q_proj",)}, "policy.lora.targets is set, and .* has its own: leave targets empty"),
        (base, {"target_modules": ["c_attn"], "target_parameters": []}, None, {}, "does not fit .*c_attn"),
        (base, {"target_modules": ["q_proj"]}, None, {}, "does not fit the model: .* is .* there and absent in the model"),
        (base, {}, lambda tensors: tensors.pop(key), {}, "does not fit the model: .* is absent there and"),
        (base, {}, lambda tensors: tensors[key].fill_(float("nan")), {}, "is not all finite: give an earlier adapter"),
        (other, {}, None, {}, "is an adapter of .*, whose hidden_size is 32, and that of .*other is 40: set policy.path to the"),
        (other, {"base_model_name_or_path": "elsewhere"}, None, {}, r"does not fit the model: .*\(3, 32\) there and \(3, 40\)"),
    ]
    for number, (path, config, change, lora, message) in enumerate(cases):
        folder = damaged(start, tmp_path / str(number), config, change)
        cfg = adapter_lab.settings(path, **{"rank": 0, "start": str(folder), **lora})
        with pytest.raises(UserError, match=message) as caught:
            add_adapter(load_policy(path), cfg, 0)
        assert "\n" not in str(caught.value)
    cut = adapter_lab.settings(base, rank=0, start=str(damaged(start, tmp_path / "cut", {})))
    (tmp_path / "cut" / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"cannot be loaded .*: restore it"):
        add_adapter(load_policy(base), cut, 0)


def test_an_adapter_is_no_model(base: Path, tmp_path: Path) -> None:
    start = exported(base, tmp_path / "run")
    with pytest.raises(UserError, match=r"holds an adapter and no model: give its base as policy\.path and this folder as"):
        load_to_shard(start, lab.one_process())
