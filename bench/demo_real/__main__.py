"""The program: `python bench/demo_real --model DIR PAIRS...`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this folder is the package demo_real of bench/
    from demo_real.program import main

    main()
