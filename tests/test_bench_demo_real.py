"""bench/demo_real: its stages run on a small policy and go on where they were; its summary is that of independent formulas."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t
from small_world import SmallWorld

from srpo.core.step_presets import PAPER
from srpo.data.readers import load_examples, write_examples
from srpo.data.world import World

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return import_module


def test_every_chain_begins_with_its_data_and_no_folder_is_made_by_two(bench: Any) -> None:
    plan = bench("demo_real.plan")
    sizes = plan.Sizes()
    chains = plan.chains(["a/esci/pairs.jsonl.gz", "b/mine.csv"], sizes)
    names = [chain[0].part.name for chain in chains]
    assert len(set(names)) == len(names) and {"esci-0", "mine-3", "esci-0-all", "mine-0-0.25"} <= set(names)
    assert all(chain[0].kind == "data" and len({stage.part for stage in chain}) == 1 for chain in chains)
    whole = [[stage.kind for stage in chain] for chain in chains if chain[0].part.share == 1 and not chain[0].part.all_weights]
    assert whole.count(["data", "sft", "grpo", "srpo"]) == 6 and whole.count(["data", "as_it_is", "sft", "grpo", "srpo"]) == 2
    assert all(stage.cost(sizes) > 0 for chain in chains for stage in chain)


@pytest.mark.parametrize("num", [2, 4, 10])
def test_intervals_are_those_of_students_t(bench: Any, num: int) -> None:
    values = [random.gauss(50, 10) for _ in range(num)]
    found = bench("demo_real.report").mean_interval(values)
    low, high = t.interval(0.95, num - 1, statistics.mean(values), statistics.stdev(values) / num**0.5)
    assert found["mean"] == pytest.approx((low + high) / 2) and found["half"] == pytest.approx((high - low) / 2, rel=1e-3)


def test_one_split_has_no_interval(bench: Any) -> None:
    assert bench("demo_real.report").mean_interval([50.0])["half"] is None


def test_gains_are_over_the_best_regression_on_the_same_split(bench: Any) -> None:
    plan, report = bench("demo_real.plan"), bench("demo_real.report")

    def scores(macro_f1: float) -> dict[str, Any]:
        return {"macro_f1": macro_f1, "accuracy": 0.5, "parse_rate": 1.0, "step_accuracy": [None, None, macro_f1, 0.9, 0.5]}

    results = {
        plan.Part("x.csv", seed): {
            "baselines": {"majority": scores(0.9), "words": scores(0.3 + 0.1 * seed), "overlap": scores(0.2)},
            "sft": scores(0.4),
            "grpo": scores(0.4),
            "srpo": scores(0.5),
            **({"as_it_is": scores(0.1)} if seed == 0 else {}),
        }
        for seed in (0, 1)
    }
    results[plan.Part("x.csv", 2)] = {"baselines": {"majority": scores(0.0)}, "sft": scores(0.0)}  # not done: left out
    some = {"sft": scores(0.35), "srpo": scores(0.45), "baselines": results[plan.Part("x.csv", 0)]["baselines"]}
    results[plan.Part("x.csv", 0, all_weights=True)] = some
    summary = report.summarize(results, "x.csv")
    assert summary["best_regression"] == "words" and summary["num_splits"] == 2
    assert summary["rows"]["sft"]["gain"]["values"] == pytest.approx([10.0, 0.0])
    assert summary["rows"]["srpo"]["gain"]["values"] == pytest.approx([20.0, 10.0])
    assert summary["rows"]["as_it_is"]["gain"]["values"] == pytest.approx([-20.0])
    assert summary["rows"]["srpo"]["over_sft"]["values"] == pytest.approx([10.0, 10.0])
    assert summary["rows"]["srpo"]["S3"]["values"] == pytest.approx([50.0, 50.0]) and "S3" not in summary["rows"]["as_it_is"]
    assert summary["rows"]["srpo, all weights"]["gain"]["values"] == pytest.approx([15.0])
    text = report.table(summary, "x.csv")
    assert "-20.0" in text and "best regression: words" in text
    assert "after SRPO, all weights (1 split)" in text
    alone = report.summarize({part: found for part, found in results.items() if part.all_weights}, "x.csv")
    assert alone["num_splits"] == 1 and alone["rows"].keys() >= {"majority", "words", "sft, all weights"}


def test_two_files_of_one_name_are_refused(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their results would lie in one folder, and the second would be taken for the first."""
    files = [str(tmp_path / folder / "mine.csv") for folder in ("a", "b")]
    monkeypatch.setattr(sys, "argv", ["demo_real", "--model", "none", "--runs", str(tmp_path / "runs"), *files])
    with pytest.raises(SystemExit, match="two files have the name mine"):
        bench("demo_real.program").main()


