"""Stage checker: compiles rows_check.cu, which runs the CUDA kernels without torch; once more with a limit on every barrier wait.

In a dry run it is compiled for the CPU, with an emulator in place of CUDA, and at -O1: see tests/helpers/emulated.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path

from gpu_proof.card import CLUSTER_CAPABILITY, capability, query_card, tool
from gpu_proof.parts import ROOT, Found, Skip, Wrong, figure, run_parts, small, state

SOURCE = Path("bench/gpu_proof/rows_check.cu")
EMULATOR = Path("tests/helpers/simt")
VARIANTS = {"rows_check": (), "rows_check_watchdog": ("-DSRPO_WATCHDOG",)}


def binary(name: str = "rows_check") -> Path:
    """Path of a compiled variant. Raises Skip if it has not been built, or from other sources or for another card."""
    path = state() / name
    if not path.is_file() or not _stamp(path).is_file():
        raise Skip(f"{name} is not built: see the stage checker")
    if _stamp(path).read_text(encoding="utf-8") != digest():
        raise Skip(f"{name} is built from other sources or for another card: run the stage checker again")
    return path


def digest() -> str:
    """SHA-256 of all that a variant is compiled from: the kernels, rows_check.cu, and the card or the emulator."""
    found = hashlib.sha256(("cpu" if small() else str(query_card("compute_cap"))).encode())
    folders = [Path("csrc"), *([EMULATOR] if small() else [])]
    sources = [SOURCE, *(path.relative_to(ROOT) for folder in folders for path in sorted((ROOT / folder).glob("*")))]
    for path in sources:
        if (ROOT / path).is_file():
            found.update(f"{path} {hashlib.sha256((ROOT / path).read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def _stamp(path: Path) -> Path:
    """The file beside a variant that holds the digest of its sources."""
    return path.with_name(f"{path.name}.sha256")


def command(output: Path, flags: tuple[str, ...]) -> list[str]:
    """The compiler's command for this card, or for the emulator. Raises Skip if something that it needs is missing."""
    if not (ROOT / SOURCE).is_file():
        raise Skip(f"{SOURCE} does not exist")
    if small():
        if not (ROOT / EMULATOR).is_dir():
            raise Skip(f"{EMULATOR} does not exist: the emulator that stands in for CUDA")
        name = os.environ.get("CXX") or "g++"
        if shutil.which(name) is None:
            raise Skip(f"{name} is not on the PATH")
        compiler = [name, "-std=c++17", "-O1", "-x", "c++", "-I", str(EMULATOR), "-I", "csrc", "-pthread"]
        return [*compiler, *flags, str(SOURCE), "-o", str(output)]
    found = capability()
    if found < CLUSTER_CAPABILITY:
        raise Skip(f"compute capability {found[0]}.{found[1]}: the CUDA C++ kernels need 9.0")
    card = f"{found[0]}{found[1]}a"
    architecture = ["-gencode", f"arch=compute_{card},code=sm_{card}"]
    return [tool("nvcc"), "-std=c++17", "-O3", "-I", "csrc", *architecture, *flags, str(SOURCE), "-o", str(output)]


def started(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(words: list[str], compiler: subprocess.Popen[str], begin: float, sources: str) -> Found:
    """Wait for a compiler, and write the digest of its sources beside its output. Raises Wrong with what it says if it fails."""
    said, line = compiler.communicate()[1], " ".join(words)
    if compiler.returncode:
        raise Wrong(f"the compiler failed with exit code {compiler.returncode}", command=line, compiler="\n" + said[-3000:])
    _stamp(Path(words[-1])).write_text(sources, encoding="utf-8")
    return {"figures": [figure("compile", time.perf_counter() - begin, "s")], "command": line}


def main() -> None:
    """Both variants at once. A variant whose compiler fails is left without a digest, and is not used."""
    begin, commands = time.perf_counter(), {name: command(state() / name, flags) for name, flags in VARIANTS.items()}
    sources = digest()  # before the compilers read them
    for name in commands:
        _stamp(state() / name).unlink(missing_ok=True)
    compilers = {name: started(words) for name, words in commands.items()}
    run_parts({name: partial(finished, words, compilers[name], begin, sources) for name, words in commands.items()})
