from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srpo.batch import Rollout, read_rollouts
from srpo.config import Config, DataConfig, RolloutConfig
from srpo.data.examples import Example
from srpo.data.readers import write_examples
from srpo.data.tokenizer import train_tokenizer
from srpo.evaluate import EvaluateConfig, evaluate_policy, main
from srpo.policy.model import TinyConfig, make_tiny, save_policy
from srpo.rollout.engine import Sample, SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.scores.bootstrap import BootstrapConfig
from srpo.settings import dump_toml, load
from srpo.steps import PAPER_STEPS, StepSchema

SCHEMA = StepSchema(PAPER_STEPS)
RESPONSE = """1. Query intent: shoes
2. Item: boots; color blue
3. Category match: related
4. Attribute match: color ok -> match
5. Verdict: L{}"""
EXAMPLES = [
    Example(
        f"e{i}",
        f"q{i}",
        f"query {i}",
        f"title {i}",
        gold=(None, None, "related", "match", f"L{1 + i % 4}"),
        truth=("shoes", "boots; color red", "related", "match", f"L{1 + i % 4}"),
        tags={"query_type": "odd" if i % 2 else "even"},
    )
    for i in range(10)
]
TEMPLATE = "{query} | {title}\n"
TOKENIZER = train_tokenizer([RESPONSE, TEMPLATE], vocab_size=300)
EOS: Any = TOKENIZER.eos_token_id


class Scripted:
    """An engine whose answer to prompt number i is grade 1 + i % 4, and no text at all to every tenth."""

    policy_version = 7

    def __init__(self) -> None:
        self.calls: list[tuple[int, SamplingParams]] = []

    def generate(self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, _: Any = None) -> list[Sample]:
        self.calls.append((len(prompts), params))
        samples = []
        for i, prompt in enumerate(prompts):
            number = int(str(TOKENIZER.decode(list(prompt))).split()[1])
            text = "" if number == 9 else RESPONSE.format(1 + number % 4)
            ids = (*TOKENIZER.encode(text), EOS)
            samples.append(Sample(i, ids, (0.0,) * len(ids), "stop"))
        return samples

    def sync_weights(self, policy: Any, version: int) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


def evaluated(engine: Any, **changes: Any) -> tuple[dict[str, Any], list[Rollout]]:
    options = {"prompt_template": TEMPLATE, "max_new_tokens": 40, "batch_size": 4, **changes}
    return evaluate_policy(engine, TOKENIZER, SCHEMA, EXAMPLES, **options)


def test_greedy_responses_are_scored_in_the_order_of_the_examples():
    engine = Scripted()
    results, rollouts = evaluated(engine)
    assert [rollout.example_id for rollout in rollouts] == [example.example_id for example in EXAMPLES]
    assert [rollout.group for rollout in rollouts] == list(range(10))
    assert [n for n, _ in engine.calls] == [4, 4, 2]
    assert all(params.greedy and params.group_size == 1 and params.top_k == 0 for _, params in engine.calls)
    assert rollouts[0].policy_version == 7
    assert (results["accuracy"], results["parse_rate"], results["num_examples"]) == (0.9, 0.9, 10)
    assert results["step_accuracy"] == [0.9, 0.0, 0.9, 0.9, 0.9]
    assert results["by"]["query_type"]["even"]["accuracy"] == 1.0


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_decode_their_share_and_agree(world_size: int):
    shares: dict[int, Any] = {}
    barrier = threading.Barrier(world_size, timeout=60)

    def all_gather_object(rank: int, x: Any) -> list[Any]:
        shares[rank] = x
        barrier.wait()
        return [shares[r] for r in range(world_size)]

    def run(rank: int) -> Any:
        gather = partial(all_gather_object, rank)
        return evaluated(Scripted(), parallel=SimpleNamespace(rank=rank, world_size=world_size, all_gather_object=gather))

    with ThreadPoolExecutor(world_size) as pool:
        ranks = list(pool.map(run, range(world_size)))
    assert all(made == evaluated(Scripted()) for made in ranks)
    assert [len(shares[r]) for r in range(world_size)] == [len(range(r, 10, world_size)) for r in range(world_size)]


def test_local_engine_answers_the_same_whatever_the_batches():
    model = make_tiny(TOKENIZER, TinyConfig(hidden_size=32, num_layers=1, head_dim=8, num_experts=2, expert_size=16), seed=1)
    (results, fours), (same, tens) = (evaluated(LocalEngine(model), max_new_tokens=6, batch_size=n) for n in (4, 10))
    assert results == same
    for a, b in zip(fours, tens, strict=True):  # the order of sums depends on the shape: log-probabilities may round otherwise
        assert a.response_ids == b.response_ids
        assert a.sampling_logprobs == pytest.approx(b.sampling_logprobs, abs=1e-5)


