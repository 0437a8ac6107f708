"""bench/gpu_proof: what lies in the folder of results and in the state folder, lost or not to be written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_modules import BENCH, proof_fixture

WRITES = "from gpu_proof.parts import write; write({'part': 'one', 'status': 'ok', 'figures': []}); "


proof = proof_fixture("program", "runner", "stages")


@pytest.fixture
def stage(proof: SimpleNamespace) -> Callable[..., Any]:
    """stage(name, code, lane) -> a Stage that runs Python code."""
    return lambda name, code, lane="gpu": proof.stages.Stage(name, lane, 1, 60, "", (sys.executable, "-c", code))


def statuses(path: Path) -> dict[str, str]:
    """The last status of each stage in a results.jsonl."""
    return {entry["stage"]: entry["status"] for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_what_a_stage_waits_for_runs_first_unless_it_is_there(proof: SimpleNamespace, stage: Any, tmp_path: Path) -> None:
    """`only` the user: its tool is built on a fresh machine, if it is lost, and if it is of other sources."""
    tool, order = tmp_path / "state" / "tool", []
    stages = [
        stage("other", WRITES, "cpu"),
        replace(stage("build", f"open({str(tool)!r}, 'w'); " + WRITES, "cpu"), products=("tool",)),
        replace(stage("user", f"open({str(tool)!r}); " + WRITES), after=("build",)),
    ]

    def ran(again: tuple[str, ...] = ("user",), key: str | None = None) -> list[str]:
        order.clear()
        state = tmp_path / "state"
        runner = proof.runner.Runner(
            stages, tmp_path / "out", state, dry_run=True, say=lambda entry: order.append(entry["stage"])
        )
        runner.key = key or runner.key
        runner.run(60, only=["user"], again=again)
        assert runner.entries["user"]["status"] == "ok"
        return list(order)

    assert ran() == ["build", "user"]
    assert ran() == ["user"]
    assert ran(again=()) == []
    tool.unlink()
    assert ran() == ["build", "user"]
    assert ran(key="other") == ["build", "user"]
    assert ran(again=(), key="third") == ["build", "user"]


def test_a_folder_that_is_gone_costs_neither_a_stage_nor_the_other_folder(
    proof: SimpleNamespace, stage: Any, tmp_path: Path
) -> None:
    """OUT goes first, then the folder of the logs, then the state folder, without which nothing can be run."""
    out, state, said = tmp_path / "out", tmp_path / "state", []
    removes = "import shutil; shutil.rmtree({!r}); " + WRITES.replace("{", "{{").replace("}", "}}")
    codes = {"one": removes.format(str(out)), "two": removes.format(str(state / "logs")), "three": WRITES}
    codes |= {"four": removes.format(str(state)), "five": WRITES}
    stages = [stage(name, code) for name, code in codes.items()]
    runner = proof.runner.Runner(stages, out, state, dry_run=True, say=lambda entry: None, warn=said.append)
    runner.run(60)
    found = {name: entry["status"] for name, entry in runner.entries.items()}
    assert found == {"one": "ok", "two": "ok", "three": "ok", "four": "failed", "five": "failed"}
    assert "its files cannot be written" in runner.entries["five"]["reason"]
    assert [line.partition(" cannot be written: ")[0] for line in said] == [str(out), str(state)]


def test_lines_of_the_state_folder_that_are_no_results_are_ignored(proof: SimpleNamespace, stage: Any, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    content = b'{"status": "ok"}\n7\n"stage"\n{"stage": "a", "status": "ok"}\n\xff\n{"st'
    (tmp_path / "state" / "results.jsonl").write_bytes(content)
    folders = (tmp_path / "out", tmp_path / "state")
    runner = proof.runner.Runner([stage("a", WRITES)], *folders, dry_run=True, say=lambda entry: None)
    assert runner.entries == {}
    runner.run(60)
    assert statuses(tmp_path / "out" / "results.jsonl") == {"a": "ok"}


@pytest.mark.parametrize("flag", ["--out", "--state"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, flag: str) -> None:
    folders = {"--out": str(tmp_path / "out"), "--state": str(tmp_path / "state"), flag: "/proc/none"}
    command = [sys.executable, str(BENCH / "gpu_proof"), "--dry-run", *(word for pair in folders.items() for word in pair)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "/proc/none" in done.stderr and "--out" in done.stderr


def test_the_summary_is_printed_if_it_cannot_be_written(
    proof: SimpleNamespace, stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "summary.txt").mkdir(parents=True)
    monkeypatch.setattr(proof.program, "STAGES", (stage("a", WRITES),))
    monkeypatch.setattr(proof.program.signal, "signal", lambda number, handler: None)
    assert proof.program.main(["--dry-run", "--out", str(tmp_path / "out"), "--state", str(tmp_path / "state")]) == 1
    printed = capsys.readouterr().out
    assert "1 ok, 0 failed" in printed and "summary.txt" in printed.splitlines()[-1]


def test_results_of_other_sources_prove_nothing_and_are_marked(
    proof: SimpleNamespace, stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof.program, "STAGES", (stage("card", WRITES), stage("tool", WRITES, "cpu")))
    monkeypatch.setattr(proof.program.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(proof.program, "CHART_S", 0.01)
    flags = ["--dry-run", "--out", str(tmp_path / "out"), "--state", str(tmp_path / "state")]

    def is_fresh() -> dict[str, bool]:
        content = json.loads((tmp_path / "out" / "dry-run.json").read_text(encoding="utf-8"))
        return {name: stage["sources"] == content["sources"] for name, stage in content["stages"].items()}

    assert proof.program.main(flags) == 0
    assert is_fresh() == {"card": True, "tool": True}
    monkeypatch.setattr(proof.runner, "key_of", lambda dry_run: "other")
    assert proof.program.main([*flags, "--only", "tool"]) == 1
    assert is_fresh() == {"card": False, "tool": True}
    assert statuses(tmp_path / "out" / "results.jsonl") == {
        "card": "ok",
        "tool": "ok",
    }
