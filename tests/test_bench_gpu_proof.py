"""bench/gpu_proof: the runner keeps what it has measured, whatever a stage does: fail, hang, print nonsense, come too late."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_modules import BENCH, proof_fixture

WRITES = "from gpu_proof.parts import write; write({'part': 'one', 'status': 'ok', 'figures': []}); "
SKIPS = "from gpu_proof.parts import write; write({'skip': 'no such card'})"
# Starts a process in a session of its own, writes its id, and waits.
HANGS = (
    "import subprocess, sys, time, pathlib; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); "
    "pathlib.Path(sys.argv[1]).write_text(str(child.pid)); print('waiting', flush=True); time.sleep(600)"
)


proof = proof_fixture("runner", "stages", "processes", "summary", "program", "parts")


@pytest.fixture
def make(proof: SimpleNamespace, tmp_path: Path) -> Any:
    """make(name=code or (code, *arguments), ...) -> a Runner with these stages in the lane "gpu"."""

    def runner(out: str = "out", caps: dict[str, float] | None = None, **codes: Any) -> Any:
        stages = []
        for name, code in codes.items():
            code, *arguments = (code,) if isinstance(code, str) else code
            command = (sys.executable, "-u", "-c", code, *arguments)
            stages.append(proof.stages.Stage(name, "gpu", 1, (caps or {}).get(name, 60), "", command))
        return proof.runner.Runner(stages, tmp_path / out, tmp_path / "state", dry_run=True, say=lambda entry: None)

    return runner


def lines(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of each stage in a results.jsonl."""
    return {entry["stage"]: entry for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_a_stage_that_ends_and_one_that_fails(make: Any, tmp_path: Path) -> None:
    make(good=WRITES + "print('fine')", bad="print('boom'); raise SystemExit(3)", silent="pass", absent=SKIPS).run(60)
    found = lines(tmp_path / "out" / "results.jsonl")
    assert {name: entry["status"] for name, entry in found.items()} == {
        "good": "ok",
        **{"bad": "failed", "silent": "failed", "absent": "skipped"},
    }
    assert found["good"]["parts"] == [{"part": "one", "status": "ok", "figures": []}]
    assert found["bad"]["code"] == 3 and "boom" in found["bad"]["tail"] and "exit code 3" in found["bad"]["reason"]
    assert "without a result" in found["silent"]["reason"] and found["absent"]["reason"] == "no such card"
    logs = (tmp_path / "out" / "logs.txt").read_text(encoding="utf-8")
    assert "fine" in logs and "boom" in logs


def running(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stage_that_hangs_shows_its_stacks_and_dies_with_its_children(make: Any, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    make(hangs=(WRITES + HANGS, str(pid)), next=WRITES, caps={"hangs": 2}).run(90)
    found = lines(tmp_path / "out" / "results.jsonl")
    assert found["hangs"]["status"] == "failed" and "limit" in found["hangs"]["reason"]
    assert len(found["hangs"]["parts"]) == 1  # what it found before
    assert "Aborted" in found["hangs"]["tail"] and 'File "<string>", line 1' in found["hangs"]["tail"]
    assert not running(int(pid.read_text()))
    assert found["next"]["status"] == "ok"


def test_children_of_a_stage_that_has_ended_die_too(make: Any, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    make(leaves=(WRITES + HANGS.rpartition("print")[0], str(pid))).run(60)
    assert lines(tmp_path / "out" / "results.jsonl")["leaves"]["status"] == "ok"
    assert not running(int(pid.read_text()))


def test_nonsense_is_kept_out_of_the_results(make: Any, tmp_path: Path) -> None:
    half = "import os; open(os.environ['GPU_PROOF_RESULT'], 'a').write('{\"part\": \"tw')"
    noise = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 1000 + b'\\n{\\n'); "
    make(noisy=noise + WRITES + half, only_noise=noise).run(60)
    found = lines(tmp_path / "out" / "results.jsonl")
    assert found["noisy"]["status"] == "ok" and len(found["noisy"]["parts"]) == 1
    assert found["only_noise"]["status"] == "failed"
    assert (tmp_path / "out" / "logs.txt").stat().st_size < 400_000


def test_the_deadline_cuts_and_the_next_call_goes_on(
    make: Any, tmp_path: Path, proof: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "count"
    counts = f"p = __import__('pathlib').Path({str(counter)!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x'); "
    slow = "import time; time.sleep(60); "
    monkeypatch.setattr(proof.runner, "LEAST_S", 1.0)
    make(first=counts + WRITES, second=slow + WRITES, third=WRITES).run(proof.runner.END_S + 6)
    found = lines(tmp_path / "out" / "results.jsonl")
    assert {name: entry["status"] for name, entry in found.items()} == {"first": "ok", "second": "cut", "third": "cut"}
    assert "no time was left" in found["third"]["reason"]
    make("again", first=counts + WRITES, second=WRITES, third=WRITES).run(60)
    assert {name: entry["status"] for name, entry in lines(tmp_path / "again" / "results.jsonl").items()} == dict.fromkeys(
        ("first", "second", "third"), "ok"
    )
    assert counter.read_text() == "x"  # passed in the first call, and its line came along
    make("third", first=counts + WRITES, second=WRITES, third=WRITES).run(60, only=["first"], again=["first"])
    assert counter.read_text() == "xx"


def test_what_passed_with_other_sources_runs_again_but_last(make: Any, tmp_path: Path) -> None:
    order = tmp_path / "order"
    note = "p = __import__('pathlib').Path({!r}); p.write_text((p.read_text() if p.exists() else '') + '{}'); "
    codes = {name: note.format(str(order), name[0]) + WRITES for name in ("alpha", "beta")}
    make(alpha=codes["alpha"]).run(60)
    runner = make("second", **codes)
    runner.key = "other"
    runner.run(60)
    assert order.read_text() == "aba"
    assert {entry["key"] for entry in lines(tmp_path / "second" / "results.jsonl").values()} == {"other"}


def test_an_interrupted_call_ends_its_stage(make: Any, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    runner = make(hangs=(HANGS, str(pid)), next=WRITES)

    def stop_when_it_waits() -> None:
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        runner.stop()

    thread = threading.Thread(target=stop_when_it_waits)
    thread.start()
    runner.run(60)
    thread.join()
    assert {entry["status"] for entry in lines(tmp_path / "out" / "results.jsonl").values()} == {"cut"}
    assert not running(int(pid.read_text()))


def test_lanes_run_beside_each_other_and_a_stage_waits_for_the_other_lane(proof: SimpleNamespace, tmp_path: Path) -> None:
    """The stage of the lane "cpu" ends only when the one of the lane "gpu" has run; the last one comes after both."""
    flag = tmp_path / "flag"
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(flag)!r}).exists(): time.sleep(0.05)\n" + WRITES
    codes = {
        "compile": ("cpu", waits, ()),
        "card": ("gpu", f"open({str(flag)!r}, 'w').close(); " + WRITES, ()),
        "uses": ("gpu", WRITES, ("compile",)),
    }
    stages = [
        proof.stages.Stage(name, lane, 1, 60, "", (sys.executable, "-c", code), after)
        for name, (lane, code, after) in codes.items()
    ]
    order: list[str] = []
    runner = proof.runner.Runner(
        stages, tmp_path / "out", tmp_path / "state", dry_run=True, say=lambda entry: order.append(entry["stage"])
    )
    runner.run(60)
    assert sorted(order) == ["card", "compile", "uses"] and order[-1] == "uses"
    assert {entry["status"] for entry in lines(tmp_path / "out" / "results.jsonl").values()} == {"ok"}


@pytest.mark.parametrize(
    ("lines", "killed", "code", "shortened", "status"),
    [
        ([{"part": "a", "status": "ok"}], "", 0, False, "ok"),
        ([{"part": "a", "status": "ok"}, {"part": "b", "status": "skipped", "reason": "r"}], "", 0, False, "ok"),
        ([{"part": "a", "status": "skipped", "reason": "r"}], "", 0, False, "skipped"),
        ([{"part": "a", "status": "ok"}, {"part": "b", "status": "failed", "reason": "r"}], "", 0, False, "failed"),
        ([{"part": "b", "status": "failed", "reason": "r"}], "limit", None, True, "failed"),
        ([{"part": "a", "status": "ok"}, {"part": "b", "status": "cut", "reason": "r"}], "", 0, True, "cut"),
        ([{"part": "a", "status": "ok"}, {"part": "b", "status": "cut", "reason": "r"}], "", 0, False, "failed"),
        ([{"part": "b", "status": "cut", "reason": "r"}], "stopped", None, False, "cut"),
        ([{"part": "a", "status": "ok"}], "limit", None, True, "cut"),
        ([{"part": "a", "status": "ok"}], "limit", None, False, "failed"),
        ([{"part": "a", "status": "ok"}], "", 1, False, "failed"),
        ([{"skip": "r"}], "", 0, False, "skipped"),
        ([], "", 0, False, "failed"),
    ],
)
def test_the_status_of_a_stage(
    proof: SimpleNamespace, lines: list[dict[str, Any]], killed: str, code: int | None, shortened: bool, status: str
) -> None:
    entry = proof.runner.judge(proof.processes.Ended(code, killed, 1.0), lines, shortened=shortened)
    assert entry["status"] == status
    assert (status == "ok") == (not entry["reason"])


def test_parts_go_on_in_a_new_process_if_the_device_is_lost(make: Any, tmp_path: Path) -> None:
    """The process id stays; what was lost is its memory."""
    path = tmp_path / "stage_of_test.py"
    path.write_text(
        """
from gpu_proof.parts import Skip, Wrong, run_parts
broken = []
def first(): broken.append(1); raise Wrong("an illegal access", where=[3, 4])
def second(): return {"memory_is_new": not broken}
def third(): raise Skip("too little memory")
def fourth(): raise RuntimeError("first line\\nsecond line")
run_parts({"1": first, "2": second, "3": third, "4": fourth}, lambda: not broken)
""",
        encoding="utf-8",
    )
    stages = make(device=(f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')",))
    stages.run(60)
    parts = lines(tmp_path / "out" / "results.jsonl")["device"]["parts"]
    assert [part["status"] for part in parts] == ["failed", "ok", "skipped", "failed"]
    assert parts[0]["where"] == [3, 4] and "illegal access" in parts[0]["reason"]
    assert parts[1]["memory_is_new"]
    assert parts[2]["reason"] == "too little memory"
    assert parts[3]["reason"] == "RuntimeError: first line" and "second line" in parts[3]["output"]


def test_no_error_of_a_part_costs_the_next_ones(make: Any, tmp_path: Path) -> None:
    """Too little memory is a lack of the machine. OpCheckError derives from Exception directly; its module is loaded late."""
    path = tmp_path / "stage_of_test.py"
    path.write_text(
        """
import ctypes, subprocess, sys, xml.etree.ElementTree
import torch
from gpu_proof.parts import run_parts
def registered():
    @torch.library.custom_op("gpu_proof_test::wrong", mutates_args=())
    def wrong(x: torch.Tensor) -> torch.Tensor: return x * 2
    @wrong.register_fake
    def _(x): return x.new_empty(x.shape[0] + 1)
    torch.library.opcheck(wrong, (torch.ones(3),))
def memory(): raise torch.OutOfMemoryError("tried to allocate 200 GiB")
def driver(): raise RuntimeError("CUDA error: out of memory")
parts = {"opcheck": registered, "memory": memory, "driver": driver, "zero": lambda: 1 / 0}
parts |= {"junit": lambda: xml.etree.ElementTree.fromstring("<testsuites>"), "name": lambda: undefined}
def argument(): raise ctypes.ArgumentError("argument 1: TypeError: expected a pointer")
parts |= {"argument": argument, "program": lambda: subprocess.run(["false"], check=True), "last": lambda: None}
run_parts(parts)
""",
        encoding="utf-8",
    )
    make(stage=(f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')",)).run(60)
    parts = {part["part"]: part for part in lines(tmp_path / "out" / "results.jsonl")["stage"]["parts"]}
    reasons = {name: part["reason"].partition(":")[0] for name, part in parts.items() if part["status"] == "failed"}
    assert reasons == {
        "opcheck": "OpCheckError",
        "zero": "ZeroDivisionError",
        "argument": "ArgumentError",
        **{"junit": "ParseError", "name": "NameError", "program": "CalledProcessError"},
    }
    assert parts["memory"]["status"] == parts["driver"]["status"] == "skipped" and parts["last"]["status"] == "ok"
    assert parts["memory"]["reason"] == parts["driver"]["reason"] == "needs more GPU memory than is free"
    assert "200 GiB" in parts["memory"]["output"]


def test_the_summary_shows_what_went_wrong(proof: SimpleNamespace) -> None:
    wrong = {"part": "bf16 V=4104 cluster=8", "status": "failed", "reason": "wrong values", "seconds": 1.0, "bad": 2}
    wrong |= {"plan": {"cluster": 8}, "first_wrong": [[0, 4100, 0.0, 0.25]], "repeats_differ": False}
    stacks = (
        'Fatal Python error: Aborted\n\nCurrent thread 0x01 (most recent call first):\n  File "x.py", line 7 in wait\nnothing\n'
    )
    common = {"seconds": 2.0, "key": "k"}
    entries = {
        "rows": {"stage": "rows", "status": "failed", "reason": "1 of 1 parts", "parts": [wrong], **common},
        "demo": {"stage": "demo", "status": "failed", "reason": "still running", "parts": [], "tail": stacks, **common},
        "env": {"stage": "env", "status": "skipped", "reason": "no NVIDIA GPU", "parts": [], **common, "key": "older"},
    }
    text = proof.summary.summary(proof.stages.STAGES, entries, "k")
    for shown in (
        "[[0, 4100, 0.0, 0.25]]",
        '{"cluster": 8}',
        "repeats_differ: false",
        'File "x.py", line 7 in wait',
        "no NVIDIA GPU",
    ):
        assert shown in text
    assert "[of other sources]" in next(line for line in text.splitlines() if line.startswith("env"))
    assert "nothing" not in text
    assert text.splitlines()[-1] == f"0 ok, 2 failed, 1 skipped, 0 cut, {len(proof.stages.STAGES) - 3} not run"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--deadline", "nan"), "--deadline is nan: give at least 20 seconds"),
        (("--deadline", "3"), "--deadline is 3: give at least 20 seconds"),
        (("--wheels", "nowhere"), "--wheels is nowhere, which is no folder"),
        (("--only", "everything"), "invalid choice: 'everything'"),
    ],
)
def test_a_wrong_flag_is_one_line(
    proof: SimpleNamespace, flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        proof.program.parse(flags)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_stages_wait_only_for_stages_of_the_other_lane(proof: SimpleNamespace) -> None:
    by_name = {stage.name: stage for stage in proof.stages.STAGES}
    assert len(by_name) == len(proof.stages.STAGES)
    for stage in proof.stages.STAGES:
        assert 0 < stage.expected_s < stage.cap_s
        assert all(by_name[name].lane != stage.lane for name in stage.after)


def test_lanes_share_the_cores(proof: SimpleNamespace) -> None:
    assert proof.runner.lane_cores("gpu", range(16)) == set(range(8))
    assert proof.runner.lane_cores("cpu", range(16)) == set(range(8, 16))
    assert proof.runner.lane_cores("gpu", [0, 1]) == proof.runner.lane_cores("cpu", [0, 1]) == {0, 1}


def test_a_machine_without_a_gpu_says_so_in_every_stage(proof: SimpleNamespace, tmp_path: Path) -> None:
    """No stage fails because nvidia-smi is missing; nothing is proved, so the exit code is 1."""
    env = {**os.environ, "PATH": "/nonexistent", "OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""}
    skipping = [stage.name for stage in proof.stages.STAGES if stage.name != "libraries"]  # which other stages ask for
    command = [sys.executable, str(BENCH / "gpu_proof"), "--state", str(tmp_path / "state"), "--only", *skipping]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "not all in" not in done.stdout
    found = lines(tmp_path / "out" / "results.jsonl")
    del found["libraries"]
    assert {name: entry["status"] for name, entry in found.items()} == dict.fromkeys(skipping, "skipped"), done.stdout
    assert found["env"]["reason"] == found["sampling"]["reason"] == "no NVIDIA GPU: nvidia-smi is not on the PATH"
    assert f"{len(skipping)} skipped" in (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8").splitlines()[-1]


def test_a_package_that_is_missing_skips_its_stage(proof: SimpleNamespace, make: Any, tmp_path: Path) -> None:
    make(stage="from gpu_proof.enter import enter; enter('ceilings', 'torch,no_such_package')").run(60)
    entry = lines(tmp_path / "out" / "results.jsonl")["stage"]
    assert (entry["status"], entry["reason"]) == ("skipped", "no_such_package is not installed")