def test_a_folder_is_of_one_model_and_one_set_of_columns(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both decide what the results say, and neither is part of the folders' names."""
    program = bench("demo_real.program")
    (tmp_path / "mine.csv").write_text("q,t,g\nmug,blue mug,4\n")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": name}))
    ran: list[Any] = []
    monkeypatch.setattr(program, "run_all", lambda *args: ran.append(args))
    monkeypatch.setattr(program, "report", lambda *_: None)

    def start(model: str, *columns: str) -> None:
        command = ["--model", str(tmp_path / model), "--runs", str(tmp_path / "runs"), "--columns", *columns]
        monkeypatch.setattr(sys, "argv", ["demo_real", str(tmp_path / "mine.csv"), *command])
        program.main()

    start("a", "query=q")
    with pytest.raises(SystemExit, match="the columns"):
        start("a", "query=q", "title=t")
    with pytest.raises(SystemExit, match="the model"):
        start("b", "query=q")
    start("a", "query=q")
    assert len(ran) == 2


PARENT = """
import multiprocessing, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(__file__).parent)]  # the second is no default under PYTHONSAFEPATH
from demo_real.program import end_with_parent
import demo_real_worker
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        pool.submit(demo_real_worker.work, sys.argv[2]).result()
"""
WORKER = """
import os, time
from pathlib import Path
def work(path):
    Path(path + ".part").write_text(str(os.getpid()))
    os.rename(path + ".part", path)
    time.sleep(600)
"""


def test_a_stage_ends_with_the_program(tmp_path: Path) -> None:
    """A killed program leaves no process behind that writes into its folders."""
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "demo_real_worker.py").write_text(WORKER)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(BENCH), str(tmp_path / "pid")], cwd=tmp_path)
    while not (tmp_path / "pid").is_file():
        assert parent.poll() is None
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while Path(f"/proc/{pid}/status").is_file() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        time.sleep(0.05)  # the test's time-out is the limit


def test_a_part_from_pairs_to_the_report(bench: Any, world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT, GRPO and SRPO of a part; the second time nothing is trained again; then table, plot and examples."""
    plan, training, report, examples = (bench(f"demo_real.{name}") for name in ("plan", "training", "report", "examples"))
    pairs = tmp_path / "mine.jsonl"
    graded = (replace(e, gold=(None,) * 4 + e.gold[4:], truth=(None,) * 5) for e in World(3).examples("balanced", 80))
    write_examples(pairs, graded)
    sizes = replace(plan.TINY, splits=1, num_eval=6, shares=(), curve_splits=1, all_splits=0, num_world=4)
    (chain,) = plan.chains([str(pairs)], sizes)
    for stage in chain:
        assert not stage.is_done(tmp_path / "runs")
        training.run_stage(stage, sizes, str(world.policy), tmp_path / "runs", {})
        assert stage.is_done(tmp_path / "runs")
    folder = tmp_path / "runs" / "mine-0"
    files = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    monkeypatch.setattr(training, "demonstrate", lambda *_: pytest.fail("demonstrations are made again"))
    for stage in chain:
        training.run_stage(stage, sizes, str(world.policy), tmp_path / "runs", {})
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == files

    found = {chain[0].part: training.results_of(chain[0].part, tmp_path / "runs")}
    assert {"baselines", "as_it_is", "sft", "grpo", "srpo", "num_queries"} == found[chain[0].part].keys()
    trained, real, held_out = (load_examples(folder / "data" / f"{name}.jsonl", PAPER) for name in ("train", "pairs", "eval"))
    assert len(trained) == len(real) + 4 and not {pair.query for pair in real} & {pair.query for pair in held_out}
    assert all(pair.gold[2] and pair.gold[3] for pair in (*trained, *held_out))  # read off the pair
    methods = {kind: json.loads((folder / kind / "rollouts.jsonl").read_text().splitlines()[0]) for kind in ("grpo", "srpo")}
    assert methods["grpo"]["text"] and methods["srpo"]["reward_sources"][4] in ("gold", "missing")
    summary = report.summarize(found, str(pairs))
    curve = report.curve(found, str(pairs), sizes)
    assert [point["num_queries"] for point in curve] == [len({pair.query_id for pair in real})]
    report.plot(tmp_path / "plot.png", {"mine": {"summary": summary, "curve": curve}})
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert not examples.write_examples_of([str(pairs)], sizes, tmp_path / "elsewhere", tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()
    assert examples.write_examples_of([str(pairs)], sizes, tmp_path / "runs", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page.count("People: L") == len(page.split("**")[1::2]) > 0
