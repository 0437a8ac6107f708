from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from srpo.core.errors import UserError
from srpo.policy.model import Policy
from srpo.policy.parallel import Parallel, iter_full_params
from srpo.rollout.engine import Sample, SamplingParams
from srpo.rollout.local import LocalEngine, plan_compaction

VOCAB = 96


def tiny(seed: int = 0, **changes) -> Any:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # peaked distributions, so that a wrong key or position shows
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(fields | changes))).eval()


def random_prompts(seed: int, num: int, longest: int = 20) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest))) for _ in range(num)]


def brute_force_logprobs(model, prompt: tuple[int, ...], sample: Sample, params: SamplingParams) -> torch.Tensor:
    """[L] of one response alone through the plain forward, filtered by sorting."""
    ids = torch.tensor([[*prompt, *sample.response_ids]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, len(prompt) - 1 :].double() / params.temperature
    if params.top_k:
        threshold = logits.sort(-1, descending=True).values[:, min(params.top_k, VOCAB) - 1, None]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return logits.log_softmax(-1).gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("top_k", "temperature", "greedy", "max_rows"),
    [
        (0, 1.0, False, 256),
        (5, 0.99, False, 8),
        (20, 1.7, False, 256),
        (VOCAB + 1, 0.9, False, 256),
        (1, 1.0, False, 256),
        (7, 0.8, True, 256),
    ],
)
def test_logprobs_are_those_of_a_plain_forward(top_k, temperature, greedy, max_rows):
    model = tiny(seed=top_k)
    prompts = random_prompts(top_k, 5)
    params = SamplingParams(25, temperature, top_k, group_size=4, stop_ids=(1, 5, 9), greedy=greedy)
    samples = LocalEngine(model, max_rows=max_rows).generate(prompts, params, seed=top_k)
    assert len({len(s.response_ids) for s in samples}) > 1  # rows finish at different times, so the wave is compacted
    for sample in samples:
        expected = brute_force_logprobs(model, prompts[sample.prompt_index], sample, params)
        torch.testing.assert_close(torch.tensor(sample.sampling_logprobs).double(), expected, atol=1e-5, rtol=0)


def test_dense_model_without_grouped_heads():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    prompts, params = random_prompts(3, 3), SamplingParams(8, 1.0, 0, group_size=3)
    for sample in LocalEngine(model).generate(prompts, params, seed=1):
        expected = brute_force_logprobs(model, prompts[sample.prompt_index], sample, params)
        torch.testing.assert_close(torch.tensor(sample.sampling_logprobs).double(), expected, atol=1e-5, rtol=0)


def test_greedy_is_generate():
    model = tiny(seed=4)
    prompts = random_prompts(4, 6)
    params = SamplingParams(20, 1.0, 0, group_size=1, stop_ids=(1,), greedy=True)
    for sample in LocalEngine(model).generate(prompts, params, seed=0):
        prompt = torch.tensor([prompts[sample.prompt_index]])
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20)
        assert list(sample.response_ids) == expected[0, prompt.shape[1] :].tolist()


def test_order_stop_and_length():
    prompts = random_prompts(5, 5)
    params = SamplingParams(12, 1.0, 0, group_size=4, stop_ids=(1, 7, 11, 20))
    samples = LocalEngine(tiny(seed=5), max_rows=8).generate(prompts, params, seed=5)
    assert [s.prompt_index for s in samples] == [i for i in range(5) for _ in range(4)]
    assert {s.finish for s in samples} == {"stop", "length"}
    for s in samples:
        stops = [token in params.stop_ids for token in s.response_ids]
        assert len(s.response_ids) == len(s.sampling_logprobs)
        assert not any(stops[:-1])
        assert stops[-1] == (s.finish == "stop")
        assert s.finish == "stop" or len(s.response_ids) == 12


def test_ignore_eos_gives_exactly_max_new_tokens():
    params = SamplingParams(9, 1.0, 0, group_size=2, stop_ids=tuple(range(VOCAB)), ignore_eos=True)
    samples = LocalEngine(tiny()).generate(random_prompts(6, 2), params, seed=0)
    assert [(len(s.response_ids), s.finish) for s in samples] == [(9, "length")] * 4


def test_same_seed_same_bits_other_seed_other_samples():
    engine, prompts = LocalEngine(tiny(seed=7)), random_prompts(7, 4)
    params = SamplingParams(15, 1.0, 10, group_size=3, stop_ids=(1,))
    first = engine.generate(prompts, params, seed=1)
    assert engine.generate(prompts, params, seed=1) == first
    assert [s.response_ids for s in engine.generate(prompts, params, seed=2)] != [s.response_ids for s in first]


