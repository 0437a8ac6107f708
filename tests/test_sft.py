from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import small_world as small
import torch
from transformers import AutoModelForCausalLM

import srpo.sft
import srpo.training.supervised
from srpo.algorithm.losses import last_step_factors
from srpo.core.batch import IGNORE
from srpo.core.metrics import check_key
from srpo.data.pairs import read_pairs, write_pairs
from srpo.data.tokenizer import encode, load_tokenizer
from srpo.policy.parallel import Parallel
from srpo.sft import pack_pairs, sft, sft_loss, tokenized_pairs, verdict_lengths
from srpo.training.outputs import Logits
from srpo.training.supervised import batch_indices


def test_pairs_come_back_as_written(tmp_path: Path) -> None:
    pairs = [("Query: caf\u00e9\n", "1. a\n2. b"), ("\u2028\t\\", '"{')]
    write_pairs(tmp_path / "new" / "pairs.jsonl", pairs)
    assert list(read_pairs(tmp_path / "new" / "pairs.jsonl")) == pairs


@pytest.mark.parametrize(
    "line", ["{", "[]", '"prompt"', '{"prompt": "p"}', '{"response": "r"}', '{"prompt": "", "response": "r"}']
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_malformed_pair_is_named_by_file_and_line(tmp_path: Path, line: str, number: int) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = ['{"prompt": "p", "response": "r"}'] * 3
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, line {number}: .*prompt.*response"):
        list(read_pairs(path))


def test_bytes_that_are_no_text_have_a_line_too(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "p", "response": "r"}\n{"prompt": "\xff", "response": "r"}\n')
    with pytest.raises(ValueError, match=r"line 2: not UTF-8 at byte 12"):
        list(read_pairs(path))


def test_no_pairs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(ValueError, match="has no pairs"):
        list(read_pairs(tmp_path / "pairs.jsonl"))


@pytest.mark.parametrize(("num_pairs", "batch_size"), [(10, 4), (7, 7), (3, 8)])
def test_every_epoch_shows_every_pair_once(num_pairs: int, batch_size: int) -> None:
    num_steps = 2 * num_pairs  # batch_size * 2 epochs
    seen = [i for step in range(num_steps) for i in batch_indices(num_pairs, batch_size, step, seed=3)]
    epochs = [seen[k : k + num_pairs] for k in range(0, len(seen), num_pairs)]
    assert all(sorted(epoch) == list(range(num_pairs)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert Counter(seen) == dict.fromkeys(range(num_pairs), 2 * batch_size)


def test_any_step_can_be_had_alone_and_seeds_differ() -> None:
    inorder = [batch_indices(100, 9, step, seed=0) for step in range(30)]
    assert [batch_indices(100, 9, step, seed=0) for step in reversed(range(30))] == inorder[::-1]
    assert batch_indices(100, 9, 0, seed=1) != inorder[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_of_the_ranks_add_up_to_one_mean(world_size: int) -> None:
    pairs = [((1,) * p, (2,) * r) for p, r in ((3, 4), (1, 6), (2, 2), (5, 1), (4, 3))]
    shares = [pack_pairs(pairs, Parallel(rank, world_size, rank, torch.device("cpu")), 12) for rank in range(world_size)]
    batches = [batch for share in shares for batch in share]
    weights = torch.cat([batch.weights[batch.labels != IGNORE] for batch in batches])
    assert weights.tolist() == pytest.approx([1 / 16] * 16)
    assert sum(int((batch.labels == IGNORE).sum()) for batch in batches) == sum(len(prompt) - 1 for prompt, _ in pairs)


def drawn_pairs(num: int) -> tuple[list[Any], list[int]]:
    """Random pairs of tokens below 50, and the number of tokens of each response's last step: some, all or (unknown) none."""
    lengths = [(random.randint(1, 6), random.randint(1, 9)) for _ in range(num)]
    pairs = [tuple(tuple(random.choices(range(50), k=n)) for n in both) for both in lengths]
    return pairs, [random.choice((0, response, random.randint(1, response))) for _, response in lengths]


def eager_loss(table: torch.Tensor, pairs: list[Any], num_last: list[int], weight: float) -> torch.Tensor:
    """The weighted loss of a model whose logits after a token are a row of the table, token by token."""
    total, count = torch.zeros((), dtype=torch.float64), sum(len(response) for _, response in pairs)
    for (prompt, response), last in zip(pairs, num_last, strict=True):
        size = len(response)
        raw = [weight if k >= size - last else 1.0 for k in range(size)] if 0 < last < size else [1.0] * size
        tokens = (*prompt, *response)[len(prompt) - 1 :]
        for k in range(size):
            total = total - raw[k] * size / sum(raw) / count * table[tokens[k]].log_softmax(-1)[tokens[k + 1]]
    return total


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 7.0])
@pytest.mark.parametrize(("world_size", "max_tokens"), [(1, 10_000), (1, 16), (2, 16), (2, 40)])
def test_the_weighted_loss_on_any_number_of_ranks(weight: float, world_size: int, max_tokens: int) -> None:
    pairs, num_last = drawn_pairs(12)
    table = torch.randn(50, 50, requires_grad=True)
    total = torch.zeros(())
    for rank in range(world_size):
        for batch in pack_pairs(pairs, Parallel(rank, world_size, rank, torch.device("cpu")), max_tokens, num_last, weight):
            _, rows = batch.rows()
            loss = sft_loss(Logits(table[rows.input_ids]), rows)
            loss.backward()
            total = total + loss.detach()
    grad, exact = table.grad, table.detach().double().requires_grad_()
    want = eager_loss(exact, pairs, num_last, weight)
    want.backward()
    assert grad is not None and exact.grad is not None
    assert float(total) == pytest.approx(float(want.detach()), rel=1e-5)
    assert torch.allclose(grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_a_weight_of_one_is_the_plain_loss_to_the_bit() -> None:
    pairs, num_last = drawn_pairs(20)
    table = torch.randn(50, 50)
    results = []
    for last in ((), num_last):
        leaf = table.clone().requires_grad_()
        (batch,) = pack_pairs(pairs, small.ONE, 10_000, last, 1.0)
        _, rows = batch.rows()
        loss = sft_loss(Logits(leaf[rows.input_ids]), rows)
        loss.backward()
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_response_keeps_its_weight() -> None:
    lengths = [random.randint(1, 60) for _ in range(200)]
    last = [random.randint(0, length) for length in lengths]
    weight = random.uniform(0, 20)
    factors = last_step_factors(lengths, last, weight).double()
    counts = torch.tensor([[n - k, k] for n, k in zip(lengths, last, strict=True)]).double()
    assert torch.allclose((factors * counts).sum(1), torch.tensor(lengths).double(), rtol=1e-5)
    split = torch.tensor([0 < k < n for n, k in zip(lengths, last, strict=True)])
    assert torch.allclose(factors[split, 1], weight * factors[split, 0], rtol=1e-5) and bool((factors[~split] == 1).all())


def test_responses_without_their_steps_are_counted(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [*list(read_pairs(world.pairs))[:3], ("a", "1. Query intent: b"), ("a", "c")]
    write_pairs(tmp_path / "p.jsonl", texts)
    tokenizer = load_tokenizer(world.base)
    cfg = world.sft_config(tmp_path / "run", data=str(tmp_path / "p.jsonl"), verdict_weight=3.0)
    pairs = tokenized_pairs(cfg, tokenizer, 500, show=False)
    lengths = verdict_lengths(cfg, tokenizer, pairs, show=True)
    assert lengths[3:] == [0, 0] and all(0 < n < len(response) for n, (_, response) in zip(lengths[:3], pairs, strict=False))
    for (_, response), num, (_, text) in zip(pairs[:3], lengths, texts, strict=False):
        assert text.endswith(str(tokenizer.decode(list(response[-num:-1])))) and "L" in tokenizer.decode(list(response[-num:]))
    assert "2 of 5 responses of" in capsys.readouterr().out
    assert verdict_lengths(dataclasses.replace(cfg, verdict_weight=1.0), tokenizer, pairs, show=True) == []
    assert not capsys.readouterr().out


def test_the_program_reports_the_weighted_loss(world: Any, tmp_path: Path) -> None:
    """One step on the verdict alone, against the model's own probability of the tokens of the last step."""
    cfg = world.sft_config(tmp_path, num_steps=1, batch_size=4, micro_batch_tokens=200, verdict_weight=1e9)
    sft(cfg, small.ONE)
    tokenizer = load_tokenizer(world.base)
    pairs = tokenized_pairs(cfg, tokenizer, 500, show=False)
    chosen = batch_indices(len(pairs), 4, 0, cfg.seed)
    num_last = verdict_lengths(cfg, tokenizer, [pairs[i] for i in chosen], show=False)
    model = AutoModelForCausalLM.from_pretrained(world.base, attn_implementation="sdpa")
    total, count = 0.0, sum(len(pairs[i][1]) for i in chosen)
    for index, num in zip(chosen, num_last, strict=True):
        prompt, response = pairs[index]
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prompt, *response]])).logits[0, -1 - num : -1].log_softmax(-1)
        total -= float(logprobs.gather(1, torch.tensor(response[-num:])[:, None]).sum()) * len(response) / num
    (line,) = small.metrics_of(tmp_path)
    assert line["train/loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
def test_two_processes_learn_the_same_with_a_weight(world: Any, tmp_path: Path) -> None:
    settings = {"num_steps": 3, "batch_size": 8, "micro_batch_tokens": 300, "verdict_weight": 5.0}
    for ranks in (1, 2):
        cfg = world.sft_config(tmp_path / str(ranks), **settings)
        small.Program("srpo.sft", cfg, tmp_path / f"log{ranks}", num_ranks=ranks).finish()
    one, two = ([line["train/loss"] for line in small.metrics_of(tmp_path / name)] for name in "12")
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("inputs", ["logits", "hidden"])
def test_the_loss_is_the_mean_cross_entropy_of_the_responses(world: Any, tmp_path: Path, inputs: str) -> None:
    """Compared with transformers' own loss, one pair at a time."""
    cfg = world.sft_config(tmp_path, num_steps=1, batch_size=8, micro_batch_tokens=200, inputs=inputs)
    sft(cfg, small.ONE)
    tokenizer = load_tokenizer(world.base)
    model = AutoModelForCausalLM.from_pretrained(world.base, attn_implementation="sdpa")
    pairs = list(read_pairs(world.pairs))
    total, hits, count = 0.0, 0, 0
    for index in batch_indices(len(pairs), 8, 0, cfg.seed):
        prompt, response = (encode(tokenizer, text) for text in pairs[index])
        response = (*response, tokenizer.eos_token_id)
        with torch.no_grad():
            out = model(torch.tensor([[*prompt, *response]]), labels=torch.tensor([[*[-100] * len(prompt), *response]]))
        total += float(out.loss) * len(response)
        hits += int((out.logits[0, len(prompt) - 1 : -1].argmax(-1) == torch.tensor(response)).sum())
        count += len(response)
    (line,) = small.metrics_of(tmp_path)
    assert line["train/loss"] == pytest.approx(total / count, rel=1e-5)
    assert line["train/num_tokens"] == count and line["train/token_accuracy"] == pytest.approx(hits / count)


def test_special_tokens_are_the_templates_alone(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "p.jsonl", [("a<|end|>b", "c<|pad|><|end|>"), ("a", "b")])
    tokenizer = load_tokenizer(world.base)
    cfg = world.sft_config(tmp_path / "run", data=str(tmp_path / "p.jsonl"), prompt="<|pad|>{prompt}<|end|>")
    (first, response), (second, _) = tokenized_pairs(cfg, tokenizer, 500, show=True)
    for ids, text in ((first, "a<|end|>b"), (second, "a")):
        assert ids == (tokenizer.pad_token_id, *encode(tokenizer, text), tokenizer.eos_token_id)
    assert response.count(tokenizer.eos_token_id) == 1 and tokenizer.decode(list(response[:-1])) == "c<|pad|>"
    assert "2 texts of" in capsys.readouterr().out


def test_hidden_states_teach_what_logits_teach(world: Any, tmp_path: Path) -> None:
    settings = {"num_steps": 5, "batch_size": 8, "micro_batch_tokens": 400}
    for inputs in ("logits", "hidden"):
        sft(world.sft_config(tmp_path / inputs, inputs=inputs, **settings), small.ONE)
    with torch.no_grad():
        want, got = (small.parameters_of(tmp_path / inputs / "policy") for inputs in ("logits", "hidden"))
        before = small.parameters_of(world.base)
        moved = max(float((want[name] - before[name]).abs().max()) for name in want)
        assert max(float((got[name] - want[name]).abs().max()) for name in want) < 0.01 * moved


def test_the_small_world_learns_the_format(world: Any) -> None:
    lines = small.metrics_of(world.folder / "sft")
    assert [line["step"] for line in lines] == list(range(1, 121))
    assert lines[-1]["train/loss"] < 0.3 * lines[0]["train/loss"]
    assert lines[-1]["train/token_accuracy"] > 0.6
    for key in lines[0]:
        assert key == "step" or check_key(key) is None


SIX_STEPS = {"num_steps": 6, "checkpoint_every": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def uninterrupted(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    run_dir = tmp_path_factory.mktemp("sft") / "uninterrupted"
    sft(world.sft_config(run_dir, **SIX_STEPS), small.ONE)
    return run_dir


@pytest.mark.parametrize("where", ["learning_rate", "save_checkpoint", "save_policy"])
def test_stopped_anywhere_it_ends_the_same(
    world: Any, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    stopped = world.sft_config(tmp_path / "stopped", **SIX_STEPS)
    module = srpo.training.supervised if where in ("learning_rate", "save_checkpoint") else srpo.sft
    original, calls = getattr(module, where), []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == {"learning_rate": 4, "save_checkpoint": 2, "save_policy": 1}[where]:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, where, killed)
    with pytest.raises(KeyboardInterrupt):
        sft(stopped, small.ONE)
    sft(stopped, small.ONE)
    assert len(calls) > 1
    assert (uninterrupted / "metrics.jsonl").read_bytes() == (tmp_path / "stopped/metrics.jsonl").read_bytes()
    assert small.same_bits(*(small.parameters_of(run / "policy") for run in (uninterrupted, tmp_path / "stopped")))
    before = (tmp_path / "stopped/metrics.jsonl").read_bytes()
    sft(stopped, small.ONE)  # a finished run, started again
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == before


def test_other_pairs_cannot_continue_a_run(world: Any, tmp_path: Path) -> None:
    data = small.rewrite_line(world.pairs, tmp_path / "pairs.jsonl", 1, lambda row: None)
    cfg = world.sft_config(tmp_path / "run", data=str(data), num_steps=1, batch_size=4)
    sft(cfg, small.ONE)
    small.rewrite_line(world.pairs, data, 5, lambda row: {**row, "response": "1. Query intent: no"})
    with pytest.raises(ValueError, match=r"the training data at .* is not the one that .*: restore it, or give another run_dir"):
        sft(cfg, small.ONE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "data is not set"),
        ({"batch_size": 0}, "batch_size is 0: set it to 1 or more"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"policy": {"max_context": 40}}, r"pair \d+ has \d+ tokens, more than the context of 40: shorten it"),
        ({"micro_batch_tokens": 40}, r"pair \d+ has \d+ tokens, more than micro_batch_tokens = 40: raise"),
        ({"policy": {"path": "nowhere"}}, "no tokenizer in 'nowhere': policy.path"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"verdict_weight": -1.0}, "verdict_weight is -1.0: set it to 0 or more"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_no_run(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    line = small.complaint(srpo.sft.main, world.sft_config(tmp_path / "run", **changes), tmp_path, capsys)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()
