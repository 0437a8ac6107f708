"""Runs one stage in this process: `python -m gpu_proof.enter MODULE PACKAGES [ARGUMENT ...]`; packages are joined by commas.

A stage that needs packages needs the card, too: both are looked for before its module imports anything.
"""

from __future__ import annotations

import importlib
import sys

from gpu_proof.card import capability
from gpu_proof.parts import Skip, needs, small, write


def enter(module: str, packages: str, *arguments: str) -> None:
    """Run `main(*arguments)` of a module; a stage that cannot run on this machine writes its reason."""
    try:
        if packages:
            needs(*packages.split(","))
            if not small():
                capability()
        importlib.import_module(f"gpu_proof.{module}").main(*arguments)
    except Skip as reason:
        print(f"skipped: {reason}", flush=True)
        write({"skip": str(reason)})


if __name__ == "__main__":
    enter(*sys.argv[1:])
