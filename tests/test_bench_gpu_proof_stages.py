"""The stages of bench/gpu_proof: what they read from other programs, with fakes of these; and all of them small on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_modules import BENCH, proof_fixture

ROOT = Path(__file__).resolve().parents[1]
RIGHT = {"ok": True, "ms": 1.25, "plan": {"cluster": 8}, "logprob_error": 1e-7, "gradient_error": 1e-3, "bad": 0}
WRONG = {**RIGHT, "ok": False, "bad": 3, "first_wrong": [[4, 4096, 0.0, 0.5]], "repeats_differ": True}


proof = proof_fixture(
    "rows", "checker", "sanitizer", "counters", "gpu_tests", "figures", "report", "card", "parts", "unpack", "stages", "runner"
)


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    """program(body) -> an executable Python script."""

    def make(body: str, name: str = "fake") -> Path:
        path = tmp_path / name
        path.write_text(f"#!{sys.executable}\nimport json, sys, time\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    return make


def prints(result: dict[str, Any], code: int = 0) -> str:
    return f"print('some words'); print(json.dumps({result!r})); sys.exit({code})"


def test_rows_of_a_right_kernel_become_a_figure(proof: SimpleNamespace, program: Any) -> None:
    problem = proof.rows.problem("bf16", 8192, 151936, place="out")
    found = proof.rows.check(program(prints(RIGHT)), None, problem, 20, True)
    assert found["figures"] == [{"name": "time", "value": 1.25, "unit": "ms", "bytes": 2 * 8192 * 151936 * 2}]
    assert found["plan"] == {"cluster": 8}
    assert proof.rows.least_bytes(proof.rows.problem("f32", 3, 8, place="none")) == 3 * 8 * 4
    found = proof.rows.check(program(prints({**RIGHT, "top_k_ms": 0.5})), None, {**problem, "top_k": 100}, 20, True)
    assert [(each["value"], each["bytes"]) for each in found["figures"]] == [
        (1.25, 2 * 8192 * 151936 * 2),
        (0.5, 8192 * 151936 * 2),
    ]


def test_rows_of_a_wrong_kernel_show_where(proof: SimpleNamespace, program: Any) -> None:
    problem = proof.rows.problem("f32", 5, 4104, cluster=8)
    with pytest.raises(proof.parts.Wrong, match=r"wrong values: 3 entries; errors of the gradient 0\.001") as wrong:
        proof.rows.check(program(prints(WRONG, 1)), None, problem, 20, False)
    assert wrong.value.details["first_wrong"] == [[4, 4096, 0.0, 0.5]] and wrong.value.details["repeats_differ"]
    error = {"error": "cudaErrorIllegalAddress", "at": "launch", "line": 7}
    with pytest.raises(proof.parts.Wrong, match="CUDA error cudaErrorIllegalAddress"):
        proof.rows.check(program(prints(error, 2)), None, problem, 20, False)
    with pytest.raises(proof.parts.Skip, match="cannot use this driver"):
        proof.rows.check(program(prints({"error": "cudaMalloc: cudaErrorInsufficientDriver"}, 2)), None, problem, 20, False)
    with pytest.raises(proof.parts.Skip, match="needs more GPU memory than is free"):
        proof.rows.check(program(prints({"error": "cudaMalloc(&p, n): cudaErrorMemoryAllocation"}, 2)), None, problem, 20, False)
    with pytest.raises(proof.parts.Wrong, match="exit code -11"):
        proof.rows.check(program("import os; os.kill(os.getpid(), 11)"), None, problem, 20, False)
    with pytest.raises(proof.parts.Wrong):  # it says nothing
        proof.rows.check(program("pass"), None, problem, 20, False)


CXX = os.environ.get("CXX") or "g++"
needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"{CXX} is not on the PATH")


@needs_compiler
def test_an_error_that_is_no_number_is_a_string_of_the_line(
    proof: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no NaN; the rest of the line shows where the kernel is wrong."""
    monkeypatch.setenv(proof.parts.SMALL, "1")
    source = (ROOT / proof.checker.SOURCE).read_text(encoding="utf-8")
    assert "squared_error = 0" in source
    (tmp_path / "nan.cu").write_text(source.replace("squared_error = 0", "squared_error = NAN"), encoding="utf-8")
    monkeypatch.setattr(proof.checker, "SOURCE", tmp_path / "nan.cu")
    subprocess.run(proof.checker.command(tmp_path / "nan", ()), cwd=ROOT, check=True)
    with pytest.raises(proof.parts.Wrong, match=r"wrong values: 0 entries; errors of the gradient -?nan") as wrong:
        proof.rows.check(tmp_path / "nan", None, proof.rows.problem("f32", 2, 264), 60, False)
    assert wrong.value.details["plan"] and wrong.value.details["first_wrong"] == []


