"""The program: `python bench/gpu_proof [--deadline SECONDS] [--only STAGE ...] [--out FOLDER] [--dry-run]`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this folder is the package gpu_proof of bench/
    from gpu_proof.program import main

    sys.exit(main())
