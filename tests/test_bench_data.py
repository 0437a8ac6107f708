"""bench/data.py at a small size: a file is written, and read in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_small_file_is_measured(tmp_path: Path) -> None:
    options = ["--rows", "300", "--formats", "csv", "--json", str(tmp_path / "out.json")]
    subprocess.run([sys.executable, str(ROOT / "bench" / "data.py"), *options], check=True, cwd=ROOT)
    (row,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert row["format"] == "csv" and row["num_rows"] == 300
    assert row["cpu_s"] > 0 and 0 <= row["peak_mib"] < 300 and row["file_mib"] > 0
