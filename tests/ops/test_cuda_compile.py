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
from emulated import compile_library
from srpo_kernels import build, cuda, native
from srpo_kernels.options import without_loss

ARCHITECTURES = ("sm_90a", "sm_100a")
DTYPES = {"float": 0, "__nv_bfloat16": 1, "__half": 2}  # as in names of kernels
# (registers per thread, static shared memory) at most: so many CTAs must fit on an SM. The launch of some requests more memory.
LIMITS = {
    "rows_one_read": (72, 304),  # three CTAs of 288 threads
    "rows_two_reads": (128, 512),  # two of 256; on Hopper three
    "rows_filtered": (80, 512),  # three of 256
    "top_k_ids": (128, 18 * 1024),  # two of 256; in 16 bits four
}
KERNELS = len(DTYPES) * 5  # rows_two_reads with and without a reference
SM_SHARED_BYTES, RESERVED_BYTES, CTAS_PER_SM = 233472, 1024, 3  # of sm_90 and sm_100; reserved for each CTA


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


@pytest.fixture(scope="module")
def reports(compiled: tuple[Path, str]) -> list[tuple[str, int, int, int]]:
    """(mangled name, spilled bytes, registers, static shared memory) of each kernel."""
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers.*?(\d+) bytes smem"
    found = re.findall(pattern, compiled[1], flags=re.DOTALL)
    return [(name, int(spilled), int(registers), int(shared)) for name, spilled, registers, shared in found]


def test_registers_and_shared_memory(
    compiled: tuple[Path, str], reports: list[tuple[str, int, int, int]], request: pytest.FixtureRequest
) -> None:
    architecture = request.node.callspec.params["compiled"]
    assert len(reports) == KERNELS
    for name, spilled_bytes, registers, shared_bytes in reports:
        most_registers, most_shared = next(limits for kernel, limits in LIMITS.items() if kernel in name)
        assert spilled_bytes == 0 and registers <= most_registers and shared_bytes <= most_shared, (name, registers, shared_bytes)
        assert "top_k" not in name or "IfE" in name or registers <= 64, (name, registers)
        assert "two_reads" not in name or architecture != "sm_90a" or registers <= 80, (name, registers)
    assert " 0 bytes stack frame" in compiled[1].replace("\n", " ") and not re.search(r" [1-9]\d* bytes stack frame", compiled[1])


@pytest.mark.parametrize(("dtype", "cluster"), [("float", 16), ("__nv_bfloat16", 8), ("__half", 8)])
def test_three_ctas_work_on_rows_of_qwen(
    reports: list[tuple[str, int, int, int]], emulated_library: ctypes.CDLL, dtype: str, cluster: int
) -> None:
    """151936 ids: static and dynamic shared memory of three CTAs fit on an SM, so that loads, sums and stores overlap."""
    mangled = {"float": "IfE", "__nv_bfloat16": "bfloat16", "__half": "__half"}[dtype]
    static = next(shared for name, _, _, shared in reports if "rows_one_read" in name and mangled in name)
    plan = (ctypes.c_int * 3)()
    assert emulated_library.simt_plan(DTYPES[dtype], ctypes.c_int64(151936), ctypes.c_int64(static), plan) == 0
    assert plan[0] == cluster and plan[0] * plan[1] * 16 >= 151936 * (4 if dtype == "float" else 2)
    assert CTAS_PER_SM * (static + plan[2] + RESERVED_BYTES) <= SM_SHARED_BYTES, (static, list(plan))


def test_shared_memory_does_not_bound_the_other_kernels(reports: list[tuple[str, int, int, int]]) -> None:
    """With Qwen's vocabulary as many CTAs fit on an SM as registers allow; rows_filtered also has a bit for each id."""
    bits = 4 * -(-(151936 + 8) // 32)
    for name, _, registers, static in reports:
        if "rows_one_read" not in name:
            num_ctas = 65536 // (256 * -(-registers // 8) * 8)
            dynamic = bits if "rows_filtered" in name else 0
            assert num_ctas * (static + dynamic + RESERVED_BYTES) <= SM_SHARED_BYTES, (name, num_ctas, static, dynamic)


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_library(tmp_path_factory.mktemp("simt") / "rows_simt.so")


def test_rows_are_read_and_written_in_16_byte_units(code: dict[str, str]) -> None:
    """As many loads in flight per thread as the kernels intend; a kernel that is not unrolled would have one."""
    for name, sass in code.items():
        loads, stores = (len(re.findall(rf"\b{access}\.E\.128", sass)) for access in ("LDG", "STG"))
        if "rows_two_reads" in name:
            assert loads >= 8 and stores >= 2, (name, loads, stores)
        if "top_k" in name:
            assert loads >= 4, (name, loads)
        if "rows_filtered" in name:
            assert stores >= 2, (name, stores)


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
        if "top_k" in name:
            continue
        fast = len(re.findall(r"MUFU\.EX2", sass))
        assert fast == 0 if "IfE" in name or "IfL" in name else fast >= (1 if "rows_filtered" in name else 16), (name, fast)


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


def test_more_columns_than_the_filter_s_kernel_can_hold(nvcc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MAX_FILTERED", 7)
    tables: dict[str, torch.Tensor | None] = {"labels": torch.zeros(2, dtype=torch.long)}
    tables["kept_ids"] = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="logits have 8 columns: impl 'cuda' filters at most 7, give impl 'triton'"):
        cuda.rows(
            "logprobs_backward", torch.zeros(2, 8), torch.zeros(2, 8), tables, without_loss(1.0)
        )  # no limit without gradient
