"""Model families: right or refused. The whole list is scanned nightly, a sample always."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import policy_lab as lab
import pytest
import scan_models
import torch
import transformers
from transformers import (
    CohereConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    SeedOssConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from srpo.core.batch import pack
from srpo.core.errors import UserError
from srpo.policy import probe
from srpo.policy.critic import Critic
from srpo.policy.forward import context_of, hidden_states
from srpo.policy.model import Policy, load_policy
from srpo.policy.scalar import ScalarModel
from srpo.rollout.engine import SamplingParams
from srpo.rollout.local import LocalEngine

RIGHT = ("llama", "qwen3_moe", "gpt2", "opt", "seed_oss", "phimoe", "mistral", "deepseek_v3")
REFUSED = {
    "qwen3_next": "state beside its attention",
    "lfm2": "state beside its attention",
    "minimax": "state beside its attention",
    "openai-gpt": "differs from the same sequence alone",
    "granite_swa": "attention sinks",
    "bloom": "max_position_embeddings",
    "codegen": "transformers' own eager forward",
    "gemma2": "final_logit_softcapping",
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_family_is_right_in_trainer_and_engine(name: str) -> None:
    assert scan_models.scan(name) == scan_models.Finding("right", "right")


@pytest.mark.parametrize("num_shared", [1, 10, 20])
def test_layers_that_use_the_keys_of_earlier_ones_are_in_the_copy(num_shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scan_models.GIVEN, "gemma4_text", {"num_kv_shared_layers": num_shared})
    assert scan_models.scan("gemma4_text") == scan_models.Finding("right", "right")


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_by_its_reason(name: str) -> None:
    found = scan_models.scan(name)
    assert found.policy == "refused" and REFUSED[name] in found.why


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_family_is_right_or_refused(name: str) -> None:
    found = scan_models.scan(name)
    assert not found.is_fault, found
    assert found.policy != "refused" or found.why


def test_the_page_has_every_type() -> None:
    page = scan_models.PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}, " not in page:
        pytest.skip(f"the page lists the types of another transformers than {transformers.__version__}")
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert listed == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


SIZES: dict[str, Any] = {
    "vocab_size": lab.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("config", [CohereConfig(**SIZES, logit_scale=0.25), GraniteConfig(**SIZES, logits_scaling=8.0)])
def test_scaled_logits_are_those_of_transformers(config: Any, tmp_path: Path) -> None:
    made = scan_models._make(config)
    assert made is not None
    made.save_pretrained(tmp_path)
    assert scan_models._compare(made, tmp_path) == scan_models.Finding("right", "right")


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=lab.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("of", [Policy, Critic, ScalarModel])
def test_no_forward_is_random(of: Any, again: bool) -> None:
    """GPT-2's default config drops a tenth of embeddings, attention and residuals; OPT also in its layers themselves."""
    from transformers import OPTConfig, OPTForCausalLM

    opt = OPTConfig(vocab_size=lab.VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, layerdrop=0.3)
    for model in (gpt2(), OPTForCausalLM(opt)):
        model.set_attn_implementation("srpo_varlen")
        wrapped = of(model, activation_checkpointing=again)
        head = dict(wrapped.model.named_modules()).get("value_head") or getattr(wrapped.model, "scalar_head", None)
        if isinstance(head, torch.nn.Linear):
            torch.nn.init.ones_(head.weight)
        (batch,) = lab.batches(0)
        outputs = [wrapped(batch) for _ in range(2)]
        assert torch.equal(*outputs)
        outputs[0].square().sum().backward()  # recomputes, if `again`


@pytest.mark.parametrize("again", [False, True])
def test_activation_checkpointing_recomputes_what_it_did(again: bool) -> None:
    calls = []
    policy = Policy(lab.tiny(), activation_checkpointing=again)
    policy.model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    (batch,) = lab.batches(0)
    policy(batch).sum().backward()
    assert len(calls) == 1 + again


def longrope() -> Any:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 8.0, 32.0],
        "original_max_position_embeddings": 16,
        "factor": 8.0,
    }
    config = Phi3Config(**SIZES, rope_parameters=rope, original_max_position_embeddings=16)
    return Phi3ForCausalLM(config)


def test_long_rope_ends_where_its_positions_depend_on_the_neighbour(tmp_path: Path) -> None:
    longrope().save_pretrained(tmp_path)
    model = load_policy(tmp_path)
    assert Policy(model).max_context == LocalEngine(model).max_context == context_of(model.config) == 16
    short, long = lab.rollouts(0, [(4, 5), (9, 9)])
    zeros, weights = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(UserError, match="17 tokens, more than the context of 16"):
        hidden_states(model, pack([short, long], zeros, weights)[0])
    with pytest.raises(UserError, match="context of 16"):
        LocalEngine(model).generate([(3,) * 10], SamplingParams(7), seed=0)


def test_a_refusal_names_folder_type_and_remedy(tmp_path: Path) -> None:
    from transformers import BloomConfig

    BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'bloom' are not supported: .* Give a model of another type") as refused:
        load_policy(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_a_wrong_forward_is_found_whatever_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's four comparisons, each with srpo's own functions made wrong in one way."""
    config = lab.tiny().config
    real = probe.hidden_states

    def verdict(wrong: Any, engine: bool = False) -> str:
        monkeypatch.setattr(probe, "_verdicts", {})
        monkeypatch.setattr(probe, "hidden_states", wrong)
        with pytest.raises(UserError) as refused:
            probe.check_family(config, engine=engine)
        return str(refused.value)

    assert "random" in verdict(lambda model, batch: real(model, batch) + 1e-3 * torch.randn(1))
    assert "transformers' own eager forward" in verdict(lambda model, batch: real(model, batch) * 1.001)
    assert "packed beside another" in verdict(lambda model, batch: real(model, batch) * (1 + 1e-3 * (batch.num_sequences > 1)))
    assert "the prefill differs" in verdict(lambda model, batch: real(model, batch) * 1.001, engine=True)


def test_the_probe_is_cheap_and_asked_once_per_config() -> None:
    config = lab.tiny().config
    probe.check_family(config)
    start = time.perf_counter()
    for _ in range(20):
        probe.check_family(config)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    "config",
    [
        SeedOssConfig(residual_dropout=0.1),
        PhimoeConfig(router_jitter_noise=0.01, input_jitter_noise=0.01),
    ],
)
def test_a_model_of_full_size_is_probed_on_a_small_copy(config: Any) -> None:
    """Both have billions of parameters."""
    before = torch.get_rng_state()
    start = time.perf_counter()
    probe.check_family(config)
    assert time.perf_counter() - start < 10
    assert torch.equal(torch.get_rng_state(), before)
