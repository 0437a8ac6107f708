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
from srpo.evaluate import EvaluateConfig, evaluate_policy, main, read_predictions, score_predictions, score_rollouts
from srpo.policy.model import TinyConfig, make_tiny, save_policy
from srpo.rollout.engine import Sample, SamplingParams
from srpo.rollout.local import LocalEngine
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

    def generate(self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int) -> list[Sample]:
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
    assert results["by_query_type"]["even"]["accuracy"] == 1.0


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


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_predictions_are_scored_as_verdicts_alone(tmp_path: Path):
    rows = [{"example_id": e.example_id, "prediction": e.grade if i else None} for i, e in enumerate(EXAMPLES)]
    results = score_predictions(read_predictions(written(tmp_path / "p.jsonl", *rows)), EXAMPLES)
    assert (results["accuracy"], results["parse_rate"], results["step_accuracy"]) == (0.9, 0.9, [0.9])
    assert results["by_query_type"]["odd"]["macro_f1"] == 0.5  # odd pairs have grades 2 and 4 only


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 2"),
        ({"example_id": "e1"}, "line 2.*prediction"),
        ([1], "line 2"),
        ({"example_id": "e1", "prediction": 5}, "line 2.*prediction is 5"),
        ({"example_id": "e1", "prediction": "L4"}, "line 2.*give 1, 2, 3, 4"),
        ({"example_id": "e1", "prediction": True}, "line 2.*give 1, 2, 3, 4"),
        ({"example_id": "e0", "prediction": 2}, "line 2.*second prediction of 'e0'"),
    ],
)
def test_bad_prediction_lines_name_file_and_line(tmp_path: Path, row: Any, message: str):
    with pytest.raises(ValueError, match=rf"p\.jsonl, {message}"):
        read_predictions(written(tmp_path / "p.jsonl", {"example_id": "e0", "prediction": 1}, row))


def test_every_example_needs_an_answer_and_others_are_left_out():
    _, rollouts = evaluated(Scripted())
    with pytest.raises(ValueError, match="9 of 10 examples have no prediction, such as e1"):
        score_predictions({"e0": 1}, EXAMPLES)
    with pytest.raises(ValueError, match="1 of 10 examples have no rollout, such as e9"):
        score_rollouts(rollouts[:9], EXAMPLES, SCHEMA)
    with pytest.raises(ValueError, match="has 5 steps, the settings have 1"):
        score_rollouts(rollouts, EXAMPLES, StepSchema(PAPER_STEPS[-1:]))
    results, used = score_rollouts([*rollouts, rollouts[0]], EXAMPLES[:2], SCHEMA)
    assert [rollout.example_id for rollout in used] == ["e0", "e1", "e0"]
    assert results["num_examples"] == 3


def test_program_decodes_a_checkpoint_with_the_settings_of_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    write_examples(tmp_path / "held_out.jsonl", EXAMPLES)
    model = make_tiny(TOKENIZER, TinyConfig(hidden_size=32, num_layers=1, head_dim=8, num_experts=2, expert_size=16), seed=0)
    save_policy(model, TOKENIZER, run_dir / "policy")
    data = DataConfig(eval=str(tmp_path / "held_out.jsonl"), prompt=TEMPLATE)
    (run_dir / "config.toml").write_text(dump_toml(replace(Config(), data=data, rollout=RolloutConfig(max_new_tokens=5))))
    main(load(EvaluateConfig, ["--checkpoint", str(run_dir / "policy"), "--limit", "6"]))
    out = run_dir / "evaluation"
    rollouts = [rollout for _, rollout in read_rollouts(out / "rollouts.jsonl")]
    assert len(rollouts) == 6
    assert all(len(rollout.response_ids) <= 5 for rollout in rollouts)
    assert rollouts[3].prompt_ids == tuple(TOKENIZER.encode("query 3 | title 3\n"))
    results = json.loads((out / "results.json").read_text())
    shown = capsys.readouterr().out
    assert "Macro F1" in shown
    assert str(run_dir / "config.toml") in shown

    for source in ("--rollouts", "--predictions"):  # what was written can be scored again, and scores the same
        file = out / f"{source[2:]}.jsonl"
        main(load(EvaluateConfig, [source, str(file), "--data", data.eval, "--limit", "6", "--out", str(tmp_path / source)]))
        again = json.loads((tmp_path / source / "results.json").read_text())
        assert again["confusion"] == results["confusion"]
        if source == "--rollouts":
            assert again == results


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give one of"),
        (["--rollouts", "x", "--predictions", "y"], "give one of"),
        (["--checkpoint", "no/such"], "no such file or folder: no/such"),
        (["--rollouts", "FILE"], "no data"),
        (["--rollouts", "FILE", "--data", "DATA"], "is not a rollouts.jsonl"),
    ],
)
def test_program_says_what_is_wrong(tmp_path: Path, argv: list[str], message: str):
    file = written(tmp_path / "x.jsonl", {"a": 1})
    write_examples(tmp_path / "d.jsonl", EXAMPLES)
    names = {"FILE": str(file), "DATA": str(tmp_path / "d.jsonl")}
    with pytest.raises(ValueError, match=message):
        main(load(EvaluateConfig, [names.get(word, word) for word in argv]))
