"""bench/loss_kernel.py: no failure ends the run or loses what was measured, and the result file says what happened."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loss_bench
import pytest
import torch
from loss_bench import run

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    return loss_bench.modules()


@pytest.fixture
def arms(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes these the arms, given as name and function; a name alone is an arm of the benchmark."""

    def choose(*chosen: str | tuple[str, Make], form: str = "logits") -> None:
        found = []
        for arm in chosen:
            if isinstance(arm, tuple):
                found.append(bench.arms.Arm(arm[0], form, arm[1]))
            else:
                found += [known for known in bench.arms.ARMS if known.name == arm and known.form == form and not known.in_place]
        bounds = [arm for arm in bench.arms.ARMS if arm.is_bound and arm.form == form and (arm.name, form) not in names(found)]
        monkeypatch.setattr(bench.loss_kernel, "ARMS", bounds + found)

    def names(found: list[Any]) -> set[tuple[str, str]]:
        return {(arm.name, arm.form) for arm in found}

    return choose


def failing(error: BaseException, calls: int = 0) -> Make:
    """An arm that computes the loss in plain torch for this many calls, then raises."""
    left = calls

    def make(problem: Any) -> Any:
        plain = loss_bench.modules().arms.plain(problem, loss_bench.modules().problem.by_log_softmax)

        def call() -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise error
            return plain()

        return call

    return make


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in result["results"]}


@pytest.mark.parametrize(
    ("name", "error", "status"),
    [
        ("trl", RuntimeError("no such kernel\nand more"), 0),
        ("srpo/cpu", RuntimeError("no such kernel\nand more"), 1),
        ("copy", RuntimeError("no such kernel\nand more"), 1),
        ("srpo/cuda", torch.OutOfMemoryError("no such kernel"), 1),
        ("liger", subprocess.CalledProcessError(1, ["ptxas"]), 0),
        ("eager", MemoryError(), 0),
    ],
)
def test_an_arm_that_fails_is_a_line_and_the_others_go_on(
    bench: SimpleNamespace,
    tmp_path: Path,
    arms: Any,
    capsys: pytest.CaptureFixture[str],
    name: str,
    error: Exception,
    status: int,
) -> None:
    arms((name, failing(error)), "srpo/reference")
    result = run(bench, tmp_path, status=status)
    row, other = by_name(result)[name], by_name(result)["srpo/reference"]
    assert result["complete"]
    assert row["failed"].startswith(type(error).__name__)
    assert "and more" not in row["failed"]
    assert row["median_ms"] is None
    assert other["rounds"] == 3 and other["median_ms"] > 0
    assert (other["percent_of_bound"] is None) == (name == "copy")
    assert f"{name}: failed, {row['failed']}" in capsys.readouterr().out


def test_an_arm_that_fails_in_a_later_round_keeps_its_times(bench: SimpleNamespace, tmp_path: Path, arms: Any) -> None:
    arms(("srpo/cpu", failing(RuntimeError("overheated"), calls=3 + 2)), "eager")  # error, warm-up, memory, then two rounds
    rows = by_name(run(bench, tmp_path, status=1))
    assert rows["srpo/cpu"]["failed"] == "round 3: RuntimeError: overheated"
    assert rows["srpo/cpu"]["rounds"] == 2 and rows["srpo/cpu"]["median_ms"] > 0
    assert rows["eager"]["rounds"] == 3 and rows["eager"]["failed"] is None


def test_a_gradient_of_nan_is_a_failure(bench: SimpleNamespace, tmp_path: Path, arms: Any) -> None:
    def broken(problem: Any) -> Any:
        return lambda: (problem.inputs()[0] * torch.nan).sum()

    arms(("srpo/cpu", broken))
    assert by_name(run(bench, tmp_path, status=1))["srpo/cpu"]["failed"] == "FloatingPointError: the gradient is not finite"


