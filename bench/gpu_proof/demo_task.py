"""Stage demo: the demo's task, fewer steps, learned on the GPU; beside it the same run on a CPU.

`PYTHONPATH=bench python -m gpu_proof.demo_task` runs it on this CPU and writes bench/results/gpu_proof_demo_cpu.json.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from gpu_proof.parts import ROOT, Cut, Found, Wrong, figure, small, state, time_for
from gpu_proof.processes import run_capped

FLAGS = {"num-demonstrations": 8000, "num-train": 2000, "num-eval": 512, "sft-steps": 300, "rl-steps": 20, "num-prompts": 48}
FLAGS |= {"eval-every": 0}
SMALL_FLAGS = {"num-demonstrations": 400, "num-train": 64, "num-eval": 24, "vocab-size": 600, "sft-steps": 12, "sft-batch": 16}
SMALL_FLAGS |= {"rl-steps": 3, "num-prompts": 4, "group-size": 4, "max-new-tokens": 16, "eval-every": 0, "model.num-layers": 1}
SMALL_FLAGS |= {"model.hidden-size": 32, "model.expert-size": 32}
CPU_RESULT = ROOT / "bench" / "results" / "gpu_proof_demo_cpu.json"
LIMIT_S = 300 if small() else 112
AVERAGED = 5  # the first and the last steps whose rewards are averaged
SHARE = 0.5  # bar: the share of the CPU's gain in macro F1 that the GPU has to reach; other random numbers, the same method


def demo(folder: Path, flags: dict[str, int], env: dict[str, str], limit_s: float) -> dict[str, Any]:
    """Run the demo into a new folder; returns rewards, scores and seconds. Raises Wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    log = folder.with_suffix(".log")
    begin = time.perf_counter()
    command = [sys.executable, "-m", "srpo.demo", "--run-dir", str(folder), *words]
    limit_s, shortened = time_for(limit_s)
    end = run_capped(command, limit_s, log, env=env, folder=ROOT)
    wall_s = time.perf_counter() - begin
    output = log.read_text(encoding="utf-8", errors="replace")
    print(output[-4000:], flush=True)
    if end.killed or end.code:
        words = f"no end within {limit_s:.0f} s" if end.killed else f"exit code {end.code}"
        raise (Cut if end.killed and shortened else Wrong)(f"srpo.demo: {words}", output="\n" + output[-1500:])
    rewards = [line["reward/total"] for line in read_lines(folder / "metrics.jsonl") if "reward/total" in line]
    seconds = [line["time/step_s"] for line in read_lines(folder / "timing.jsonl") if "time/step_s" in line]
    scores = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    first, last = statistics.mean(rewards[:AVERAGED]), statistics.mean(rewards[-AVERAGED:])
    return {
        "rewards": rewards,
        "reward_gain": last - first,
        "macro_f1": {when: scores[when]["macro_f1"] for when in ("before", "after")},
        "points": 100 * (scores["after"]["macro_f1"] - scores["before"]["macro_f1"]),
        "step_s": statistics.median(seconds),
        "wall_s": wall_s,
        "command": " ".join(["python", "-m", "srpo.demo", *words]),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def on_gpu() -> Found:
    """The demo here; it has to gain macro F1, at least a share of what the CPU gained."""
    got = demo(state() / "demo", SMALL_FLAGS if small() else FLAGS, dict(os.environ), LIMIT_S)
    if small():  # too short to learn
        return {**got, "figures": [figure("one step", got["step_s"], "s"), figure("whole run", got["wall_s"], "s")]}
    cpu = json.loads(CPU_RESULT.read_text(encoding="utf-8"))
    words = {"one step": ("step_s", "s"), "whole run": ("wall_s", "s"), "gain in reward": ("reward_gain", "")}
    figures = [figure(name, got[key], unit, rival=cpu[key], rival_of="a CPU") for name, (key, unit) in words.items()]
    bar = SHARE * cpu["points"]
    figures.append(figure("gain in macro F1", got["points"], "points", bar=bar, rival=cpu["points"], rival_of="a CPU"))
    if not got["points"] >= bar:
        raise Wrong(f"macro F1 rises by {got['points']:.1f} points, on a CPU by {cpu['points']:.1f}", **got, figures=figures)
    return {**got, "figures": figures}


def on_cpu() -> None:
    """Write the CPU's figures."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    env = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    found = demo(ROOT / "runs" / "gpu_proof_demo_cpu", FLAGS, env, 1200)
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    load = round(os.getloadavg()[2], 1)  # of other programs, too: times on a busy machine are upper bounds
    found["machine"] = {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "load_average": load}
    CPU_RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"reward {found['reward_gain']:+.3f}, macro F1 {found['macro_f1']}, {found['wall_s']:.0f} s: {CPU_RESULT}")


def main() -> None:
    from gpu_proof import lab

    lab.run({"demo": on_gpu})


if __name__ == "__main__":
    on_cpu()
