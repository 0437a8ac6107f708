"""bench/gpu_proof: the card as nvidia-smi and torch report it, and the torch-free checker that is compiled for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_modules import BENCH, proof_fixture
from srpo_kernels import operators

proof = proof_fixture("card", "checker", "lab", "operators_check", "parts", "train_step")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """nvidia_smi(body) puts a Python program of that name first on the PATH."""
    folder = tmp_path / "driver"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(body: str) -> None:
        (folder / "nvidia-smi").write_text(f"#!{sys.executable}\nimport sys\n{body}\n", encoding="utf-8")
        (folder / "nvidia-smi").chmod(0o755)

    return put


def test_a_card_that_torch_does_not_reach_is_no_proof(tmp_path: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi("print('9.0')")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folders = ["--out", str(tmp_path / "out"), "--state", str(tmp_path / "state")]
    command = [sys.executable, str(BENCH / "gpu_proof"), *folders, "--only", "env"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    entry = json.loads((tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8"))
    assert entry["status"] == "ok" and entry["parts"][-1]["part"] == "first_kernel"
    assert entry["parts"][-1]["status"] == "skipped" and done.returncode == 1, done.stdout


@pytest.mark.parametrize(("answer", "found"), [("9.0", (9, 0)), ("10.3", (10, 3)), ("8.6", (8, 6))])
def test_the_card_s_capability(proof: SimpleNamespace, nvidia_smi: Any, answer: str, found: tuple[int, int]) -> None:
    nvidia_smi(f"print({answer!r}); print('7.5')")  # a second, older card
    assert proof.card.capability() == found


FIELD = 'Field "compute_cap" is not a valid field to query.'
BROKEN = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('7.5')", "the GPU has compute capability 7.5, below 8.0"),
        ("print('[N/A]')", "nvidia-smi gives no compute capability ([N/A])"),
        ("pass", "no NVIDIA GPU: nvidia-smi lists none"),
        (f"print({FIELD!r}); print('more'); sys.exit(2)", f"nvidia-smi gives no compute_cap, exit code 2: {FIELD}"),
        (f"print({BROKEN!r}, file=sys.stderr); sys.exit(9)", f"nvidia-smi gives no compute_cap, exit code 9: {BROKEN}"),
        ("sys.exit(9)", "nvidia-smi gives no compute_cap, exit code 9: it prints nothing"),
    ],
)
def test_a_card_without_a_capability_is_skipped_with_what_nvidia_smi_says(
    proof: SimpleNamespace, nvidia_smi: Any, body: str, reason: str
) -> None:
    nvidia_smi(body)
    with pytest.raises(proof.parts.Skip) as skip:
        proof.card.capability()
    assert str(skip.value) == reason


def test_torch_says_why_it_finds_no_device(proof: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> bool:
        warnings.warn("The NVIDIA driver on your\nsystem is too old (found version 12040).", stacklevel=2)
        return False

    monkeypatch.setattr(proof.lab.torch.cuda, "is_available", too_old)
    reason = proof.lab.why_no_device()
    assert "although the driver lists one: The NVIDIA driver on your system is too old (found version 12040)." in reason
    monkeypatch.setattr(proof.lab.torch.cuda, "is_available", lambda: False)
    assert proof.lab.why_no_device().endswith("although the driver lists one")
    monkeypatch.setattr(proof.lab.torch.cuda, "is_available", lambda: True)
    assert proof.lab.why_no_device() is None


def test_the_checker_is_compiled_for_the_card(
    proof: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvidia_smi: Any
) -> None:
    checker = proof.checker
    (tmp_path / "check.cu").write_text("", encoding="utf-8")
    monkeypatch.setattr(checker, "SOURCE", tmp_path / "check.cu")
    monkeypatch.setenv("NVCC", str(tmp_path / "nvcc"))
    nvidia_smi("print('9.0')")
    command = checker.command(tmp_path / "out", ("-DSRPO_WATCHDOG",))
    assert (
        "arch=compute_90a,code=sm_90a" in command
        and "-DSRPO_WATCHDOG" in command
        and command[-2:] == ["-o", str(tmp_path / "out")]
    )
    nvidia_smi("print('8.0')")
    with pytest.raises(proof.parts.Skip, match=r"need 9\.0"):
        checker.command(tmp_path / "out", ())


def test_the_emulated_checker_is_compiled_by_the_chosen_compiler(
    proof: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(proof.parts.SMALL, "1")
    monkeypatch.setenv("CXX", sys.executable)
    assert proof.checker.command(tmp_path / "out", ())[:2] == [sys.executable, "-std=c++17"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(proof.parts.Skip, match="no-such-compiler is not on the PATH"):
        proof.checker.command(tmp_path / "out", ())


def test_a_checker_of_other_sources_or_of_another_card_is_not_used(
    proof: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvidia_smi: Any
) -> None:
    """A compiler that copies its source. Times of files tell nothing: a checkout sets them anew."""
    checker = proof.checker
    for name in ("csrc/rows.cuh", "check.cu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    monkeypatch.setattr(checker, "ROOT", tmp_path)
    monkeypatch.setattr(checker, "SOURCE", Path("check.cu"))
    monkeypatch.setenv(proof.parts.STATE, str(tmp_path))
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!{sys.executable}\nimport shutil, sys\nshutil.copy(sys.argv[-3], sys.argv[-1])\n", encoding="utf-8")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv(proof.parts.RESULT, str(tmp_path / "result"))
    nvidia_smi("print('9.0')")
    with pytest.raises(proof.parts.Skip, match="rows_check is not built"):
        checker.binary()
    checker.main()
    watchdog = "rows_check_watchdog"
    assert [checker.binary(), checker.binary(watchdog)] == [tmp_path / "rows_check", tmp_path / watchdog]
    os.utime(tmp_path / "check.cu")  # newer, and the same
    checker.binary()
    (tmp_path / "csrc" / "rows.cuh").write_text("// another kernel", encoding="utf-8")
    os.utime(tmp_path / "csrc" / "rows.cuh", (1, 1))
    with pytest.raises(proof.parts.Skip, match="from other sources or for another card"):
        checker.binary(watchdog)
    (tmp_path / "csrc" / "rows.cuh").write_text("", encoding="utf-8")
    checker.binary()
    nvidia_smi("print('10.0')")
    with pytest.raises(proof.parts.Skip, match="from other sources or for another card"):
        checker.binary()
    nvidia_smi("print('9.0')")
    nvcc.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (tmp_path / "result").unlink()
    checker.main()
    with pytest.raises(proof.parts.Skip, match="rows_check is not built"):  # the old file of a compiler that failed
        checker.binary()


def test_a_kernel_that_cannot_run_on_the_card_is_skipped_with_its_reason(
    proof: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each stage that compares kernels, and before anything is computed."""
    backend = operators.BACKENDS["cpu"]
    monkeypatch.setattr(backend, "why_not", lambda logits: f"no kernel for {logits.dtype}")
    monkeypatch.setattr(proof.lab, "device", lambda: torch.device("cpu"))
    with pytest.raises(proof.parts.Skip, match=r"no kernel for torch\.float32"):
        proof.operators_check.case("cpu", 3, "k3")
    with pytest.raises(proof.parts.Skip, match=r"no kernel for torch\.bfloat16"):
        proof.train_step.against(proof.train_step.Case("cpu", impl="cpu"))
