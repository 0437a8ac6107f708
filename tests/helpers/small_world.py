"""A minimal setup for running the programs: a few pairs, a tokenizer, and a policy that learned the format by SFT."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from invariants import check_run
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from srpo.core.config.demo import TeacherBias, TinyConfig
from srpo.core.config.sft import SftConfig
from srpo.core.config.train import Config, DataConfig, OptimizerConfig, PolicyConfig, RewardConfig, RolloutConfig, TrainConfig
from srpo.core.settings import dump_toml, run_program
from srpo.core.step_presets import PAPER
from srpo.data.examples import Example
from srpo.data.pairs import write_pairs
from srpo.data.prompts import build_prompt
from srpo.data.readers import load_examples, write_examples
from srpo.data.teacher import teach
from srpo.data.tokenizer import train_tokenizer
from srpo.data.world import World
from srpo.experiments.start import PHRASES, PROMPT, strip
from srpo.policy.checkpoint_folders import latest_checkpoint
from srpo.policy.model import load_policy, make_tiny
from srpo.policy.parallel import Parallel
from srpo.sft import sft

ROOT = Path(__file__).resolve().parents[2]
TINY = TinyConfig(
    hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, num_experts=4, expert_size=32, max_context=320
)
ONE = Parallel(0, 1, 0, torch.device("cpu"))
NUM_PAIRS = 800


class SmallWorld:
    """Files in a folder, written once per test session: `pairs`, `train`, `eval` (data), `base` and `policy` (checkpoints)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pairs, self.train, self.eval = (folder / name for name in ("sft.jsonl", "train.jsonl", "eval.jsonl"))
        self.base, self.policy = folder / "base", folder / "sft" / "policy"

    @classmethod
    def make(cls, folder: Path) -> SmallWorld:
        """Generate the data, train the tokenizer, and train the policy until its responses parse. Takes a few seconds."""
        self, world = cls(folder), World(0)
        pairs = [(build_prompt(e, PROMPT), teach(e, TeacherBias())) for e in world.examples("train", NUM_PAIRS)]
        write_pairs(self.pairs, pairs)
        write_examples(self.train, world.examples("train", 64, start=NUM_PAIRS))
        write_examples(self.eval, world.examples("wild", 12))
        tokenizer = train_tokenizer([strip(prompt + response) for prompt, response in pairs], 700, PHRASES)
        make_tiny(tokenizer, TINY, 0).save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        assert sft(self.sft_config(folder / "sft", num_steps=120), ONE) == self.policy
        return self

    def sft_config(self, run_dir: Path, **changes: Any) -> SftConfig:
        """Settings of SFT from the untrained policy."""
        settings = SftConfig(
            run_dir=str(run_dir),
            data=str(self.pairs),
            num_steps=4,
            batch_size=32,
            policy=PolicyConfig(path=str(self.base)),
            optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5, schedule="linear"),
        )
        return changed(settings, changes)

    def config(self, run_dir: Path, **changes: Any) -> Config:
        """Settings of a short run: `config(dir, num_steps=2, rollout={"group_size": 3})`."""
        settings = Config(
            run_dir=str(run_dir),
            num_steps=3,
            data=DataConfig(train=str(self.train), prompt=PROMPT),
            policy=PolicyConfig(path=str(self.policy)),
            rollout=RolloutConfig(num_prompts=4, group_size=4, max_new_tokens=64),
            reward=RewardConfig(judge="oracle", judge_error_rate=0.05),
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1, schedule="linear"),
            train=TrainConfig(micro_batch_tokens=600, checkpoint_every=2),
        )
        return changed(settings, changes)

    def examples(self) -> list[Example]:
        """The training examples."""
        return load_examples(self.train, PAPER)


def changed(settings: Any, changes: dict[str, Any]) -> Any:
    """A copy of the dataclass with fields replaced; a dict replaces fields of a section."""
    sections = {
        k: changed(getattr(settings, k), v)
        for k, v in changes.items()
        if isinstance(v, dict) and dataclasses.is_dataclass(getattr(settings, k))
    }
    return dataclasses.replace(settings, **{**changes, **sections})


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """The lines of the run's metrics.jsonl, each of which has been checked."""
    return check_run(run_dir)


def parameters_of(policy: Path) -> dict[str, torch.Tensor]:
    """The parameters of a saved policy."""
    return dict(load_policy(policy).named_parameters())


def outcome(run_dir: Path, scratch: Path) -> dict[str, Any]:
    """All results of a finished run of srpo.train that must depend neither on kills nor on the clock."""
    result: dict[str, Any] = {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "rollouts.jsonl")}
    result |= {path.name: path.read_bytes() for path in (run_dir / "policy").iterdir()}
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None
    for rank_file in sorted(checkpoint.glob("rank_*.pt")):
        result[rank_file.name] = repr(torch.load(rank_file, weights_only=True))
    dcp_to_torch_save(checkpoint, scratch)
    flat = torch.load(scratch, weights_only=True)
    assert any(name.endswith("exp_avg") for name in flat)
    return result | {name: tensor.numpy().tobytes() for name, tensor in flat.items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rewrite_line(path: Path, out: Path, number: int, change: Callable[[dict[str, Any]], Any] | str) -> Path:
    """Write a copy of a JSON Lines file to `out` with line `number` changed by a function of its row, or replaced by a text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if isinstance(change, str):
        lines[number - 1] = change
    else:
        row = json.loads(lines[number - 1])
        lines[number - 1] = json.dumps(change(row) or row)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def complaint(main: Callable[[Any], None], settings: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error line that a program prints for bad settings; asserts that it is a single line and that the exit code is 2."""
    path = folder / "refused.toml"
    path.write_text(dump_toml(settings), encoding="utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_program(main, type(settings), ["@", str(path)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


class Program:
    """A real process `python -m MODULE @ settings.toml`, or the same under torchrun with `num_ranks` processes."""

    def __init__(self, module: str, settings: Any, folder: Path, num_ranks: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{module}.toml"
        path.write_text(dump_toml(settings), encoding="utf-8")
        launcher = [sys.executable]
        if num_ranks > 1:  # c10d finds a free port of this host
            launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
            launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
        # The ranks share this process's number of threads: results depend on it, bit for bit.
        env |= {"PYTHONHASHSEED": "random", "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // num_ranks))}
        self.log = folder / "output.txt"
        with self.log.open("a", encoding="utf-8") as log:
            command = [*launcher, "-m", module, "@", str(path)]
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)

    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """Send SIGKILL to the process and its ranks, and wait for the process."""
        for pid in [self.process.pid, *_descendants(self.process.pid)] if self.running() else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=60)

    def finish(self, timeout: float = 200) -> None:
        """Wait for the process to end; fail if its exit code is not 0."""
        try:
            code = self.process.wait(timeout=timeout)
        finally:
            self.kill()
        assert code == 0, self.log.read_text(encoding="utf-8")[-4000:]


def _descendants(pid: int) -> list[int]:
    """All descendants of a process (Linux). Needed because torchrun starts each rank in its own session."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, path.read_text().split())
    return children + [deeper for child in children for deeper in _descendants(child)]
