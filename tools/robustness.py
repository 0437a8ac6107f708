"""Faults in every program, and what became of them: `python tools/robustness.py` writes bench/results/robustness.json.

File operations that fail or kill, and damaged files, each followed by the same command (tests/helpers/fault_lab.py). Exit code 1
if an outcome is neither "same bits" nor "one sentence".
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run all programs and write the figures; returns the exit code."""
    sys.path[:0] = [str(ROOT / name) for name in (".", "kernels", "tests/helpers", "tools")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    import fault_lab
    from small_world import SmallWorld
    from smallest import PROGRAMS

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="time for all programs together, shared equally")
    parser.add_argument("--jobs", type=int, default=1, help="number of programs that are tried at once, a core each")
    parser.add_argument("--programs", nargs="*", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument(
        "--kills", type=int, default=0, help="only so many kills of each program, without other faults and damage"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "robustness.json")
    args = parser.parse_args()
    began = time.monotonic()
    seconds = args.minutes * 60 * min(args.jobs, len(args.programs)) / len(args.programs)
    with tempfile.TemporaryDirectory() as folder:
        world = SmallWorld.make(Path(folder) / "world")
        fault_lab.make_inputs(world)

        def tried(program: str) -> tuple[list[dict[str, Any]], int]:
            job: dict[str, Any] = {"program": program, "faults": 0, "damage": 0}
            job |= {"faults": args.kills, "damage": -1, "kinds": ["kill"]} if args.kills else {}
            results = fault_lab.launch(world.folder, Path(folder) / program, [job], seconds)
            print(program, len(results), "cases,", sum(bool(r["problem"]) for r in results), "faults found", flush=True)
            return results, json.loads((Path(folder) / program / "operations.json").read_text())[program]

        with ThreadPoolExecutor(args.jobs) as pool:
            tries = dict(zip(args.programs, pool.map(tried, args.programs), strict=True))
    found = [result for results, _ in tries.values() for result in results]
    faults = [result for result in found if result["problem"]]
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    figures = {
        "command": f"python tools/robustness.py --minutes {args.minutes:g} --jobs {args.jobs}",
        "commit": commit.stdout.strip(),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "num_cases": len(found),
        "file_operations": {program: count for program, (_, count) in tries.items()},
        "by_program": _counts((r["program"], r["fault"], r["outcome"]) for r in found),
        "outcomes": dict(Counter(r["outcome"] for r in found)),
        "faults_found": faults,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors", "pyarrow")},
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
    }
    args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures["outcomes"]), "written to", args.out)
    return int(bool(faults))


def _counts(keys: Iterable[tuple[str, ...]]) -> dict[str, int]:
    return {" / ".join(key): count for key, count in sorted(Counter(keys).items())}


if __name__ == "__main__":
    sys.exit(main())
