"""The first GPU as its driver describes it, and the CUDA tools; without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from gpu_proof.parts import Skip

LEAST_CAPABILITY = (8, 0)  # bf16
CLUSTER_CAPABILITY = (9, 0)  # thread block clusters, which the CUDA C++ kernels use


def query_card(field: str) -> str | None:
    """A field of the first GPU as nvidia-smi reports it; None without a driver or a GPU."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def capability() -> tuple[int, int]:
    """Compute capability of the first GPU. Raises Skip if there is none, or if it is below 8.0."""
    text = query_card("compute_cap")
    if text is None:
        raise Skip("no NVIDIA GPU: nvidia-smi is missing or lists none")
    major, _, minor = text.partition(".")
    found = (int(major), int(minor or 0))
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