def test_a_prompt_is_sampled_by_its_number_wherever_it_is():
    engine, prompts = LocalEngine(tiny(seed=7)), random_prompts(7, 5)
    params = SamplingParams(15, 1.0, 10, group_size=3, stop_ids=(1,))
    groups = [samples.response_ids for samples in engine.generate(prompts, params, seed=1)]
    for rank in range(2):
        share = list(range(rank, 5, 2))
        samples = engine.generate([prompts[i] for i in share], params, 1, numbers=share)
        assert [s.response_ids for s in samples] == [ids for i in share for ids in groups[3 * i : 3 * i + 3]]


def test_neighbours_and_waves_do_not_change_a_response():
    model, prompts = tiny(seed=8), random_prompts(8, 6)
    params = SamplingParams(15, 1.0, 10, group_size=4, stop_ids=(1, 3, 4))
    one_wave = LocalEngine(model, max_rows=256).generate(prompts, params, seed=1)
    waves = LocalEngine(model, max_rows=1).generate(prompts, params, seed=1)
    assert [s.response_ids for s in one_wave] == [s.response_ids for s in waves]


def test_samples_follow_the_filtered_distribution():
    model, prompt = tiny(seed=9), (5, 6, 7)
    params = SamplingParams(1, 1.3, 6, group_size=20_000)
    samples = LocalEngine(model).generate([prompt], params, seed=9)
    counts = torch.bincount(torch.tensor([s.response_ids[0] for s in samples]), minlength=VOCAB).double() / len(samples)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double() / params.temperature
    top = logits.topk(6)
    expected = torch.zeros(VOCAB, dtype=torch.float64).scatter(0, top.indices, top.values.softmax(-1))
    torch.testing.assert_close(counts, expected, atol=0.015, rtol=0)  # four standard errors of a fraction


def test_sync_copies_every_parameter():
    policy = tiny(seed=10)
    engine, prompts = LocalEngine(policy), random_prompts(10, 3)
    params = SamplingParams(10, 1.0, 0, group_size=2)
    assert engine.policy_version == -1
    before = engine.generate(prompts, params, seed=0)
    with torch.no_grad():
        for param in policy.parameters():
            param.add_(torch.randn_like(param), alpha=0.05)
    assert engine.generate(prompts, params, seed=0) == before  # the copy is its own
    engine.sync_weights(policy, version=17)
    assert engine.policy_version == 17
    own = dict(iter_full_params(engine.model))
    assert own.keys() == dict(iter_full_params(policy)).keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in iter_full_params(policy))
    assert engine.generate(prompts, params, seed=0) == LocalEngine(policy).generate(prompts, params, seed=0) != before