def test_rows_that_hang_are_run_again_with_the_watchdog(proof: SimpleNamespace, program: Any) -> None:
    """The second program gets the same problem, and what it prints is shown."""
    watchdog = program("print('barrier of block 3 is stuck,', *sys.argv[1:])", "watchdog")
    with pytest.raises(proof.parts.Wrong, match=r"no end within 0\.2 s") as wrong:
        proof.rows.check(program("time.sleep(60)"), watchdog, proof.rows.problem("f16", 2, 264, cluster=4), 0.2, False)
    assert "barrier of block 3 is stuck, dtype=f16 T=2 V=264 cluster=4" in wrong.value.details["watchdog"]


def test_problems_come_by_size_and_cover_what_the_kernels_distinguish(proof: SimpleNamespace) -> None:
    checks = list(proof.rows.checks())
    names = [" ".join(proof.rows.arguments(each)) for each in (*checks, *proof.rows.timings())]
    assert len(names) == len(set(names))
    assert {each.get("cluster", -1) for each in checks} == {-1, 0, 1, 2, 4, 8, 16}
    for dtype in ("f32", "bf16", "f16"):
        own = [each for each in checks if each["dtype"] == dtype]
        assert {each["place"] for each in own} == {"in", "out", "none"}
        assert {each["V"] for each in own} >= {32000, 50257, 128256, 151643, 151936, 262144}
        for option in ("pad", "kept", "top_k", "full"):
            assert any(each.get(option) for each in own)
    assert all({"dtype", "T", "V", "place"} <= each.keys() for each in proof.rows.small_checks())


def test_the_sanitizer_holds_memcheck_and_reads_racecheck(proof: SimpleNamespace, program: Any) -> None:
    races = program("print('RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)'); sys.exit(9)", "races")
    found = proof.sanitizer.check(str(races), "racecheck", Path("unused"), ["T=1"])
    assert found["figures"][0]["value"] == 3 and "RACECHECK" in found["output"]
    errors = program("print('Invalid __global__ write'); print('ERROR SUMMARY: 2 errors'); sys.exit(9)", "errors")
    with pytest.raises(proof.parts.Wrong, match="memcheck reports errors") as wrong:
        proof.sanitizer.check(str(errors), "memcheck", Path("unused"), ["T=1"])
    assert "Invalid __global__ write" in wrong.value.details["output"]
    flags = "assert sys.argv[1:6] == ['--error-exitcode', '9', '--tool', 'synccheck', 'rows_check'], sys.argv"
    clean = program(f"{flags}; print('ERROR SUMMARY: 0 errors')", "clean")
    assert proof.sanitizer.check(str(clean), "synccheck", Path("rows_check"), ["T=1"])["figures"][0]["value"] == 0
    with pytest.raises(proof.parts.Wrong, match="synccheck printed no summary"):
        proof.sanitizer.check(str(program(flags, "silent")), "synccheck", Path("rows_check"), ["T=1"])


def test_counters_are_read_after_the_lines_of_the_program(proof: SimpleNamespace) -> None:
    text = """{"ok": true}
==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","rows_one_read","Speed Of Light","Duration","ms","1.21"
"0","7","rows_one_read","Speed Of Light","DRAM Throughput","%","92.50"
"0","7","rows_one_read","Other","Something Else","%","1"
"1","7","rows_one_read","Speed Of Light","Duration","ms","1.19"
"""
    first, second = proof.counters.counters(text)
    assert first == {"kernel": "rows_one_read", "Duration": "1.21 ms", "DRAM Throughput": "92.50 %"}
    assert second["Duration"] == "1.19 ms"
    assert proof.counters.counters("==ERROR== nothing") == []


def test_failed_tests_are_named(proof: SimpleNamespace, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="good"/><testcase classname="tests.a" name="none"><skipped/>'
        '</testcase><testcase classname="tests.b" name="bad"><failure message="assert 1 == 2">trace</failure></testcase>'
        "</testsuite></testsuites>",
        encoding="utf-8",
    )
    counts, failed = proof.gpu_tests.outcome(junit)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert failed == [{"test": "tests.b.bad", "message": "assert 1 == 2"}]


