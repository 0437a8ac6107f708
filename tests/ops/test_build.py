"""`python -m srpo_kernels.build`: what it compiles, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from srpo_kernels import build


@pytest.fixture
def without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache on a machine without nvcc."""
    monkeypatch.setattr(build, "build_cpu", lambda: Path("cpu.so"))
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("SRPO_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_builds_both_libraries(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build, "build_cpu", lambda: Path("cpu.so"))
    monkeypatch.setattr(build, "build_cuda", lambda: Path("cuda.so"))
    build.main()
    assert capsys.readouterr().out.splitlines() == ["CPU kernels: cpu.so", "CUDA kernels: cuda.so"]


def test_says_that_nvcc_is_missing(without_nvcc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "CPU kernels: cpu.so" and second.startswith(
        "CUDA kernels: not built, a GPU would use the Triton kernels: nvcc"
    )


def test_a_library_in_the_cache_needs_no_nvcc(
    without_nvcc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "_whole", lambda pattern: Path("cached.so"))
    build.main()
    assert capsys.readouterr().out.splitlines()[1] == "CUDA kernels: cached.so"


def test_an_nvcc_that_is_not_there_is_named(without_nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(SystemExit, match="error: /nowhere/nvcc cannot be run: name nvcc in NVCC, or unset it"):
        build.main()


@pytest.mark.parametrize("broken", ["build_cpu", "build_cuda"])
def test_a_compiler_that_fails_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail() -> Path:
        raise build.BuildError("no space left")

    for name in ("build_cpu", "build_cuda"):
        monkeypatch.setattr(build, name, fail if name == broken else lambda: Path("library.so"))
    with pytest.raises(SystemExit, match="error: no space left"):
        build.main()
