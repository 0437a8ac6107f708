"""Stage unpack: wheels and zips that were carried along (`--wheels`) go into a folder that the other stages import from."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from gpu_proof.parts import Found, Skip, run_parts, state


def unpack() -> Found:
    folder = Path(os.environ["GPU_PROOF_WHEELS"])
    archives = sorted(path for path in folder.rglob("*") if path.suffix in (".whl", ".zip"))
    if not archives:
        raise Skip(f"{folder} holds neither wheels nor zips")
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(state() / "site")
    return {"archives": [path.name for path in archives]}


def main() -> None:
    if "GPU_PROOF_WHEELS" not in os.environ:
        raise Skip("no --wheels were given")
    run_parts({"unpack": unpack})
