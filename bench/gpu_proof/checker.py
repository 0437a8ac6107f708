"""Stage checker: compiles rows_check.cu, which runs the CUDA kernels without torch; once more with a limit on every barrier wait.

In a dry run it is compiled for the CPU, with an emulator in place of CUDA, and at -O1: see tests/helpers/emulated.py.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from functools import partial
from pathlib import Path

from gpu_proof.card import CLUSTER_CAPABILITY, capability, tool
from gpu_proof.parts import ROOT, Found, Skip, Wrong, figure, run_parts, small, state

SOURCE = Path("bench/gpu_proof/rows_check.cu")
EMULATOR = Path("tests/helpers/simt")
VARIANTS = {"rows_check": (), "rows_check_watchdog": ("-DSRPO_WATCHDOG",)}


def binary(name: str = "rows_check") -> Path:
    """Path of a compiled variant. Raises Skip if it has not been built, or is older than its source."""
    path, source = state() / name, ROOT / SOURCE
    if not path.is_file() or not source.is_file() or path.stat().st_mtime < source.stat().st_mtime:
        raise Skip("rows_check is not built: see the stage checker")
    return path


def command(output: Path, flags: tuple[str, ...]) -> list[str]:
    """The compiler's command for this card, or for the emulator. Raises Skip if something that it needs is missing."""
    if not (ROOT / SOURCE).is_file():
        raise Skip(f"{SOURCE} does not exist")
    if small():
        if not (ROOT / EMULATOR).is_dir():
            raise Skip(f"{EMULATOR} does not exist: the emulator that stands in for CUDA")
        if shutil.which("g++") is None:
            raise Skip("g++ is not on the PATH")
        compiler = ["g++", "-std=c++17", "-O1", "-x", "c++", "-I", str(EMULATOR), "-I", "csrc", "-pthread"]
        return [*compiler, *flags, str(SOURCE), "-o", str(output)]
    found = capability()
    if found < CLUSTER_CAPABILITY:
        raise Skip(f"compute capability {found[0]}.{found[1]}: the CUDA C++ kernels need 9.0")
    card = f"{found[0]}{found[1]}a"
    architecture = ["-gencode", f"arch=compute_{card},code=sm_{card}"]
    return [tool("nvcc"), "-std=c++17", "-O3", "-I", "csrc", *architecture, *flags, str(SOURCE), "-o", str(output)]


def started(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(words: list[str], compiler: subprocess.Popen[str], begin: float) -> Found:
    """Wait for a compiler. Raises Wrong with what it says if it fails."""
    said, line = compiler.communicate()[1], " ".join(words)
    if compiler.returncode:
        raise Wrong(f"the compiler failed with exit code {compiler.returncode}", command=line, compiler="\n" + said[-3000:])
    return {"figures": [figure("compile", time.perf_counter() - begin, "s")], "command": line}


def main() -> None:
    """Both variants at once."""
    begin, commands = time.perf_counter(), {name: command(state() / name, flags) for name, flags in VARIANTS.items()}
    compilers = {name: started(words) for name, words in commands.items()}
    run_parts({name: partial(finished, words, compilers[name], begin) for name, words in commands.items()})