def test_intervals_are_drawn_where_they_are_asked_for():
    plain, _ = evaluated(Scripted(), by=("odd",))
    assert "confidence" not in plain and plain["by"] == {}
    sure, _ = evaluated(Scripted(), bootstrap=BootstrapConfig(num_draws=50))
    low, high = sure["confidence"]["accuracy"]
    assert low < 0.9 < high
    assert {key: value for key, value in sure.items() if key in plain and key not in ("by", "untagged")}.items() <= plain.items()


def test_program_decodes_a_checkpoint_with_the_settings_of_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    write_examples(tmp_path / "held_out.jsonl", EXAMPLES)
    model = make_tiny(TOKENIZER, TinyConfig(hidden_size=32, num_layers=1, head_dim=8, num_experts=2, expert_size=16), seed=0)
    save_policy(model, TOKENIZER, run_dir / "policy")
    data = DataConfig(eval=str(tmp_path / "held_out.jsonl"), prompt=TEMPLATE)
    (run_dir / "config.toml").write_text(dump_toml(replace(Config(), data=data, rollout=RolloutConfig(max_new_tokens=5))))
    few = ["--limit", "6", "--bootstrap.num-draws", "100", "--bootstrap.seed", "3"]
    main(load(EvaluateConfig, ["--checkpoint", str(run_dir / "policy"), *few]))
    out = run_dir / "evaluation"
    rollouts = [rollout for _, rollout in read_rollouts(out / "rollouts.jsonl")]
    assert len(rollouts) == 6
    assert all(len(rollout.response_ids) <= 5 for rollout in rollouts)
    assert rollouts[3].prompt_ids == tuple(TOKENIZER.encode("query 3 | title 3\n"))
    results = json.loads((out / "results.json").read_text())
    shown = capsys.readouterr().out
    assert "Macro F1" in shown
    assert str(run_dir / "config.toml") in shown

    assert set(results["by"]["query_type"]) == {"odd", "even"}
    assert results["confidence"]["num_draws"] == 100 and len(results["confidence"]["class_f1"]) == 4
    assert "95 % intervals from 100 draws of 6 queries" in shown

    for source in ("--rollouts", "--predictions"):  # what was written can be scored again, and scores the same
        file = out / f"{source[2:]}.jsonl"
        main(load(EvaluateConfig, [source, str(file), "--data", data.eval, *few, "--out", str(tmp_path / source)]))
        assert json.loads((tmp_path / source / "results.json").read_text()) == results
    argv = ["--rollouts", str(out / "rollouts.jsonl"), "--data", data.eval, "--limit", "2", "--out", str(tmp_path / "two")]
    main(load(EvaluateConfig, argv))
    assert "4 rollouts are of pairs that are not evaluated" in capsys.readouterr().out


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give one of"),
        (["--rollouts", "x", "--predictions", "y"], "give one of"),
        (["--checkpoint", "no/such"], "no such file or folder: no/such"),
        (["--rollouts", "FILE"], "no data"),
        (["--rollouts", "FILE", "--data", "DATA"], "is not a rollouts.jsonl"),
        (
            ["--rollouts", "FILE", "--data", "DATA", "--by", "query_type", "colour"],
            "nothing carries the tag 'colour'.*: query_type",
        ),
        (["--predictions", "PREDICTIONS", "--data", "DATA", "--limit", "1"], "are of no example of the data, such as other"),
        (["--rollouts", "FILE", "--data", "UNGRADED"], "e0 has no grade"),
    ],
)
def test_program_says_what_is_wrong(tmp_path: Path, argv: list[str], message: str):
    file = written(tmp_path / "x.jsonl", {"a": 1})
    write_examples(tmp_path / "d.jsonl", EXAMPLES)
    write_examples(tmp_path / "ungraded.jsonl", [replace(e, gold=(*e.gold[:4], None)) for e in EXAMPLES])
    told = written(tmp_path / "p.jsonl", *({"example_id": name, "prediction": 1} for name in ("e0", "e1", "other")))
    names = {"FILE": str(file), "DATA": str(tmp_path / "d.jsonl"), "PREDICTIONS": str(told)}
    names["UNGRADED"] = str(tmp_path / "ungraded.jsonl")
    with pytest.raises(ValueError, match=message):
        main(load(EvaluateConfig, [names.get(word, word) for word in argv]))
