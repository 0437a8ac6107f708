from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_world as small
import torch

from srpo.core.batch import Rollout, read_rollouts
from srpo.core.config.demo import TinyConfig
from srpo.core.config.evaluation import BootstrapConfig, EvaluateConfig
from srpo.core.config.train import Config, DataConfig, PolicyConfig, RolloutConfig, VllmConfig
from srpo.core.settings import dump_toml, load
from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm
from srpo.data.readers import write_examples
from srpo.data.tokenizer import train_tokenizer
from srpo.evaluate import evaluate, main
from srpo.policy.model import make_tiny, save_policy
from srpo.rollout.engine import Sample, SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.training.evaluation import evaluate_policy

SCHEMA = PAPER
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
    """An engine that answers prompt i with grade 1 + i % 4, and prompt 9 with an empty text."""

    policy_version = 7
    max_context = 500

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
    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


class Ranks:
    """Threads in place of ranks; `shares` holds the object that each passed to its last all_gather_object."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.shares = world_size, dict[int, Any]()
        self.barrier = threading.Barrier(world_size, timeout=60)

    def run(self, program: Callable[[Any], Any]) -> list[Any]:
        """The return value of `program(parallel)` on each rank."""
        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(lambda rank: program(self.parallel(rank)), range(self.world_size)))

    def parallel(self, rank: int) -> Any:
        gather = partial(self.all_gather_object, rank)
        return SimpleNamespace(
            rank=rank, world_size=self.world_size, is_main=rank == 0, device=torch.device("cpu"), all_gather_object=gather
        )

    def all_gather_object(self, rank: int, x: Any) -> list[Any]:
        self.shares[rank] = x
        self.barrier.wait()
        return [self.shares[r] for r in range(self.world_size)]


def evaluated(engine: Any, **changes: Any) -> tuple[dict[str, Any], list[Rollout]]:
    options = {"form": PromptForm(TEMPLATE), "max_new_tokens": 40, "batch_size": 4, **changes}
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
    ranks = Ranks(world_size)
    evaluations = ranks.run(lambda parallel: evaluated(Scripted(), parallel=parallel))
    assert evaluations == [evaluated(Scripted())] * world_size
    assert [len(ranks.shares[r]) for r in range(world_size)] == [len(range(r, 10, world_size)) for r in range(world_size)]


def test_local_engine_answers_the_same_whatever_the_batches():
    model = make_tiny(TOKENIZER, TinyConfig(hidden_size=32, num_layers=1, head_dim=8, num_experts=2, expert_size=16), seed=1)
    (results, fours), (same, tens) = (evaluated(LocalEngine(model), max_new_tokens=6, batch_size=n) for n in (4, 10))
    assert results == same
    for a, b in zip(fours, tens, strict=True):  # shapes change the order of sums, and so the rounding of log-probabilities
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

    for source in ("--rollouts", "--predictions"):  # the written files can be scored again, with the same results
        file = out / f"{source[2:]}.jsonl"
        main(load(EvaluateConfig, [source, str(file), "--data", data.eval, *few, "--out", str(tmp_path / source)]))
        again = json.loads((tmp_path / source / "results.json").read_text())
        assert again == {key: value for key, value in results.items() if key != "ranking"}  # which needs the checkpoint
    argv = ["--rollouts", str(out / "rollouts.jsonl"), "--data", data.eval, "--limit", "2", "--out", str(tmp_path / "two")]
    main(load(EvaluateConfig, argv))
    assert "left out 4 rollouts of pairs that are not evaluated" in capsys.readouterr().out


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
        (["--rollouts", "FILE", "--data", "DATA"], "x.jsonl, line 1: .*give a line of a rollouts.jsonl"),
        (
            ["--rollouts", "FILE", "--data", "DATA", "--by", "query_type", "colour"],
            "nothing carries the tag 'colour'.*: query_type",
        ),
        (["--predictions", "PREDICTIONS", "--data", "DATA", "--limit", "1"], "have no example in the data, such as other"),
        (["--rollouts", "FILE", "--data", "UNGRADED"], "e0 has no grade"),
        (["--rollouts", "FILE", "--data", "DATA", "--engine", "vllm"], "engine is vllm, but only a checkpoint is decoded"),
        (["--rollouts", "FILE", "--data", "DATA", "--out", "FILE"], "out is .*x.jsonl, which is a file"),
        (["--rollouts", "FILE", "--data", "DATA", "--out", "RUN"], "out is .*run, the folder of a run .metrics.jsonl is there"),
        (["--rollouts", "TAKEN", "--data", "DATA", "--out", "OUT"], "out is .*out, where .*rollouts.jsonl is read from"),
    ],
)
def test_program_says_what_is_wrong(tmp_path: Path, argv: list[str], message: str):
    file = written(tmp_path / "x.jsonl", {"a": 1})
    write_examples(tmp_path / "d.jsonl", EXAMPLES)
    write_examples(tmp_path / "ungraded.jsonl", [replace(e, gold=(*e.gold[:4], None)) for e in EXAMPLES])
    predictions = written(tmp_path / "p.jsonl", *({"example_id": name, "prediction": 1} for name in ("e0", "e1", "other")))
    names = {"FILE": str(file), "DATA": str(tmp_path / "d.jsonl"), "PREDICTIONS": str(predictions)}
    (tmp_path / "run").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    names |= {"RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "out")}
    names["TAKEN"] = str(written(tmp_path / "out" / "rollouts.jsonl", {"a": 1}))
    names["UNGRADED"] = str(tmp_path / "ungraded.jsonl")
    with pytest.raises(ValueError, match=message):
        main(load(EvaluateConfig, [names.get(word, word) for word in argv]))


@pytest.mark.parametrize("mode", ["--rollouts", "--predictions"])
def test_what_decodes_nothing_is_refused_to_several_processes(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"start srpo\.evaluate with --rollouts or --predictions without torchrun"):
        main(load(EvaluateConfig, [mode, str(written(tmp_path / "x.jsonl", {"a": 1}))]))


def checkpoint_of(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """(checkpoint of a run with 24 new tokens and the policy settings `changes`, file of pairs)."""
    torch.manual_seed(4)
    size = TinyConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, num_experts=4, expert_size=64)
    model = make_tiny(TOKENIZER, size, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    save_policy(model, TOKENIZER, folder / "run" / "policy")
    write_examples(folder / "held_out.jsonl", EXAMPLES)
    run = replace(Config(), policy=PolicyConfig(**changes), data=DataConfig(prompt=TEMPLATE))
    (folder / "run" / "config.toml").write_text(dump_toml(replace(run, rollout=RolloutConfig(max_new_tokens=24))))
    return folder / "run" / "policy", folder / "held_out.jsonl"


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The printed lines without the progress bar, which counts only a rank's own share."""
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("evaluation ")]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_of_several_ranks_the_first_one_writes_what_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    checkpoint, data = checkpoint_of(tmp_path)
    monkeypatch.setattr("srpo.evaluate.open_engine", lambda *_: Scripted())
    # These ranks are threads, and transformers loads a model safely in one thread of a process alone: no ranking.
    cfg = EvaluateConfig(checkpoint=str(checkpoint), data=str(data), bootstrap=BootstrapConfig(num_draws=20), ranking=False)
    main(replace(cfg, out=str(tmp_path / "one")))
    one = printed(capsys)
    Ranks(3).run(lambda parallel: evaluate(replace(cfg, out=str(tmp_path / str(parallel.rank))), parallel))
    assert printed(capsys) == [line.replace(str(tmp_path / "one"), str(tmp_path / "0")) for line in one]
    assert files(tmp_path / "0") == files(tmp_path / "one") and len(files(tmp_path / "one")) == 3
    assert not (tmp_path / "1").exists() and not (tmp_path / "2").exists()


