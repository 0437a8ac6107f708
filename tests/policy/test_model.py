from __future__ import annotations

from pathlib import Path

import policy_lab as lab
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from srpo.core.batch import pack
from srpo.core.config.demo import TinyConfig
from srpo.policy.attention import PadLayout
from srpo.policy.forward import hidden_states
from srpo.policy.model import Policy, load_policy, make_tiny, save_policy
from srpo.policy.parallel import iter_full_params


def test_default_size_is_two_to_four_million() -> None:
    model = make_tiny(lab.tokenizer(2048), TinyConfig(), 0)
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.config.norm_topk_prob and model.config.eos_token_id == 2


def test_seed_decides_the_parameters_and_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    one, same, other = lab.tiny(1).state_dict(), lab.tiny(1).state_dict(), lab.tiny(2).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert lab.same_bits(one, same)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("seed", range(3))
def test_packed_equals_each_sequence_alone_and_transformers_own_forward(seed: int) -> None:
    model = lab.tiny(seed)
    (batch,) = lab.batches(seed)
    packed = model.lm_head(hidden_states(model, batch))
    plain = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa", experts_implementation="eager")
    plain.load_state_dict(model.state_dict())
    plain.eval()
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        alone = plain(input_ids=batch.input_ids[None, start:end]).logits[0]
        assert torch.allclose(packed[start:end], alone, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_sequences_are_laid_out_once_for_all_layers(monkeypatch: pytest.MonkeyPatch, checkpointed: bool) -> None:
    laid_out = []
    of = PadLayout.of
    monkeypatch.setattr(PadLayout, "of", lambda *bounds: laid_out.append(bounds) or of(*bounds))
    policy = Policy(lab.tiny(), activation_checkpointing=checkpointed).train()
    policy(lab.batches(0)[0]).sum().backward()
    assert len(laid_out) == 1 < policy.model.config.num_hidden_layers


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    model = lab.tiny()
    first, *others = lab.rollouts(0, [(4, 5), (3, 9), (6, 2)])
    zeros, weights = torch.zeros(2, 3), torch.ones(2)
    a, b = (hidden_states(model, pack([first, other], zeros, weights)[0])[:8] for other in others)
    assert torch.allclose(a, b, atol=1e-6)


def test_policy_gives_logits_of_labelled_rows_only() -> None:
    policy = Policy(lab.tiny())
    (batch,) = lab.batches(1)
    index, rows = batch.rows()
    logits, hidden = policy(batch), policy(batch, through=lambda hidden, weight: hidden)
    assert logits.shape == (len(rows.labels), lab.VOCAB)
    assert torch.equal(logits, policy.model.lm_head(hidden))
    assert torch.allclose(logits, policy.model.lm_head(hidden_states(policy.model, batch))[index], atol=1e-6)


def test_activation_checkpointing_changes_no_gradient() -> None:
    (batch,) = lab.batches(2)
    grads = []
    for again in (False, True):
        policy = Policy(lab.tiny(), activation_checkpointing=again)
        policy(batch).square().sum().backward()
        grads.append({name: p.grad for name, p in policy.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-5) for name in grads[0])


def test_saved_policy_loads_in_transformers_and_here_bit_for_bit(tmp_path: Path) -> None:
    policy = Policy(lab.tiny(5))
    save_policy(policy, lab.tokenizer(), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config._attn_implementation == "sdpa"  # the folder has no trace of srpo's own attention
    assert lab.same_bits(dict(theirs.named_parameters()), dict(iter_full_params(policy)))
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("w7") == 7
    (batch,) = lab.batches(1)
    assert torch.equal(Policy(load_policy(tmp_path))(batch), policy(batch))


def test_folder_without_a_model_says_which_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policy\.path"):
        load_policy(tmp_path)