def entry(stage: str, *figures: dict[str, Any]) -> dict[str, Any]:
    part = {"part": "p", "status": "ok", "figures": list(figures)}
    return {"stage": stage, "status": "ok", "reason": "", "seconds": 1.0, "time": "", "key": "k", "parts": [part]}


def test_floors_are_those_of_the_card(proof: SimpleNamespace) -> None:
    figure = proof.parts.figure
    entries = {
        "ceilings": entry("ceilings", figure("copy", 4.0, "TB/s"), figure("matmul", 800.0, "TFLOP/s")),
        "rows": entry("rows", figure("time", 2.0, "ms", bytes=4e9)),
        "ops": entry("ops", figure("experts", 400.0, "TFLOP/s"), figure("product", 2.0, "ms", flops=8e11)),
        "loss": entry("loss", figure("ours", 1.3, "ms", floor=1.2, floor_of="copy"), figure("gap", 0.01, "nats", bar=0.12)),
    }
    found = {figure["name"]: figure for figure in proof.figures.all_figures(entries)}
    assert found["time"]["floor"] == pytest.approx(1.0) and found["time"]["ratio"] == pytest.approx(0.5)
    assert found["experts"]["ratio"] == pytest.approx(0.5) and found["experts"]["floor_of"] == "matmul"
    assert found["product"]["floor"] == pytest.approx(1.0) and found["product"]["ratio"] == pytest.approx(0.5)
    assert found["ours"]["ratio"] == pytest.approx(1.2 / 1.3)
    assert "ratio" not in found["gap"] and "bar 0.12" in proof.figures.as_text(found["gap"])
    assert "floor" not in found["copy"] and "floor" not in found["matmul"]
    del entries["ceilings"]
    assert "floor" not in proof.figures.all_figures(entries)[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.0123"), (1.2345, "1.23"), (151936, "151936"), (2.5e7, "2.50e+07"), (1e-6, "1.00e-06")],
)
def test_numbers_are_short(proof: SimpleNamespace, value: float, text: str) -> None:
    assert proof.figures.number(value) == text


