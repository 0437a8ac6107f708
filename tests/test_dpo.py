from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small
import torch
from plain_tokenizer import PlainTokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import srpo.dpo
import srpo.training.supervised
from srpo.core.batch import Rollout, read_rollouts
from srpo.core.config.dpo import DpoConfig, PairRules
from srpo.core.config.train import OptimizerConfig, PolicyConfig
from srpo.core.errors import UserError
from srpo.core.metrics import check_key
from srpo.data.pairs import read_pairs
from srpo.data.preferences import Preference
from srpo.data.tokenizer import load_tokenizer
from srpo.dpo import _check_tokenizer, dpo, load_preferences, num_rows, pack_preferences, reference_logprobs, response_logprobs
from srpo.policy.model import Policy, load_policy
from srpo.train import train
from srpo.training.outputs import Logits
from srpo.training.supervised import batch_indices

NAMES = ("accuracy", "margin", "chosen_reward", "rejected_reward")


@pytest.fixture(scope="module")
def pairs_file(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preferences that can be learned: each demonstration is preferred to its lines in reverse order."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    pairs = list(read_pairs(world.pairs))[:120]
    with path.open("w", encoding="utf-8") as file:
        for prompt, chosen in pairs:
            rejected = "\n".join(reversed(chosen.splitlines()))
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return path


@pytest.fixture(scope="module")
def sampled(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rollouts of a short run."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    train(world.config(folder, num_steps=2, rollout={"num_prompts": 12, "group_size": 6}), small.ONE)
    return folder / "rollouts.jsonl"


def settings(world: Any, run_dir: Path, **changes: Any) -> DpoConfig:
    base = DpoConfig(
        run_dir=str(run_dir),
        num_steps=3,
        batch_size=8,
        micro_batch_tokens=600,
        checkpoint_every=2,
        policy=PolicyConfig(path=str(world.policy)),
        optimizer=OptimizerConfig(lr=3e-4),
    )
    return small.changed(base, changes)


def plain_logprob(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    """Sum of the log-probabilities of a response, by transformers alone, fp64."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


def preferences(cfg: DpoConfig, world: Any) -> list[Preference]:
    return load_preferences(cfg, load_tokenizer(world.policy))[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_steps_are_those_of_the_formula(world: Any, pairs_file: Path, tmp_path: Path, smoothing: float) -> None:
    """Rafailov et al., Eq. 7, in fp64 on transformers' own model. AdamW hides a wrong scale, the gradient norm shows it."""
    cfg = settings(world, tmp_path, pairs=str(pairs_file), num_steps=2, checkpoint_every=1, label_smoothing=smoothing)
    cfg = small.changed(cfg, {"optimizer": {"grad_clip": 0.0}})
    dpo(cfg, small.ONE)
    pairs = preferences(cfg, world)
    model, frozen = (
        AutoModelForCausalLM.from_pretrained(world.policy, attn_implementation="sdpa", experts_implementation="eager").double()
        for _ in range(2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optimizer.lr, betas=cfg.optimizer.betas, weight_decay=0.0)
    for step, line in enumerate(small.metrics_of(tmp_path)):
        losses, rewards = [], []
        for i in batch_indices(len(pairs), 8, step, cfg.seed):
            pair = pairs[i]
            ratios = []
            for ids in (pair.chosen_ids, pair.rejected_ids):
                with torch.no_grad():
                    ref = plain_logprob(frozen, pair.prompt_ids, ids)
                ratios.append(plain_logprob(model, pair.prompt_ids, ids) - ref)
            h = ratios[0] - ratios[1]
            losses.append(-(1 - smoothing) * torch.sigmoid(0.1 * h).log() - smoothing * torch.sigmoid(-0.1 * h).log())
            rewards.append([0.1 * float(ratio.detach()) for ratio in ratios])
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
        optimizer.step()
        chosen, rejected = (sum(column) / 8 for column in zip(*rewards, strict=True))
        assert line["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert line["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert line["dpo/chosen_reward"] == pytest.approx(chosen, rel=1e-3, abs=1e-4)
        assert line["dpo/rejected_reward"] == pytest.approx(rejected, rel=1e-3, abs=1e-4)
        assert line["dpo/margin"] == pytest.approx(chosen - rejected, rel=1e-3, abs=1e-4)
        if step:
            assert line["dpo/accuracy"] == pytest.approx(sum(a > b for a, b in rewards) / 8) and line["dpo/margin"] > 0.01
        else:
            assert line["train/loss"] == pytest.approx(math.log(2), rel=1e-4)


def test_pairs_are_learned_and_every_metric_is_declared(world: Any, pairs_file: Path, tmp_path: Path) -> None:
    cfg = settings(world, tmp_path, pairs=str(pairs_file), num_steps=15, micro_batch_tokens=2000)
    assert dpo(cfg, small.ONE) == tmp_path / "policy"
    lines = small.metrics_of(tmp_path)
    for key in lines[0]:
        assert key == "step" or check_key(key) is None
    assert lines[-1]["train/loss"] < 0.5 < lines[0]["train/loss"] and lines[-1]["dpo/accuracy"] > 0.7
    assert lines[-1]["dpo/margin"] == pytest.approx(lines[-1]["dpo/chosen_reward"] - lines[-1]["dpo/rejected_reward"], rel=1e-6)
    before = small.parameters_of(world.policy)
    assert any(not torch.equal(p, before[name]) for name, p in small.parameters_of(tmp_path / "policy").items())
    assert json.loads((tmp_path / "pairs.json").read_text()) == {"num_pairs": len(preferences(cfg, world))}


@pytest.mark.parametrize("max_tokens", [None, 1])
def test_a_pair_is_never_split(world: Any, pairs_file: Path, tmp_path: Path, max_tokens: int | None) -> None:
    pairs = preferences(settings(world, tmp_path, pairs=str(pairs_file)), world)[:7]
    limit = max_tokens and max(map(num_rows, pairs))
    reference = torch.arange(14.0).reshape(7, 2)
    batches = pack_preferences(pairs, reference, limit or 10**6)
    assert (len(batches) > 3) == bool(limit) and all(batch.num_sequences % 2 == 0 for batch in batches)
    assert sum(len(batch.labels) for batch in batches) == sum(map(num_rows, pairs))
    assert not limit or all(len(batch.labels) <= limit for batch in batches)
    model = Policy(load_policy(world.policy))
    with torch.no_grad():
        logprobs = torch.cat([response_logprobs(Logits(model(batch)), batch.rows()[1]) for batch in batches]).reshape(-1, 2)
        plain = AutoModelForCausalLM.from_pretrained(world.policy, attn_implementation="sdpa")
        for pair, values in zip(pairs, logprobs, strict=True):
            for ids, value in zip((pair.chosen_ids, pair.rejected_ids), values, strict=True):
                assert float(value) == pytest.approx(float(plain_logprob(plain, pair.prompt_ids, ids)), rel=1e-4)
    cut = [batch.rows()[1] for batch in batches]
    carried = [srpo.dpo._by_sequence(rows.ref_logprobs, rows) for rows in cut if rows.ref_logprobs is not None]
    assert torch.equal(torch.cat(carried).reshape(-1, 2), reference)
    for inputs in ("logits", "hidden"):
        assert torch.allclose(reference_logprobs(model, pairs, limit or 10**6, small.ONE, inputs), logprobs, atol=1e-4)


def test_micro_batches_change_nothing(world: Any, pairs_file: Path, tmp_path: Path) -> None:
    lines = []
    for name, tokens in (("small", 260), ("large", 100_000)):
        dpo(settings(world, tmp_path / name, pairs=str(pairs_file), micro_batch_tokens=tokens), small.ONE)
        lines.append(small.metrics_of(tmp_path / name))
    for one, other in zip(*lines, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=2e-5)


def test_two_ranks_and_hidden_states_change_nothing(world: Any, pairs_file: Path, tmp_path: Path) -> None:
    cfg = settings(world, tmp_path / "two", pairs=str(pairs_file), batch_size=7, num_steps=2)
    small.Program("srpo.dpo", replace(cfg, inputs="hidden"), tmp_path / "launch", num_ranks=2).finish()
    dpo(replace(cfg, run_dir=str(tmp_path / "one")), small.ONE)
    for one, two in zip(small.metrics_of(tmp_path / "one"), small.metrics_of(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=2e-4, abs=2e-5)
    stored = [load_file(tmp_path / name / "reference.safetensors")["logprobs"] for name in ("one", "two")]
    torch.testing.assert_close(*stored, rtol=1e-5, atol=1e-3)


FIVE_STEPS = {"num_steps": 5, "micro_batch_tokens": 2000}


@pytest.fixture(scope="module")
def never_stopped(world: Any, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    run_dir = tmp_path_factory.mktemp("dpo") / "never_stopped"
    dpo(settings(world, run_dir, pairs=str(pairs_file), **FIVE_STEPS), small.ONE)
    return run_dir


@pytest.mark.parametrize("where", ["reference_logprobs", "learning_rate", "save_checkpoint", "save_policy"])
def test_stopped_anywhere_it_ends_the_same(
    world: Any, pairs_file: Path, never_stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    stopped = settings(world, tmp_path / "stopped", pairs=str(pairs_file), **FIVE_STEPS)
    module = srpo.training.supervised if where in ("learning_rate", "save_checkpoint") else srpo.dpo
    original, calls = getattr(module, where), []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == {"reference_logprobs": 1, "learning_rate": 4, "save_checkpoint": 2, "save_policy": 1}[where]:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, where, killed)
    with pytest.raises(KeyboardInterrupt):
        dpo(stopped, small.ONE)
    dpo(stopped, small.ONE)
    assert len(calls) > 1
    assert (never_stopped / "metrics.jsonl").read_bytes() == (tmp_path / "stopped/metrics.jsonl").read_bytes()
    assert small.same_bits(*(small.parameters_of(run / "policy") for run in (never_stopped, tmp_path / "stopped")))


def test_pairs_come_from_the_rollouts_of_a_run(world: Any, sampled: Path, tmp_path: Path) -> None:
    rules = PairRules("verdict", per_example=3)
    cfg = settings(world, tmp_path / "run", rollouts=str(sampled), data=str(world.train), num_steps=1, rules=vars(rules))
    dpo(cfg, small.ONE)
    counts = json.loads((tmp_path / "run" / "pairs.json").read_text())
    assert counts["num_responses"] == 2 * 12 * 6 and counts["num_pairs"] > 0
    labels = {example.example_id: example.gold[-1] for example in world.examples()}
    answers = {(r.example_id, r.response_ids): r.answers[-1] for _, r in read_rollouts(sampled)}
    for pair in preferences(cfg, world):
        assert answers[pair.example_id, pair.chosen_ids] == labels[pair.example_id] == pair.grade
        assert answers[pair.example_id, pair.rejected_ids] != labels[pair.example_id]
    total = load_preferences(replace(cfg, data="", rules=PairRules("total", margin=0.3)), load_tokenizer(world.policy))[1]
    assert 0 < total["num_pairs"] != counts["num_pairs"]


def test_a_named_reference_is_the_one_that_is_asked(world: Any, pairs_file: Path, tmp_path: Path) -> None:
    cfg = settings(
        world, tmp_path, pairs=str(pairs_file), num_steps=1, policy={"reference": str(world.base)}, micro_batch_tokens=4000
    )
    dpo(cfg, small.ONE)
    pairs = preferences(cfg, world)
    model = Policy(load_policy(world.base))
    stored = load_file(tmp_path / "reference.safetensors")["logprobs"]
    assert torch.allclose(stored, reference_logprobs(model, pairs, 4000, small.ONE), atol=1e-3)
    assert small.metrics_of(tmp_path)[0]["dpo/chosen_reward"] > 1  # SFT has moved the policy far from this reference


def test_other_pairs_cannot_continue_a_run(world: Any, pairs_file: Path, tmp_path: Path) -> None:
    data = small.rewrite_line(pairs_file, tmp_path / "pairs.jsonl", 1, lambda row: None)
    cfg = settings(world, tmp_path / "run", pairs=str(data), num_steps=1, batch_size=4)
    dpo(cfg, small.ONE)
    small.rewrite_line(pairs_file, data, 5, lambda row: {**row, "rejected": "1. Query intent: no"})
    with pytest.raises(ValueError, match=r"the file of pairs at .* is not the one that .*: restore it, or give another run_dir"):
        dpo(cfg, small.ONE)


def test_rollouts_of_another_tokenizer_are_refused(world: Any, sampled: Path, tmp_path: Path) -> None:
    def swap(row: dict[str, Any]) -> None:
        row["response_ids"] = row["response_ids"][::-1]

    path = small.rewrite_line(sampled, tmp_path / "rollouts.jsonl", 3, swap)
    with pytest.raises(ValueError, match=r"are not its text in the tokenizer of .*set policy.path to the policy that"):
        preferences(settings(world, tmp_path, rollouts=str(path)), world)


def test_rollouts_of_a_padded_vocabulary_are_those_of_the_policy(world: Any, sampled: Path, tmp_path: Path) -> None:
    """A model may have more rows than its tokenizer has ids, and samples them; they decode to nothing."""
    beyond = len(load_tokenizer(world.base)) + 3

    def insert(row: dict[str, Any]) -> None:
        row["response_ids"].insert(2, beyond)
        row["sampling_logprobs"].insert(2, 0.0)
        row["step_ends"][-1] += 1

    path = small.rewrite_line(sampled, tmp_path / "rollouts.jsonl", 3, insert)
    cfg = settings(world, tmp_path, rollouts=str(path))
    assert preferences(cfg, world) is not None


def test_ids_beyond_the_number_of_tokens_are_the_policy_s(world: Any, tmp_path: Path) -> None:
    """A tokenizer may leave out ids."""

    class Gaps(PlainTokenizer):
        eos_token_id = 720

        def get_vocab(self) -> dict[str, int]:
            return {"a": 3, "</s>": 720}

        def decode(self, ids: Sequence[int]) -> str:
            return "".join("a" if i == 3 else "</s>" for i in ids)

    cfg = settings(world, tmp_path)
    rollout = Rollout.from_answers("e1", (), text="aa")
    _check_tokenizer(cfg, Gaps(), [replace(rollout, prompt_ids=(720, 3), response_ids=(3, 3, 720))])
    with pytest.raises(UserError, match="the tokens of e1 are not its text"):
        _check_tokenizer(cfg, Gaps(), [replace(rollout, prompt_ids=(721,), response_ids=(3, 3))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"set either pairs \(a file of preferences\) or rollouts"),
        ({"pairs": "a", "rollouts": "b"}, "set either pairs"),
        ({"pairs": "PAIRS", "rules": {"balance": True}}, "rules.balance is set, .* from rollouts: set rules.balance to false"),
        ({"pairs": "PAIRS", "data": "EVAL"}, "data is set, but only applies to pairs that are made from rollouts"),
        ({"pairs": "PAIRS", "batch_size": 0}, "batch_size is 0: set it to 1 or more"),
        ({"pairs": "PAIRS", "beta": 0.0}, "beta is 0.0"),
        ({"pairs": "PAIRS", "label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"pairs": "PAIRS", "policy": {"max_context": 40}}, r"pair \d+ has \d+ tokens, more than the context of 40"),
        (
            {"pairs": "PAIRS", "micro_batch_tokens": 90},
            r"pair \d+ has \d+ rows, more than micro_batch_tokens = 90: .* never split",
        ),
        ({"pairs": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"rollouts": "PAIRS"}, "give a line of a rollouts.jsonl"),
        ({"rollouts": "SAMPLED", "rules": {"prefer": "total", "margin": 9.0}}, r"make no pair: .*lower rules.margin"),
        ({"rollouts": "SAMPLED", "rules": {"balance": True}}, "set data, or set rules.balance to false"),
        ({"rollouts": "SAMPLED", "data": "EVAL"}, "has no grade in data"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_no_run(
    world: Any,
    pairs_file: Path,
    sampled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    names = {"PAIRS": pairs_file, "SAMPLED": sampled, "EVAL": world.eval}
    changes = {key: str(names.get(value, value)) if isinstance(value, str) else value for key, value in changes.items()}
    line = small.complaint(srpo.dpo.main, settings(world, tmp_path / "run", **changes), tmp_path, capsys)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_the_same_tokens_on_both_sides_are_refused(world: Any, tmp_path: Path) -> None:
    pair = Preference((1,), (5, 6), (5, 6), "e7")
    with pytest.raises(ValueError, match=r"pair 1 \(of e7\) has the same tokens as chosen and as rejected response"):
        srpo.dpo._check_pairs(settings(world, tmp_path), [pair], 100, 50)
    with pytest.raises(ValueError, match="empty prompt or response"):
        srpo.dpo._check_pairs(settings(world, tmp_path), [replace(pair, rejected_ids=())], 100, 50)
    with pytest.raises(ValueError, match=r"has the token 6, and the model in .* has 6"):
        srpo.dpo._check_pairs(settings(world, tmp_path), [replace(pair, rejected_ids=(4,))], 100, 6)
