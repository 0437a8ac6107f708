from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_world as small
from transformers import AutoModelForCausalLM, AutoTokenizer

import srpo.demo
from srpo.core.config.demo import DemoConfig
from srpo.core.config.train import Config
from srpo.core.settings import apply_toml
from srpo.core.step_presets import PAPER
from srpo.data.pairs import read_pairs
from srpo.data.readers import load_examples
from srpo.data.tokenizer import load_tokenizer
from srpo.demo import demo, train_config
from srpo.experiments.start import PHRASES, stage, strip


def settings(run_dir: Path, **changes: Any) -> DemoConfig:
    cfg = DemoConfig(
        run_dir=str(run_dir),
        num_demonstrations=400,
        num_train=64,
        num_eval=24,
        vocab_size=600,
        model=small.TINY,
        sft_steps=100,
        sft_batch=16,
        sft_lr=1e-2,
        rl_steps=3,
        num_prompts=4,
        group_size=4,
        max_new_tokens=64,
        eval_every=2,
    )
    return replace(cfg, **changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a whole demo."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    srpo.demo.main(settings(folder))
    return folder


def test_the_run_folder_holds_what_its_page_says(done: Path) -> None:
    files = {path.name for path in done.iterdir()}
    assert files >= {"config.toml", "metrics.jsonl", "rollouts.jsonl", "policy", "results.json", "plots", "checkpoints", "data"}
    plots = {path.name for path in (done / "plots").iterdir()}
    assert plots >= {"rewards.png", "macro_f1.png", "entropy.png", "mismatch_kl.png", "confusion.png"}
    assert [line["step"] for line in small.metrics_of(done)] == [1, 2, 3]
    assert AutoModelForCausalLM.from_pretrained(done / "policy", attn_implementation="sdpa").num_parameters() > 10_000
    assert AutoTokenizer.from_pretrained(done / "policy").eos_token_id is not None
    assert not list(done.rglob("*.tmp"))


def test_results_have_their_form(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())
    assert results["seed"] == 0
    for scores in (results["before"], results["after"]):
        assert len(scores["class_f1"]) == 4 and len(scores["step_accuracy"]) == 5 and scores["num_examples"] == 24
        singles = [scores[key] for key in ("macro_f1", "accuracy", "good_f1", "parse_rate")]
        assert all(0 <= value <= 1 for value in (*singles, *scores["class_f1"], *scores["step_accuracy"]))
    assert results["before"]["parse_rate"] > 0.2  # the warm start has taught the format


def test_its_training_stage_is_a_run_like_any_other(done: Path) -> None:
    """`python -m srpo.train @ runs/demo/config.toml`"""
    cfg = apply_toml(Config(), done / "config.toml")
    assert cfg == train_config(apply_toml(DemoConfig(), done / "demo" / "config.toml"), done / "sft" / "policy")


def test_held_out_queries_are_never_shown(done: Path) -> None:
    shown = {prompt.split("\n")[0].removeprefix("Query: ") for prompt, _ in read_pairs(done / "data" / "sft.jsonl")}
    trained = {e.query for e in load_examples(done / "data" / "train.jsonl", PAPER)}
    held_out = {e.query for name in ("eval", "eval_balanced") for e in load_examples(done / "data" / f"{name}.jsonl", PAPER)}
    assert len(shown) > 50 and len(held_out) > 5
    assert not held_out & (shown | trained)


def test_fixed_texts_are_one_token(done: Path) -> None:
    tokenizer = load_tokenizer(done / "policy")
    prompt, response = next(read_pairs(done / "data" / "sft.jsonl"))
    ids = tokenizer.encode(prompt + response, add_special_tokens=False)
    assert tokenizer.decode(ids) == prompt + response
    assert sum(phrase in prompt + response for phrase in PHRASES) >= 7
    for phrase in PHRASES:
        assert len(tokenizer.encode(phrase, add_special_tokens=False)) == 1
        assert phrase not in strip(prompt + response)


def test_a_demo_that_was_stopped_goes_on_and_ends_the_same(done: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(done, run_dir)
    for name in ("config.toml", "sft/config.toml", "demo/config.toml"):  # these contain the path of the run folder
        path = run_dir / name
        path.write_text(path.read_text().replace(str(done), str(run_dir)))
    for name in ("policy", "plots", "checkpoints"):
        shutil.rmtree(run_dir / name)
    for name in ("after.json", "results.json", "metrics.jsonl", "rollouts.jsonl"):
        (run_dir / name).unlink()
    modified = (run_dir / "data" / "sft.jsonl").stat().st_mtime_ns
    results = demo(settings(run_dir), small.ONE)
    assert (run_dir / "data" / "sft.jsonl").stat().st_mtime_ns == modified
    want = json.loads((done / "results.json").read_text())
    assert (results["before"], results["after"]) == (want["before"], want["after"])
    assert (run_dir / "metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()
    assert small.same_bits(*(small.parameters_of(folder / "policy") for folder in (run_dir, done)))


def test_other_settings_need_another_folder(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = small.complaint(srpo.demo.main, settings(done, seed=1), tmp_path, capsys)
    assert "holds a run with seed = 0, this one has 1: give another run_dir" in line


def test_a_stage_appears_when_it_is_whole_and_is_made_once(tmp_path: Path) -> None:
    calls = []

    def make(out: Path) -> None:
        calls.append(out)
        (out / "a").write_text("a")
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "x" / "data", "making", make)
    assert not (tmp_path / "x" / "data").exists()
    stage(tmp_path / "x" / "data", "making", make)
    stage(tmp_path / "x" / "data", "making", make)
    assert len(calls) == 2 and [path.name for path in (tmp_path / "x").iterdir()] == ["data"]