def test_a_prompt_that_does_not_fit_stops_every_rank_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Although the prompt is in the share of one rank only."""
    checkpoint, data = checkpoint_of(tmp_path)
    write_examples(data, [*EXAMPLES, replace(EXAMPLES[0], example_id="long", title="title " * 200)])
    engines = [Scripted(), Scripted()]
    monkeypatch.setattr("srpo.evaluate.open_engine", lambda *args: engines[args[-1].rank])

    def refused(parallel: Any) -> str:
        with pytest.raises(ValueError, match="the prompt of example long has") as error:
            evaluate(EvaluateConfig(checkpoint=str(checkpoint), data=str(data), out=str(tmp_path / "out")), parallel)
        return str(error.value)

    assert len(Ranks(2).run(refused)) == 2
    assert not engines[0].calls and not engines[1].calls and not (tmp_path / "out").exists()


def test_vllm_starts_from_the_checkpoint_with_settings_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint, data = checkpoint_of(tmp_path, dtype="bfloat16", max_context=222)
    opened: list[Any] = []
    monkeypatch.setattr("srpo.evaluate.open_vllm", lambda *args, **options: (opened.append((args, options)), Scripted())[1])
    argv = ["--checkpoint", str(checkpoint), "--data", str(data), "--engine", "vllm", "--bootstrap.num-draws", "0"]
    main(load(EvaluateConfig, [*argv, "--vllm.max-num-seqs", "17"]))
    ((path, parallel), options) = opened[0]
    assert (path, parallel.world_size) == (str(checkpoint), 1)
    assert options == {"dtype": torch.bfloat16, "max_context": 222, "config": VllmConfig(max_num_seqs=17, gpu_memory_frac=0.85)}
    assert json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["accuracy"] == 0.9


@pytest.mark.parametrize(
    ("flag", "message"),
    [("max-num-seqs", r"^vllm\.max_num_seqs is 0: set"), ("tensor-parallel-size", r"^vllm\.tensor_parallel_size is 0: set")],
)
def test_settings_of_vllm_are_called_by_their_names(tmp_path: Path, flag: str, message: str):
    checkpoint, data = checkpoint_of(tmp_path)
    with pytest.raises(ValueError, match=message):
        argv = ["--checkpoint", str(checkpoint), "--data", str(data), "--engine", "vllm", f"--vllm.{flag}", "0"]
        main(load(EvaluateConfig, argv))


def test_ranks_that_cannot_share_a_vllm_are_told(tmp_path: Path):
    checkpoint, data = checkpoint_of(tmp_path)
    argv = ["--checkpoint", str(checkpoint), "--data", str(data), "--engine", "vllm", "--vllm.tensor-parallel-size", "2"]
    with pytest.raises(ValueError, match=r"^vllm\.tensor_parallel_size is 2, and host .* has 1 ranks"):
        main(load(EvaluateConfig, argv))


def answers(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    return [(rollout.example_id, rollout.response_ids) for _, rollout in read_rollouts(folder / "rollouts.jsonl")]


@pytest.mark.slow
def test_two_processes_decode_what_one_does(tmp_path: Path):
    checkpoint, data = checkpoint_of(tmp_path)
    cfg = EvaluateConfig(checkpoint=str(checkpoint), data=str(data), bootstrap=BootstrapConfig(num_draws=20))
    main(replace(cfg, out=str(tmp_path / "one")))
    small.Program("srpo.evaluate", replace(cfg, out=str(tmp_path / "two")), tmp_path, num_ranks=2).finish()
    assert answers(tmp_path / "two") == answers(tmp_path / "one") and len(answers(tmp_path / "one")) == 10
    assert (tmp_path / "two" / "results.json").read_text() == (tmp_path / "one" / "results.json").read_text()
    assert (tmp_path / "output.txt").read_text().count("written to") == 1


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_vllm_decodes_what_the_local_engine_does(tmp_path: Path, num_ranks: int):
    """With the real vLLM; two processes share one engine with tensor_parallel_size 2."""
    checkpoint, data = checkpoint_of(tmp_path, max_context=256)
    cfg = EvaluateConfig(checkpoint=str(checkpoint), data=str(data), bootstrap=BootstrapConfig(num_draws=0))
    main(replace(cfg, out=str(tmp_path / "local")))
    vllm = VllmConfig(kv_cache_mib=64, max_num_seqs=16, timeout_s=120, tensor_parallel_size=num_ranks)
    cfg = replace(cfg, out=str(tmp_path / "vllm"), engine="vllm", vllm=vllm)
    small.Program("srpo.evaluate", cfg, tmp_path, num_ranks).finish(timeout=280)
    assert answers(tmp_path / "vllm") == answers(tmp_path / "local")
    assert len({ids for _, ids in answers(tmp_path / "local")}) > 5  # equal answers to all pairs would prove nothing