def test_data_that_do_not_fit_are_a_line_of_every_arm(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB")

    monkeypatch.setattr(bench.problem.Problem, "__init__", full)
    result = run(bench, tmp_path, "--arms", "eager", "--hidden", "8", status=1)
    assert {row["form"] for row in result["results"]} == {"logits", "hidden"}
    for row in result["results"]:
        assert row["failed"] == "no data: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.32 GiB"


@pytest.mark.parametrize("calls", [0, 3 + 1])
def test_after_a_cuda_error_that_sticks_the_first_arm_is_named(
    bench: SimpleNamespace, tmp_path: Path, arms: Any, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """In its set-up, or in the second round: no later arm can be measured, and what was measured stays."""
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    broken = False

    def breaking(problem: Any) -> Any:
        call = failing(fault, calls)(problem)

        def run_it() -> Any:
            nonlocal broken
            try:
                return call()
            except RuntimeError:
                broken = True
                raise

        return run_it

    monkeypatch.setattr(bench.loss_kernel, "lost", lambda device: bench.rivals.one_line(fault) if broken else None)
    arms("srpo/reference", ("trl", breaking), "eager")
    rows = by_name(run(bench, tmp_path, status=1))
    first = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert rows["trl"]["failed"] == ("round 2: " if calls else "") + first
    for name in ("copy", "srpo/reference", "eager"):
        assert rows[name]["failed"] == f"the device was lost in logits: trl{', round 2' if calls else ''}: {first}"
        assert rows[name]["rounds"] == (1 if calls else 0)
    assert (rows["srpo/reference"]["gradient_error"] or 1) < 1e-5  # set up before the fault


def test_a_run_that_is_cut_leaves_what_was_measured(
    bench: SimpleNamespace, tmp_path: Path, arms: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arms(("liger", failing(KeyboardInterrupt(), calls=3 + 2)), "eager")
    result = run(bench, tmp_path, status=130)
    assert result["complete"] is False
    rows = by_name(result)
    assert rows["eager"]["rounds"] == rows["copy"]["rounds"] == 2
    assert rows["eager"]["median_ms"] > 0 and rows["eager"]["percent_of_bound"] > 0
    assert not rows["liger"]["failed"]
    assert "eager" in capsys.readouterr().out


def test_the_file_is_up_to_date_before_every_arm_and_round(
    bench: SimpleNamespace, tmp_path: Path, arms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read whenever the program begins something that could end it."""
    seen: list[dict[str, Any]] = []
    write = bench.loss_kernel.write

    def watched(outcome: dict[str, Any], path: Path) -> None:
        write(outcome, path)
        seen.append(json.loads(path.read_text(encoding="utf-8")))
        assert [found.name for found in path.parent.iterdir()] == [path.name]  # nothing is left beside it

    monkeypatch.setattr(bench.loss_kernel, "write", watched)
    arms("eager", "srpo/reference")
    run(bench, tmp_path)
    steps = ["data", "copy", "srpo/reference", "eager", "round 1 of 3", "round 2 of 3", "round 3 of 3"]
    doing = [state["doing"] for state in seen]
    assert sorted(doing[1:4]) == sorted(f"logits: {step}" for step in steps[1:4])
    assert doing[0] == "logits: data" and doing[4:] == [*(f"logits: {step}" for step in steps[4:]), None]
    assert [state["complete"] for state in seen] == [False] * 7 + [True]
    assert [by_name(state)["eager"]["rounds"] for state in seen] == [0, 0, 0, 0, 0, 1, 2, 3]
    assert all(len(state["results"]) == 3 for state in seen)
    assert "copy_bytes_per_s" in seen[5]["machine"] and "copy_bytes_per_s" not in seen[4]["machine"]


def test_a_cut_while_the_file_is_written_leaves_the_old_one(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    bench.outcome.write({"complete": False}, path)
    before = path.read_text(encoding="utf-8")

    def cut(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "write_text", cut)
        bench.outcome.write({"complete": True}, path)
    assert path.read_text(encoding="utf-8") == before


def test_a_file_that_cannot_be_written_ends_nothing(
    bench: SimpleNamespace, tmp_path: Path, arms: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arms("eager")
    flags = ("--device", "cpu", "--tokens", "16", "--vocab", "50", "--rounds", "1", "--json", str(tmp_path))
    assert bench.loss_kernel.main(flags) == 1
    printed = capsys.readouterr()
    assert "cannot be written" in printed.err and "eager" in printed.out


def test_a_chart_without_times_is_a_line(
    bench: SimpleNamespace, tmp_path: Path, arms: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arms(("copy", failing(RuntimeError("broken"))))
    run(bench, tmp_path, "--chart", str(tmp_path / "x.png"), status=1)
    assert "no chart: ValueError: no arm has a time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "free", "words"),
    [
        ((7, 5), 16e9, "Tesla T4 has compute capability 7.5, below 8.0: use --device cpu"),
        ((8, 0), 4e9, "the data take 5.0 GB, and 4.0 GB of the GPU are free"),
        (
            RuntimeError("CUDA-capable device(s) is/are busy\n"),
            0,
            "does not answer (RuntimeError: CUDA-capable device(s) is/are busy)",
        ),
    ],
)
def test_a_gpu_that_cannot_take_the_problem_is_one_line(
    bench: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: Any,
    free: float,
    words: str,
) -> None:
    def get_capability() -> tuple[int, int]:
        if isinstance(capability, Exception):
            raise capability
        return capability

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", get_capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free), int(free)))
    with pytest.raises(SystemExit) as stopped:
        bench.loss_kernel.main(["--device", "cuda", "--top-k", "100", "--hidden", "2048"])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "580.95.05, 1980, 3201, [N/A]\n",
            {"driver": "580.95.05", "max_sm_mhz": 1980.0, "max_memory_mhz": 3201.0, "power_limit_w": None},
        ),
        (None, {"driver": None, "max_sm_mhz": None, "max_memory_mhz": None, "power_limit_w": None}),
    ],
)
def test_the_gpu_is_described(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, answer: str | None, expected: Any) -> None:
    """nvidia-smi is asked for the device that torch uses; without it the values are null."""

    def ask(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[1] == "--id=GPU-5d8c"
        if answer is None:
            raise FileNotFoundError("nvidia-smi")
        return SimpleNamespace(stdout=answer)

    about = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=150e9, uuid="5d8c")
    monkeypatch.setattr(subprocess, "run", ask)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    described = bench.outcome.gpu()
    assert (described["gpu"], described["sm"], described["multiprocessors"]) == ("NVIDIA H200", "9.0", 132)
    assert described["cuda"] == torch.version.cuda
    assert {key: described[key] for key in expected} == expected


def test_a_machine_without_git_keeps_its_results(bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = run(bench, tmp_path, "--arms", "eager")
    assert outcome["complete"] and outcome["commit"] is None
