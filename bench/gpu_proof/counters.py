"""Stage ncu: the hardware counters of two launches of the loss kernel: bytes moved, occupancy, why warps wait."""

from __future__ import annotations

import csv
import subprocess

from gpu_proof.card import tool
from gpu_proof.checker import binary
from gpu_proof.parts import Found, Skip, Wrong, run_parts, small
from gpu_proof.rows import arguments, problem

PROBLEM = problem("bf16", 4096, 151936, place="out", repeats=2)
LIMIT_S = 35
KEPT = ("Duration", "DRAM Throughput", "Memory Throughput", "Compute (SM) Throughput", "L2 Hit Rate", "Registers Per Thread")
KEPT += ("Achieved Occupancy", "Theoretical Occupancy", "Waves Per SM", "Cluster Size", "Dynamic Shared Memory Per Block")
KEPT += ("Warp Cycles Per Issued Instruction", "No Eligible", "SM Frequency", "DRAM Frequency", "Grid Size")


def counters(text: str) -> list[dict[str, str]]:
    """The kept counters of each launch, from the CSV that ncu prints after the lines of the program itself."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        launch = launches.setdefault(row["ID"], {"kernel": row.get("Kernel Name", "")[:80]})
        if row.get("Metric Name") in KEPT:
            launch[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(launches.values())


def profile() -> Found:
    command = [tool("ncu"), "--clock-control", "none", "--set", "full", "--kernel-name", "regex:rows_", "--launch-count", "2"]
    command += ["--csv", "--page", "details", str(binary()), *arguments(PROBLEM)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Wrong(f"no end within {LIMIT_S} s") from None
    output = done.stdout + done.stderr
    print(output[-40000:], flush=True)
    if "ERR_NVGPUCTRPERM" in output:
        raise Skip("this user may not read the GPU's counters (ERR_NVGPUCTRPERM)")
    launches = counters(done.stdout)
    if not launches:
        raise Wrong(f"ncu printed no counters, exit code {done.returncode}", output="\n" + output[-1500:])
    return {"problem": " ".join(arguments(PROBLEM)), "launches": launches}


def main() -> None:
    binary()
    if small():
        raise Skip("a dry run has no CUDA program to profile")
    run_parts({"rows": profile})
