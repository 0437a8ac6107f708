"""Nothing shadows what others look for, and importing needs no optional package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSIDE = "srpo.rollout.vllm.shard_worker"  # vLLM's own worker processes import it, to change them before they load a model
OPTIONAL = ("triton", "vllm", "megablocks", "grouped_gemm", "flash_attn", "tensorboard", "wandb", "trackio", "trl")
# As if these packages were not installed: every finder answers None for them.
BLOCK = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in {blocked!r} else self.finder.find_spec(name, *args)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def run_python(code: str, cwd: Path) -> str:
    """Output of `python -c code` with cwd on sys.path, as `python -m` and torchrun have it."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def modules(*folders: str) -> list[str]:
    """Import names of the modules in folders under srpo/, at any depth ("" for all)."""
    paths = [p for folder in folders for p in sorted((ROOT / "srpo" / folder).rglob("*.py"))]
    return [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths]


def test_no_package_called_kernels_is_found_from_the_repository_root() -> None:
    code = "from importlib.util import find_spec\nspec = find_spec('kernels')\nprint(spec and spec.origin or '')"
    origin = run_python(code, ROOT)
    assert not origin or "site-packages" in origin


def test_transformers_can_ask_for_hugging_face_kernels_from_the_repository_root() -> None:
    code = "from transformers.utils.import_utils import is_kernels_available\nprint(is_kernels_available())"
    assert run_python(code, ROOT) in ("True", "False")


@pytest.mark.parametrize("package", ["srpo", "srpo_kernels"])
def test_packages_import_without_optional_backends_and_transformers(package: str, tmp_path: Path) -> None:
    run_python(BLOCK.format(blocked=(*OPTIONAL, "transformers")) + f"import {package}", tmp_path)


def test_every_module_imports_without_optional_backends(tmp_path: Path) -> None:
    names = [name for name in modules("") if name != INSIDE]
    assert len(names) > 100
    run_python(BLOCK.format(blocked=OPTIONAL) + "".join(f"import {name}\n" for name in names), tmp_path)


def test_the_lower_layers_import_without_transformers(tmp_path: Path) -> None:
    names = [name for name in modules("core", "algorithm", "data") if name != "srpo.data.tokenizer"]
    run_python(BLOCK.format(blocked=(*OPTIONAL, "transformers")) + "".join(f"import {name}\n" for name in names), tmp_path)
