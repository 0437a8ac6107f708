"""The first GPU as its driver describes it, and the CUDA tools; without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from gpu_proof.parts import Skip

LEAST_CAPABILITY = (8, 0)  # bf16
ANSWER_S = 20
CLUSTER_CAPABILITY = (9, 0)  # thread block clusters, which the CUDA C++ kernels use


def query_card(field: str) -> str | None:
    """A field of the first GPU as nvidia-smi reports it; None if it reports none."""
    try:
        return ask_card(field)
    except Skip:
        return None


def ask_card(field: str) -> str:
    """A field of the first GPU as nvidia-smi reports it. Raises Skip, with the first line that nvidia-smi prints, without one."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except FileNotFoundError:
        raise Skip("no NVIDIA GPU: nvidia-smi is not on the PATH") from None
    except subprocess.TimeoutExpired:
        raise Skip(f"nvidia-smi does not answer within {ANSWER_S} s") from None
    except OSError as error:
        raise Skip(f"nvidia-smi does not start: {error}") from None
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        raise Skip(f"nvidia-smi gives no {field}, exit code {done.returncode}: {lines[0] if lines else 'it prints nothing'}")
    if not done.stdout.strip():
        raise Skip("no NVIDIA GPU: nvidia-smi lists none")
    return lines[0]


def capability() -> tuple[int, int]:
    """Compute capability of the first GPU. Raises Skip if nvidia-smi gives none, or if it is below 8.0."""
    text = ask_card("compute_cap")
    major, _, minor = text.partition(".")
    try:
        found = (int(major), int(minor or 0))
    except ValueError:
        raise Skip(f"nvidia-smi gives no compute capability ({text})") from None
    if found < LEAST_CAPABILITY:
        raise Skip(f"the GPU has compute capability {text}, below 8.0")
    return found


def tool(name: str) -> str:
    """Path of a program of the CUDA toolkit: from $NVCC, $NCU, ..., the PATH, $CUDA_HOME or /usr/local/cuda. Raises Skip."""
    variable = name.upper().replace("-", "_")
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    found = os.environ.get(variable) or shutil.which(name) or shutil.which(name, path=toolkit)
    if found is None:
        raise Skip(f"{name} is neither on the PATH nor in {toolkit}")
    return found
