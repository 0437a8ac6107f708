"""Compiles csrc/ with the machine's own compiler into a cache, once per source and flags. Takes seconds; needs no torch headers.

`python -m srpo_kernels.build` compiles before the first use. The cache is $SRPO_CACHE_DIR, else $XDG_CACHE_HOME/srpo, else
~/.cache/srpo. The name of a cached file contains a hash of all its inputs, so the cache is never stale.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

CSRC = Path(__file__).resolve().parent / "csrc"  # in a checkout a link to the top-level csrc/

# Files that the CUDA library depends on.
CUDA_SOURCES = (
    *("rows.h", "row_math.h", "cluster.cuh", "vectors.cuh", "rows_one_read.cuh", "rows_two_reads.cuh", "rows_filtered.cuh"),
    *("top_k.cuh", "rows_cuda.cu"),
)

_CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w")
_ISA_FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"),
    "avx512bf16": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c"),
}


class BuildError(RuntimeError):
    """The compiler is missing or failed; the message holds its output."""


class NoNvcc(BuildError):
    """There is no CUDA compiler, and no library in the cache."""


def cache_dir() -> Path:
    """Folder of the compiled libraries."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srpo"
    return Path(os.environ.get("SRPO_CACHE_DIR") or default)


def compile_once(name: str, sources: Sequence[str], commands: Sequence[Sequence[str]]) -> Path:
    """Path of the shared library `name` that `commands` build, taken from the cache if it is there.

    `sources` are the files of csrc/ that the result depends on. In the commands "{src}" is csrc/, "{tmp}" an empty folder and
    "{out}" the library. Processes may build the same library at the same time. A cached file that is not whole is built again:
    its name ends with a digest of its content. Raises BuildError, also if the cache cannot be written.
    """
    compiler = commands[0][0]
    text = "".join((CSRC / source).read_text(encoding="utf-8") for source in sources)
    key = hashlib.sha256(repr((text, commands, _version(compiler), platform.machine())).encode()).hexdigest()[:16]
    try:
        if cached := _whole(f"{name}-{key}-*.so"):
            return cached
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            output = Path(folder) / f"{name}.so"
            for command in commands:
                filled = [part.format(src=CSRC, tmp=folder, out=output) for part in command]
                done = subprocess.run(filled, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise BuildError(f"{' '.join(filled)} failed:\n{done.stderr[-4000:]}")
            return output.replace(cache_dir() / f"{name}-{key}-{_digest(output)}.so")  # atomic
    except OSError as error:
        folder, reason = error.filename or cache_dir(), error.strerror or error
        raise BuildError(f"{folder}: {reason}: set SRPO_CACHE_DIR to a folder that can be written") from error


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _whole(pattern: str) -> Path | None:
    """A library of the cache whose content has the digest at the end of its name: loading a cut one would crash the process."""
    return next((path for path in sorted(cache_dir().glob(pattern)) if path.stem.rpartition("-")[2] == _digest(path)), None)


@cache
def _version(compiler: str) -> str:
    """Output of `compiler --version`. Raises BuildError if the compiler is missing."""
    if shutil.which(compiler) is None:
        raise BuildError(f"{compiler} is not on the PATH: install a C++ compiler, or name one in CXX")
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


@cache
def _takes(compiler: str, flag: str) -> bool:
    """Whether the compiler accepts a flag."""
    done = subprocess.run([compiler, flag, "-E", "-x", "c++", os.devnull], capture_output=True, check=False)
    return done.returncode == 0


def cpu_commands() -> list[list[str]]:
    """Commands that build one object per instruction set, then the library. The library is not linked with OpenMP: it uses the
    runtime that torch has loaded. Compilers from before 2020 lack -mavx512bf16, which is then left out. Raises BuildError if the
    compiler is missing."""
    compiler = os.environ.get("CXX") or "g++"
    _version(compiler)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    names = list(_ISA_FLAGS) if x86 else ["portable"]
    if x86 and not _takes(compiler, "-mavx512bf16"):
        names.remove("avx512bf16")
    objects = {
        name: [
            compiler,
            *_CXX_FLAGS,
            f"-DSRPO_ISA={name}",
            *_ISA_FLAGS[name],
            "-c",
            "{src}/rows_cpu.cpp",
            "-o",
            f"{{tmp}}/{name}.o",
        ]
        for name in names
    }
    defined = ["-DSRPO_X86"] * x86 + ["-DSRPO_AVX512BF16"] * ("avx512bf16" in names)
    link = [compiler, *_CXX_FLAGS[:3], "-shared", *defined, "{src}/dispatch_cpu.cpp"]
    return [*objects.values(), [*link, *(f"{{tmp}}/{name}.o" for name in names), "-o", "{out}"]]


def build_cpu() -> Path:
    """Path of the CPU library. Raises BuildError."""
    return compile_once("srpo_cpu", ["rows.h", "row_math.h", "simd.h", "rows_cpu.cpp", "dispatch_cpu.cpp"], cpu_commands())


def find_nvcc() -> str | None:
    """The CUDA compiler: $NVCC, nvcc on the PATH, or nvcc of $CUDA_HOME or /usr/local/cuda; None if there is none."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=toolkit)


def build_cuda() -> Path:
    """Path of the CUDA library: machine code for Hopper and, from CUDA 12.8 on, Blackwell; PTX for later GPUs. Raises BuildError.

    The compiler is that of `find_nvcc`. Without one, a cached library that was built from the same sources is used.
    """
    text = "".join((CSRC / source).read_text(encoding="utf-8") for source in CUDA_SOURCES)
    name = f"srpo_cuda-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    nvcc = find_nvcc()
    if nvcc is None:
        cached = _whole(f"{name}-*.so")
        if cached is None:
            where = "neither on the PATH nor in $CUDA_HOME or /usr/local/cuda"
            raise NoNvcc(f"nvcc is {where}: install the CUDA toolkit, or name the compiler in NVCC")
        return cached
    if shutil.which(nvcc) is None:
        raise BuildError(f"{nvcc} cannot be run: name nvcc in NVCC, or unset it")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for virtual, real in (("compute_90a", "sm_90a"), ("compute_100a", "sm_100a"), ("compute_90", "compute_90")):
        if virtual.rstrip("a") in known:
            flags += ["-gencode", f"arch={virtual},code={real}"]
    return compile_once(name, CUDA_SOURCES, [[nvcc, *flags, "{src}/rows_cuda.cu", "-o", "{out}"]])


def load_with_openmp(library: Path) -> ctypes.CDLL:
    """Load a library so that its OpenMP calls go to the runtime that torch has already loaded: a second runtime in the process
    would have its own threads, which compete with torch's for the cores. Without OpenMP in torch the system's runtime is used."""
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        if "GOMP" not in str(error):
            raise
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library))


def main() -> None:
    """Build the CPU library and, if there is an nvcc, the CUDA library. Exit code 1 if a compiler fails."""
    try:
        print(f"CPU kernels: {build_cpu()}")
        print(f"CUDA kernels: {build_cuda()}")
    except NoNvcc as error:
        print(f"CUDA kernels: not built, a GPU would use the Triton kernels: {error}")
    except BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