def test_a_report_can_be_compared_with_the_next(proof: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = proof.parts.figure
    machine = {"part": "machine", "status": "ok", "seconds": 0.1, "gpu": "NVIDIA H200"}
    entries = {
        "env": {**entry("env"), "parts": [machine]},
        "rows": entry("rows", figure("time", 2.0, "ms", floor=1.0, floor_of="copy")),
    }
    content = proof.report.report(entries, "k", dry_run=False)
    assert content["device"] == "NVIDIA H200" and proof.report.slug(content["device"]) == "nvidia-h200"
    assert content["figures"] == [
        {"name": "rows: p: time", "unit": "ms", "ms": 2.0, "floor": 1.0, "floor_of": "copy", "ratio": 0.5}
    ]
    monkeypatch.setattr(proof.report, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    (path,) = proof.report.write_report(entries, "k", tmp_path, dry_run=True)
    slower = json.loads(path.read_text(encoding="utf-8"))
    slower["figures"][0]["ms"] = 3.0
    (tmp_path / "slower.json").write_text(json.dumps(slower), encoding="utf-8")
    command = [sys.executable, str(BENCH / "compare.py"), str(path), str(tmp_path / "slower.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "slower" in done.stdout, done.stdout + done.stderr
    assert proof.report.write_report({"rows": entries["rows"]}, "k", tmp_path, dry_run=False) == []  # the device is not known
    written = proof.report.write_report(entries, "k", tmp_path, dry_run=False)  # without ceilings, too
    assert written == [tmp_path / "nvidia-h200.json", tmp_path / "results" / "nvidia-h200.json"]
    failed = {**entries, "rows": {**entries["rows"], "status": "failed"}}
    assert proof.report.write_report(failed, "k", tmp_path, dry_run=False) == [tmp_path / "nvidia-h200.json"]


def test_carried_packages_are_unpacked(proof: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "some-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some/__init__.py", "VALUE = 3")
    monkeypatch.setenv("GPU_PROOF_WHEELS", str(tmp_path))
    monkeypatch.setenv(proof.parts.STATE, str(tmp_path / "state"))
    assert proof.unpack.unpack() == {"archives": ["some-1.0-py3-none-any.whl"]}
    assert (tmp_path / "state" / "site" / "some" / "__init__.py").read_text() == "VALUE = 3"
    key = proof.runner.key_of(True)
    (tmp_path / "some-1.0-py3-none-any.whl").rename(tmp_path / "kept")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("other.py", "")
    assert proof.runner.key_of(True) != key  # so all stages run again
    proof.unpack.unpack()
    assert [path.name for path in (tmp_path / "state" / "site").iterdir()] == ["other.py"]


def dry_run(folder: Path, *flags: str, env: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the program; returns its results by stage. Asserts what every call leaves."""
    out = folder / "out"
    command = [sys.executable, str(BENCH / "gpu_proof"), "--dry-run", "--out", str(out), "--state", str(folder / "state"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **(env or {})}, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    found = {row["stage"]: row for row in map(json.loads, (out / "results.jsonl").read_text(encoding="utf-8").splitlines())}
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8 and sum(path.stat().st_size for path in files) < 5e6
    assert {"results.jsonl", "logs.txt", "summary.txt", "dry-run.json"} <= {path.name for path in files}
    assert done.returncode == (any(row["status"] == "failed" for row in found.values()))
    return found


@needs_compiler
def test_every_stage_runs_small_on_a_cpu(proof: SimpleNamespace, tmp_path: Path) -> None:
    """The same code as on a GPU. Without compute-sanitizer, ncu and packages to unpack five stages have nothing to do; vLLM has a
    test of its own."""
    others = [stage.name for stage in proof.stages.STAGES if stage.name != "sampling"]
    found = dry_run(tmp_path, "--only", *others)
    allowed = {"unpack", "memcheck", "synccheck", "racecheck", "ncu", "sampling_graphs", "sampling_v2", "sampling_v1"}
    if not ((ROOT / proof.checker.SOURCE).is_file() and (ROOT / proof.checker.EMULATOR).is_dir()):
        allowed |= {"checker", "rows"}
    assert {name: row["reason"] for name, row in found.items() if row["status"] not in ("ok", "skipped")} == {}
    assert {name for name, row in found.items() if row["status"] == "skipped"} == allowed
    content = json.loads((tmp_path / "out" / "dry-run.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in content["figures"]]
    assert len(names) == len(set(names))
    stages_of_figures = {name.partition(":")[0] for name in names}
    assert stages_of_figures >= {"ceilings", "loss_logits", "loss_hidden", "model_ops", "train_step", "demo", "pytest"}
    assert (tmp_path / "out" / "dry-run.png").stat().st_size > 10_000
    assert content["versions"]["torch"]


def test_the_local_engine_is_proved_where_vllm_is_missing(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n", encoding="utf-8")
    runs = tmp_path / "sampling.py"
    runs.write_text("from gpu_proof.enter import enter\nenter('sampling', 'torch')\n", encoding="utf-8")
    paths = os.pathsep.join(map(str, (hidden, ROOT, ROOT / "kernels", ROOT / "tests" / "helpers", BENCH)))
    env = {"PYTHONPATH": paths, "GPU_PROOF_SMALL": "1", "GPU_PROOF_STATE": str(tmp_path), "GPU_PROOF_OUT": str(tmp_path)}
    env |= {"GPU_PROOF_RESULT": str(tmp_path / "parts")}
    subprocess.run([sys.executable, str(runs)], env={**os.environ, **env}, check=True, capture_output=True)
    found = {part["part"]: part for part in map(json.loads, (tmp_path / "parts").read_text().splitlines())}
    assert found["vllm"]["status"] == "skipped"
    assert {name for name, part in found.items() if part["status"] == "ok"} == {
        *("local: start", "local: as loaded", "local: syncs", "local: speed")
    }, found


@pytest.mark.slow  # vLLM starts twice
@pytest.mark.vllm
def test_vllm_is_sampled_synced_killed_and_restarted(tmp_path: Path) -> None:
    found = dry_run(tmp_path, "--only", "sampling")["sampling"]
    assert found["status"] == "ok", found
    names = {part["part"] for part in found["parts"] if part["status"] == "ok"}
    assert names >= {"vllm: start", "vllm: as loaded", "vllm: syncs", "vllm: sleep and wake", "vllm: killed", "local: syncs"}
    gaps = next(part for part in found["parts"] if part["part"] == "vllm: syncs")["rounds"]
    assert all(before > 0.1 > after for before, after in gaps)


def test_the_stage_runs_every_file_with_a_test_for_a_gpu(proof: SimpleNamespace) -> None:
    """The marks of some tests come from helpers. Compared with the tests that pytest collects by the mark."""
    collect = ("-q", "--co", "-p", "no:cacheprovider", "-m", "gpu and not slow and not nightly", "tests")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *collect], capture_output=True, text=True, cwd=ROOT, env=env, check=True
    )
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert len(collected) > 5 and collected <= set(proof.gpu_tests.files())
