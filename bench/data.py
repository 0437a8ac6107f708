"""Time and memory of checking a file of pairs with columns of its own: `python bench/data.py --json bench/results/data.json`.

Each format is read in a fresh process. `peak_mib` is its peak resident memory above that after the imports; `cpu_s` beside
`seconds` shows whether the machine was busy. The goal for a million rows is 60 s and 300 MiB.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))  # the default, but not under PYTHONSAFEPATH

from revision import commit

from srpo.core.step_presets import PAPER
from srpo.data.readers import read_examples

FORMATS = ("csv", "csv.gz", "jsonl", "parquet")
NAMES = ("q", "name", "Brand", "colour", "description", "judgement")
COLUMNS: dict[str, str] = dict(
    zip(("query", "title", "fields.brand", "fields.color", "fields.text", "grade"), NAMES, strict=True)
)
WORDS = (
    "red",
    "blue",
    "running",
    "shoes",
    "boots",
    "cotton",
    "shirt",
    "waterproof",
    "jacket",
    "leather",
    "women",
    "men",
    "trail",
)
PAIRS_PER_QUERY = 20


def rows(num: int) -> Iterator[tuple[str, ...]]:
    """Pairs of the size of a shop's: a title of 9 words, a description of 30."""
    rng = random.Random(0)
    for i in range(num):
        query, title, text = (" ".join(rng.choices(WORDS, k=k)) for k in (3, 8, 30))
        color = rng.choice(WORDS)
        yield f"{query} {i // PAIRS_PER_QUERY}", f"{title} {i}", rng.choice(WORDS), color, text, str(rng.randint(1, 4))


def write(path: Path, num: int) -> None:
    """A file in the format of its suffix."""
    if path.suffix == ".parquet":
        columns = zip(*rows(num), strict=True)
        pq.write_table(pa.table(dict(zip(NAMES, map(list, columns), strict=True))), path)
        return
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if ".csv" in path.name:
            csv.writer(file).writerows([NAMES, *rows(num)])
        else:
            file.writelines(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in rows(num))


def read(path: Path) -> dict[str, float]:
    """Figures of one pass over a file, in this process."""
    before, start, cpu = _peak_mib(), time.perf_counter(), time.process_time()
    num = sum(1 for _ in read_examples(path, PAPER, columns=COLUMNS))
    figures = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, "peak_mib": _peak_mib() - before}
    return {"num_rows": num, "file_mib": path.stat().st_size / 2**20, **figures, "imports_mib": before}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "linux" else 2**20)


def measure(fmt: str, num: int) -> dict[str, Any]:
    """Figures of one format, from a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"pairs.{fmt}"
        subprocess.run([sys.executable, __file__, "--write", str(path), "--rows", str(num)], check=True)
        done = subprocess.run([sys.executable, __file__, "--read", str(path)], check=True, stdout=subprocess.PIPE, text=True)
    return {"format": fmt, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        return write(args.write, args.rows)
    if args.read:
        return print(json.dumps(read(args.read)))
    load, results = os.getloadavg()[0], []
    for fmt in args.formats:
        row = measure(fmt, args.rows)
        results.append(row)
        print(
            f"{fmt:8} {row['num_rows']:,} rows  {row['seconds']:.1f} s ({row['cpu_s']:.1f} s of CPU)  {row['peak_mib']:.0f} MiB"
        )
    if args.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load_before": load}
        versions = {"python": platform.python_version(), "pyarrow": version("pyarrow"), "srpo": commit()}
        command = " ".join(["python", *sys.argv])
        report = {"machine": machine, "versions": versions, "command": command, "results": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
