"""The CUDA library compiles, and the machine code is as intended. Needs nvcc but no GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from srpo_kernels import build, cuda, native
from srpo_kernels.options import without_loss

ARCHITECTURES = ("sm_90a", "sm_100a")
DTYPES = {"float": 0, "__nv_bfloat16": 1, "__half": 2}  # as in names of kernels
# Largest number of registers per thread: three CTAs of 288 threads, or two of 256, must fit on an SM.
MAX_REGISTERS = {"rows_one_read": 72, "rows_two_reads": 128}
MAX_SHARED_BYTES = {"rows_one_read": 640, "rows_two_reads": 640}  # static; the launch requests more


@pytest.fixture(scope="module")
def nvcc() -> str:
    path = os.environ.get("NVCC") or shutil.which("nvcc")
    if path is None:
        pytest.skip("nvcc is not on the PATH")
    return path


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest, nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(machine code, output of the assembler). Compiler warnings are errors, including the warning for spilled registers."""
    cubin = tmp_path_factory.mktemp("cubin") / "rows.cubin"
    flags = ["-std=c++17", "-O3", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v,--warn-on-spills"]
    target = f"arch=compute_{request.param.removeprefix('sm_')},code={request.param}"
    command = [nvcc, *flags, "-gencode", target, str(build.CSRC / "rows_cuda.cu"), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return cubin, done.stderr


@pytest.fixture(scope="module")
def code(compiled: tuple[Path, str]) -> dict[str, str]:
    """SASS of each kernel."""
    disassembler = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    if disassembler is None and (triton := importlib.util.find_spec("triton")) and triton.origin:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        disassembler = str(bundled) if bundled.is_file() else None
    if disassembler is None:
        pytest.skip("cuobjdump is not on the PATH (CUOBJDUMP names one, and Triton brings one)")
    text = subprocess.run([disassembler, "--dump-sass", str(compiled[0])], capture_output=True, text=True, check=True).stdout
    _, *functions = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    return dict(zip(functions[::2], functions[1::2], strict=True))


def test_registers_and_shared_memory(compiled: tuple[Path, str]) -> None:
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers.*?(\d+) bytes smem"
    reports = re.findall(pattern, compiled[1], flags=re.DOTALL)
    assert len(reports) == 2 * len(DTYPES)
    for name, spilled_bytes, registers, shared_bytes in reports:
        kernel = next(kernel for kernel in MAX_REGISTERS if kernel in name)
        assert int(spilled_bytes) == 0 and int(registers) <= MAX_REGISTERS[kernel], (name, spilled_bytes, registers)
        assert int(shared_bytes) <= MAX_SHARED_BYTES[kernel], (name, shared_bytes)
    assert " 0 bytes stack frame" in compiled[1].replace("\n", " ") and not re.search(r" [1-9]\d* bytes stack frame", compiled[1])


def test_rows_are_moved_by_the_copy_engine_and_sums_by_messages(code: dict[str, str]) -> None:
    kernels = [sass for name, sass in code.items() if "rows_one_read" in name]
    assert len(kernels) == len(DTYPES)
    for sass in kernels:
        assert len(re.findall(r"UBLKCP\.S\.G", sass)) == 1, "one bulk load"
        assert len(re.findall(r"UBLKCP\.G\.S", sass)) >= 1, "bulk stores"
        assert len(re.findall(r"\bSTAS\.128", sass)) == 1, "one message to each CTA, into its shared memory"
        assert len(re.findall(r"\bLDS\.128", sass)) >= 4, "slices are read in 128-bit accesses"
        assert len(re.findall(r"\bSTS\.128", sass)) >= 1, "and written"
        assert not re.search(r"\b(LDL|STL)\b", sass), "local memory"
        assert re.search(r"FENCE\.VIEW\.ASYNC", sass), "the copy engine sees the gradient"


def test_the_kernels_ask_for_these_instructions(nvcc: str, tmp_path: Path) -> None:
    """As the test above, in PTX, for machines without a disassembler."""
    out = tmp_path / "rows.ptx"
    flags = ["-std=c++17", "-O3", "-ptx", "-arch=compute_90"]
    subprocess.run([nvcc, *flags, str(build.CSRC / "rows_cuda.cu"), "-o", str(out)], check=True)
    kernels = [text for text in out.read_text(encoding="utf-8").split(".entry ")[1:] if "rows_one_read" in text.partition("(")[0]]
    assert len(kernels) == len(DTYPES)
    for ptx in kernels:
        assert ptx.count("st.async.shared::cluster") == ptx.count("cp.async.bulk.shared::cluster.global") == 1
        assert ptx.count("cp.async.bulk.global.shared::cta") >= 1 and ptx.count("fence.proxy.async") == 1
        assert len(re.findall(r"ld\.shared\.v[24]\.(u32|b32|f32|u64|b64)", ptx)) >= 4


def test_only_16_bit_logits_take_the_faster_exponential(code: dict[str, str]) -> None:
    """One instruction per logit and sweep in the 16-bit kernels, a polynomial in the fp32 kernels."""
    for name, sass in code.items():
        fast = len(re.findall(r"MUFU\.EX2", sass))
        assert fast == 0 if "IfEE" in name else fast >= 16, (name, fast)


def test_the_library_loads_and_reports_errors(nvcc: str) -> None:
    """Without a driver a launch returns an error that has a name; argument blocks agree; nothing is compiled twice."""
    library = cuda.library()
    assert isinstance(library, ctypes.CDLL)
    path = build.build_cuda()
    stamp = path.stat().st_mtime_ns
    assert build.build_cuda() == path and path.stat().st_mtime_ns == stamp
    if torch.cuda.is_available():
        return
    tensors: dict[str, torch.Tensor | None] = {"logits": torch.zeros(2, 8)}
    tensors |= {"labels": torch.zeros(2, dtype=torch.long), "rows": torch.zeros(9, 2)}
    args, _held = native.row_args("logprobs", tensors, without_loss(1.0))
    code = library.srpo_cuda_rows(ctypes.byref(args), 0, -1, None)
    assert code > 0
    with pytest.raises(RuntimeError, match=rf"CUDA error {code} in a kernel of srpo: .*(driver|device)"):
        cuda._check(library, code)


def test_a_cached_library_does_without_a_compiler(nvcc: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = build.build_cuda()
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.build_cuda().name.rpartition("-")[0] == library.name.rpartition("-")[0]
    monkeypatch.setenv("SRPO_CACHE_DIR", str(tmp_path))
    with pytest.raises(build.BuildError, match="install the CUDA toolkit, or name the compiler in NVCC"):
        build.build_cuda()


def test_why_not_on_a_cpu() -> None:
    assert cuda.why_not(torch.zeros(1, 8)) == "logits are on cpu, not on an NVIDIA GPU"