@pytest.mark.parametrize("fsdp", [True, False])
def test_sync_from_a_sharded_policy(fsdp: bool):
    parallel = Parallel(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    engine = LocalEngine(tiny())
    policy = Policy(tiny(seed=12, attn_implementation="srpo_varlen"))
    whole = {name: param.detach().clone() for name, param in iter_full_params(policy)}
    try:
        policy = (parallel.fully_shard if fsdp else parallel.shard)(policy, dtype="bfloat16")
        assert any(isinstance(param, DTensor) for param in policy.parameters()) == fsdp
        engine.sync_weights(policy, version=1)
        with pytest.raises(ValueError, match="before the policy is sharded"):
            LocalEngine(policy)
    finally:
        parallel.close()
    assert all(torch.equal(param, whole[name]) for name, param in engine.model.named_parameters())


def test_the_copy_is_cast_and_the_original_is_not():
    model = tiny(seed=3, tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    own: Any = LocalEngine(model, dtype=torch.bfloat16).model
    assert all(torch.equal(p, before[name].bfloat16()) for name, p in own.named_parameters())
    assert all(b.dtype == torch.float32 and torch.equal(b, before[name]) for name, b in own.named_buffers())
    assert own.lm_head.weight is own.get_input_embeddings().weight
    assert all(p.requires_grad and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_sync_refuses_another_model():
    engine = LocalEngine(tiny())
    with pytest.raises(ValueError, match="does not fit"):
        engine.sync_weights(tiny(moe_intermediate_size=16), 1)
    with pytest.raises(ValueError, match="differ"):
        engine.sync_weights(tiny(num_hidden_layers=2), 1)
    assert engine.policy_version == -1


def test_context_is_checked_before_anything_is_generated():
    engine = LocalEngine(tiny(), max_context=30)
    with pytest.raises(ValueError, match=r"prompt 1 has 21 tokens.*max_new_tokens"):
        engine.generate([(3,) * 20, (3,) * 21], SamplingParams(10), seed=0)
    with pytest.raises(ValueError, match="empty"):
        engine.generate([()], SamplingParams(10), seed=0)
    assert engine.generate([], SamplingParams(10), seed=0) == []
    assert LocalEngine(tiny(), max_context=10**6).max_context == 128


@pytest.mark.parametrize("window", [2, 4, 11, 30])
def test_sliding_window(window):
    model = tiny(seed=window, use_sliding_window=True, sliding_window=window, max_window_layers=1)
    prompts, params = random_prompts(window, 5), SamplingParams(14, 1.0, 0, group_size=4, stop_ids=(1, 5, 9))
    for sample in LocalEngine(model).generate(prompts, params, seed=1):
        expected = brute_force_logprobs(model, prompts[sample.prompt_index], sample, params)
        torch.testing.assert_close(torch.tensor(sample.sampling_logprobs).double(), expected, atol=1e-5, rtol=0)


def test_what_the_engine_does_not_decode_right_is_refused():
    config = DiffLlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    with pytest.raises(UserError, match=r"'diffllama' in the local engine are not supported: .* Set the engine to 'vllm'"):
        LocalEngine(DiffLlamaForCausalLM(config))


def test_logits_that_are_not_finite_are_an_error():
    model = tiny()
    model.lm_head.weight.data[3, 2] = float("nan")
    with pytest.raises(UserError, match="logits that are not finite"):
        LocalEngine(model).generate([(3, 4)], SamplingParams(4, 1.0, 0, group_size=2), seed=0)


def test_stats_count_the_last_generation():
    engine = LocalEngine(tiny())
    engine.generate([(3, 4)], SamplingParams(6, group_size=5), seed=0)
    stats = engine.stats()
    assert stats["num_tokens"] == 30
    assert stats["tokens_per_s"] == pytest.approx(30 / stats["generate_s"])


@pytest.mark.parametrize("seed", range(40))
def test_compaction_keeps_exactly_the_living(seed):
    rng = random.Random(seed)
    size, odds = rng.choice([1, 2, 3, 4, 6, 8, 16]), rng.random()
    alive = [[rng.random() < odds for _ in range(size)] for _ in range(rng.randint(1, 9))]
    plan = plan_compaction(alive)
    living = {c * size + r for c, chunk in enumerate(alive) for r, lives in enumerate(chunk) if lives}
    if plan is None:
        assert len(living) > 0.3 * len(alive) * size or size == 1
        return
    chunks, slots = plan
    kept = [slot for chunk in slots for slot in chunk if slot >= 0]
    assert len(kept) == len(set(kept))
    assert set(kept) == living
    assert all(slot // size == chunk for chunk, row in zip(chunks, slots, strict=True) for slot in row if slot >= 0)
    assert all(row[0] >= 0 for row in slots)
    assert len({len(row) for row in slots}) <= 1
    assert sum(map(len, slots)) <= size * len(alive)


def test_compaction_of_a_finished_wave_is_empty():
    assert plan_compaction([[False, False]]) == ([], [])
    assert plan_compaction([[True] * 8] * 4) is None
    assert plan_compaction([[False, True, False, False]] * 3) == ([0, 1, 2], [[1], [5], [9]])


def test_engine_of_a_trainer_policy_in_bfloat16():
    policy = Policy(tiny(seed=11, attn_implementation="srpo_varlen"))
    engine = LocalEngine(policy, dtype=torch.bfloat16)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in engine.model.buffers()} == {torch.float32}
    with torch.no_grad():
        for param in policy.parameters():
            param.mul_(1.01)
    engine.sync_weights(policy, version=1)
    exact = dict(iter_full_params(policy))
    assert all(torch.equal(param, exact[name].bfloat16()) for name, param in engine.model.named_parameters())
    assert policy.model.config._attn_implementation == "srpo_varlen"  # the engine's attention is its own copy's alone
    sample = engine.generate([(3, 4, 5)], SamplingParams(12, 1.0, 0, group_size=1), seed=0)[0]
    expected = brute_force_logprobs(tiny_like(engine.model), (3, 4, 5), sample, SamplingParams(12, 1.0, 0))
    assert (torch.tensor(sample.sampling_logprobs) - expected).abs().mean() < 0.1


def tiny_like(model) -> Any:
    """A plain fp32 model with these weights."""
    plain = tiny()
    plain.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    return plain
