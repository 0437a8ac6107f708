"""Stage unpack: wheels and zips that were carried along (`--wheels`) go into a folder that the other stages import from."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

from gpu_proof.parts import Found, Skip, run_parts, state


def archives(folder: Path) -> list[Path]:
    """The wheels and zips in a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".whl", ".zip"))


def unpack() -> Found:
    folder, site = Path(os.environ["GPU_PROOF_WHEELS"]), state() / "site"
    found = archives(folder)
    if not found:
        raise Skip(f"{folder} holds neither wheels nor zips")
    shutil.rmtree(site, ignore_errors=True)  # what an earlier call has unpacked
    for path in found:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(site)
    return {"archives": [path.name for path in found]}


def main() -> None:
    if "GPU_PROOF_WHEELS" not in os.environ:
        raise Skip("no --wheels were given")
    run_parts({"unpack": unpack})
