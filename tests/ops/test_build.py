"""`python -m srpo_kernels.build`: what it compiles, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from srpo_kernels import build


def test_builds_both_libraries_where_there_is_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build, "build_cpu", lambda: Path("cpu.so"))
    monkeypatch.setattr(build, "build_cuda", lambda: Path("cuda.so"))
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    build.main()
    assert capsys.readouterr().out.splitlines() == ["CPU kernels: cpu.so", "CUDA kernels: cuda.so"]


def test_says_that_nvcc_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(build, "build_cpu", lambda: Path("cpu.so"))
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    build.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "CPU kernels: cpu.so" and second.startswith("CUDA kernels: not built, nvcc is not on the PATH")


@pytest.mark.parametrize("broken", ["build_cpu", "build_cuda"])
def test_a_compiler_that_fails_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail() -> Path:
        raise build.BuildError("no space left")

    for name in ("build_cpu", "build_cuda"):
        monkeypatch.setattr(build, name, fail if name == broken else lambda: Path("library.so"))
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    with pytest.raises(SystemExit, match="error: no space left"):
        build.main()
