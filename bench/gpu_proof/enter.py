"""Runs one stage in this process: `python -m gpu_proof.enter MODULE PACKAGES [ARGUMENT ...]`; packages are joined by commas.

A package that is missing skips the stage before its module imports it.
"""

from __future__ import annotations

import importlib
import sys

from gpu_proof.parts import Skip, needs, write


def enter(module: str, packages: str, *arguments: str) -> None:
    """Run `main(*arguments)` of a module; a stage that cannot run on this machine writes its reason."""
    try:
        needs(*filter(None, packages.split(",")))
        importlib.import_module(f"gpu_proof.{module}").main(*arguments)
    except Skip as reason:
        print(f"skipped: {reason}", flush=True)
        write({"skip": str(reason)})


if __name__ == "__main__":
    enter(*sys.argv[1:])
