"""Runs of every program at its smallest, with faults: a file operation that fails or kills, a damaged file, changed inputs.

`python fault_lab.py WORLD OUT JOBS.json` works on a list of jobs and writes OUT/results.json, a result per job. Its libc is
`faults.c` (LD_PRELOAD); each run is a fork of this process, so it costs no imports. After each fault the same command is started
again, and what it leaves is compared with an unbroken run: the only outcomes are "same bits" and "one sentence".
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import small_world as small
from same_numbers import digests

from srpo.core.config.demo import DemoConfig
from srpo.core.config.dpo import DpoConfig
from srpo.core.config.evaluation import BootstrapConfig, EvaluateConfig
from srpo.core.config.judge import JudgeConfig, JudgeGrpoConfig, MineConfig
from srpo.core.config.reproduce import ReproduceConfig, Scale
from srpo.core.config.selection import Criteria, SelectConfig
from srpo.core.config.train import OptimizerConfig, PolicyConfig, RolloutConfig
from srpo.core.settings import dump_toml, run_program
from srpo.data.pairs import read_pairs
from srpo.experiments import lab as stages

HELPERS = Path(__file__).resolve().parent
RUN = Path("run")  # the run folder, below the folder of each case
FAULTS = {"full": errno.ENOSPC, "io": errno.EIO, "kill": 0}
FOREVER = 1 << 40
TIMEOUT = 300.0


# ---- the programs --------------------------------------------------------------------------------------------------------------


def _train(world: small.SmallWorld) -> Any:
    return world.config(
        RUN,
        num_steps=2,
        data={"eval": str(world.eval)},
        rollout={"num_prompts": 2, "group_size": 4, "max_new_tokens": 64},  # some responses are whole and earn a reward
        sampler={"difficulty_low": -1.0, "difficulty_high": 2.0},
        train={"checkpoint_every": 1, "eval_examples": 2},
    )


def _judge(world: small.SmallWorld) -> JudgeConfig:
    optimizer = OptimizerConfig(lr=1e-3)
    return JudgeConfig(
        run_dir=str(RUN),
        data=str(world.train),
        rollouts=str(world.folder / "faults" / "rollouts.jsonl"),
        annotator_reasons=False,
        held_out=2,
        num_votes=1,
        max_new_tokens=8,
        sft=replace(world.sft_config(RUN, num_steps=2, batch_size=2), data="", optimizer=optimizer),
        mine=MineConfig(num_responses=4, num_votes=2, num_cases=4, solve_low=-1.0, solve_high=2.0, balance=()),
        grpo=JudgeGrpoConfig(num_steps=1, rollout=RolloutConfig(num_prompts=2, group_size=2), optimizer=optimizer),
    )


def settings_of(program: str, world: small.SmallWorld) -> Any:
    """The settings of a program at its smallest, for the run folder `run`."""
    train = _train(world)
    if program == "train":
        return train
    if program == "ppo":
        return small.changed(train, {"advantage": {"method": "ppo"}})
    if program == "sft":
        return world.sft_config(RUN, num_steps=2, batch_size=4, checkpoint_every=1)
    if program == "dpo":
        policy = PolicyConfig(path=str(world.policy))
        return DpoConfig(
            run_dir=str(RUN),
            pairs=str(world.folder / "faults" / "pairs.jsonl"),
            num_steps=2,
            batch_size=2,
            checkpoint_every=1,
            policy=policy,
        )
    if program == "select":
        criteria = Criteria(difficulty_low=-1.0, difficulty_high=2.0, uniform="keep")
        fields = vars(small.changed(train, {"data": {"train": str(world.eval), "eval": ""}}))
        return SelectConfig(**fields, shard_examples=4, select=criteria)
    if program == "evaluate":
        bootstrap = BootstrapConfig(num_draws=20)
        files: dict[str, Any] = {"checkpoint": str(world.policy), "data": str(world.eval), "out": str(RUN)}
        return EvaluateConfig(**files, limit=3, max_new_tokens=16, bootstrap=bootstrap)
    if program == "train_judge":
        return _judge(world)
    if program == "scalar":
        return replace(_judge(world), kind="scalar")
    if program == "demo":
        sizes: dict[str, Any] = {"num_demonstrations": 40, "num_train": 16, "num_eval": 4, "model": small.TINY}
        rl: dict[str, Any] = {"rl_steps": 1, "num_prompts": 2, "group_size": 2, "max_new_tokens": 16}
        return DemoConfig(run_dir=str(RUN), **sizes, **rl, vocab_size=500, sft_steps=2, sft_batch=4)
    scale = Scale(num_steps=1, num_prompts=2, group_size=4, eval_examples=2, num_eval=2, dpo_prompts=24, dpo_steps=1)
    files = {"train.jsonl": world.train, "eval.jsonl": world.eval, "eval_balanced.jsonl": world.eval}
    stages.Lab.data = lambda self, name="train.jsonl": files[name]  # the stages before are those of the demo
    stages.Lab.sft = lambda self: world.policy
    return ReproduceConfig(table="table4", run_dir=str(RUN), seeds=(0,), scale=scale)


MODULES = {"ppo": "train", "scalar": "train_judge"}
PROGRAMS = ("train", "ppo", "sft", "dpo", "select", "evaluate", "train_judge", "scalar", "demo", "reproduce")


def make_inputs(world: small.SmallWorld) -> None:
    """Files that some programs read: sampled responses and preferences, in `faults` beside the data of the world."""
    folder = world.folder / "faults"
    if folder.is_dir():
        return
    aside = folder.with_name("faults.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    cfg = small.changed(_train(world), {"run_dir": str(aside / "run"), "data": {"eval": ""}, "num_steps": 2})
    cfg = small.changed(cfg, {"rollout": {"num_prompts": 4}})
    import srpo.train

    srpo.train.train(cfg, small.ONE)
    shutil.copy(aside / "run" / "rollouts.jsonl", aside / "rollouts.jsonl")
    pairs = list(read_pairs(world.pairs))[:6]
    rows = [
        {"prompt": prompt, "chosen": right, "rejected": wrong}
        for (prompt, right), (_, wrong) in zip(pairs, pairs[1:] + pairs[:1], strict=True)
    ]
    (aside / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.rename(folder)


# ---- one run -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How a run ended."""

    code: int  # exit code, or minus the number of the signal
    text: str  # what it printed as errors
    count: int  # number of file operations below the run folder; 0 if it was killed

    def clear(self) -> bool:
        """Whether it said in one line what is wrong."""
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(lines) == 1 and "Traceback" not in self.text


class Lab:
    """Cases of one program; each has a folder of its own with `run` inside."""

    def __init__(self, world: small.SmallWorld, out: Path, program: str) -> None:
        import importlib

        module = importlib.import_module(f"srpo.{MODULES.get(program, program)}")
        self.world, self.out, self.program = world, out / program, program
        self.main, self.settings = module.main, settings_of(program, world)
        self.out.mkdir(parents=True, exist_ok=True)
        self._number = 0
        self.whole = self.case()
        self.end = self.start(self.whole)
        assert self.end.code == 0, self.end.text
        self.digests = digests(self.whole / RUN)
        if program in ("train", "ppo"):
            assert any(row.get("train/grad_norm") for row in small.metrics_of(self.whole / RUN)), "nothing was trained"

    def case(self, like: Path | None = None) -> Path:
        """A new folder; with `like`, a copy of another one."""
        self._number += 1
        folder = self.out / str(self._number)
        if like is None:
            folder.mkdir()
        else:
            shutil.copytree(like, folder, symlinks=True)
        return folder

    def start(self, folder: Path, first: int = FOREVER, number: int = 0, last: int = FOREVER, settings: Any = None) -> End:
        """Run the program in a fork; file operations `first` to `last` fail with errno `number` (0: the first one kills)."""
        (folder / "settings.toml").write_text(dump_toml(settings or self.settings), encoding="utf-8")
        counted, errors = folder / "count", folder / "errors.txt"
        counted.unlink(missing_ok=True)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            self._child(folder, errors, counted, first, number, last)
        status = _wait(pid)
        count = int(counted.read_text()) if counted.exists() else 0
        return End(os.waitstatus_to_exitcode(status), errors.read_text(encoding="utf-8", errors="replace"), count)

    def _child(self, folder: Path, errors: Path, counted: Path, first: int, number: int, last: int) -> None:
        code = 1
        try:
            os.chdir(folder)
            for descriptor, path in ((1, folder / "printed.txt"), (2, errors)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            libc = ctypes.CDLL(None)
            libc.fault_arm(str(folder / RUN).encode(), ctypes.c_long(first), number, ctypes.c_long(last))
            try:
                run_program(self.main, type(self.settings), ["@", "settings.toml"])
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
            except BaseException:  # noqa: BLE001 the child ends here, whatever it was
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            counted.write_text(str(libc.fault_count()))
        finally:
            os._exit(code)

    def differing(self, folder: Path) -> list[str]:
        """Files that differ from those of the unbroken run, or are missing, or too many."""
        found = digests(folder / RUN)
        return sorted(name for name in found.keys() | self.digests.keys() if found.get(name) != self.digests.get(name))

    # -- faults

    def fault(self, kind: str, n: int) -> dict[str, Any]:
        """The n-th file operation fails (io), all from the n-th on fail (full), or the process is killed there; then again."""
        folder = self.case()
        end = self.start(folder, n, FAULTS[kind], n if kind == "io" else FOREVER)
        result: dict[str, Any] = {"program": self.program, "fault": kind, "n": n, "code": end.code}
        problem = ""
        if kind == "kill":
            problem = "" if end.code in (-signal.SIGKILL, 0) else f"ended with {end.code}: {end.text[-600:]}"
        elif end.code and not end.clear():
            problem = f"ended with {end.code}: {end.text[-1200:]}"
        again = self.start(folder)
        if not problem and again.code:
            problem = f"the same command ended with {again.code}: {again.text[-1200:]}"
        if not problem and (differing := self.differing(folder)):
            problem = f"differs after the same command: {differing}"
        what = {0: "", 2: "one sentence, then "}.get(end.code, "killed, then ")
        return self._done(folder, result, f"{what}same bits", problem)

    def _done(self, folder: Path, result: dict[str, Any], outcome: str, problem: str) -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        return result | {"outcome": "fault" if problem else outcome, "problem": problem}

    # -- damage

    def damage(self, stopped: Path, name: str, kind: str, rng: random.Random) -> dict[str, Any]:
        """Damage a file of a run that was killed, and start it again: same bits, or one sentence."""
        folder = self.case(stopped)
        result = {"program": self.program, "fault": kind, "file": name}
        if not _damage(folder / RUN / name, kind, rng):
            shutil.rmtree(folder)
            return result | {"outcome": "no such damage", "problem": ""}
        end = self.start(folder)
        problem, outcome = "", "one sentence"
        if end.code and not end.clear():
            problem = f"ended with {end.code}: {end.text[-1200:]}"
        if not end.code:
            differing = self.differing(folder)
            outcome = "same bits"
            if differing == [name]:  # the result of a finished stage that this start does not use; its COMPLETE still accuses it
                outcome, differing = "not read", []
            problem = f"differs: {differing}" if differing else ""
        return self._done(folder, result, outcome, problem)

    def stopped_at(self, n: int) -> Path:
        """A run that was killed at the n-th file operation."""
        folder = self.case()
        self.start(folder, n, 0)
        return folder


def _damage(path: Path, kind: str, rng: random.Random) -> bool:
    """Damage a file; False if this kind does not apply."""
    data = path.read_bytes()
    if kind == "deleted":
        path.unlink()
        return True
    if not data:
        return False
    if kind == "emptied":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flipped":
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
    else:  # swapped with a sibling, which also is the older version of a checkpoint's file
        siblings = [p for p in path.parent.parent.rglob("*") if p.is_file() and p != path and p.suffix == path.suffix]
        others = [p for p in siblings if p.read_bytes() != data]
        if not others:
            return False
        other = rng.choice(sorted(others))
        path.write_bytes(other.read_bytes())
        if kind == "swapped":
            other.write_bytes(data)
    return True


DAMAGE = ("flipped", "cut", "emptied", "deleted", "swapped", "replaced")


def _wait(pid: int) -> int:
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


# ---- the whole -----------------------------------------------------------------------------------------------------------------


def results(world: small.SmallWorld, out: Path, jobs: list[dict[str, Any]], seconds: float) -> Iterator[dict[str, Any]]:
    """Results of jobs {"program", "faults": number of n per kind (0: all), "damage": number per kind (0: all, -1: none)}."""
    rng, until = random.Random(int(os.environ.get("SRPO_TEST_SEED", "0"))), time.monotonic() + seconds
    make_inputs(world)
    operations: dict[str, int] = {}
    for job in jobs:
        if time.monotonic() > until:
            break
        lab = Lab(world, out, job["program"])
        count = operations[job["program"]] = lab.end.count
        (out.parent / "operations.json").write_text(json.dumps(operations))
        moments = list(range(1, count + 1))
        cases: list[Callable[[], dict[str, Any]]] = []
        damaged: list[Callable[[], dict[str, Any]]] = []
        for kind in FAULTS:
            chosen = rng.sample(moments, min(job["faults"] or count, count))
            cases += [partial(lab.fault, kind, n) for n in chosen]
        if job["damage"] >= 0:
            stopped = lab.stopped_at(count * 3 // 4)
            for folder in (stopped, lab.whole):
                names = sorted(p.relative_to(folder / RUN).as_posix() for p in (folder / RUN).rglob("*") if p.is_file())
                pairs = [(name, kind) for name in names for kind in DAMAGE]
                chosen_pairs = rng.sample(pairs, min(job["damage"] or len(pairs), len(pairs)))
                damaged += [partial(lab.damage, folder, name, kind, rng) for name, kind in chosen_pairs]
        rng.shuffle(cases)
        rng.shuffle(damaged)
        both = (case for pair in zip_longest(cases, damaged) for case in pair if case)  # time may end before all are tried
        for case in both:
            if time.monotonic() > until:
                break
            yield case()


@contextmanager
def library(folder: Path) -> Iterator[Path]:
    """`faults.c`, compiled."""
    path = folder / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(path), str(HELPERS / "faults.c"), "-ldl"], check=True)
    yield path


def launch(world: Path, out: Path, jobs: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """`results` in a process of its own with `faults.c`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "jobs.json").write_text(json.dumps(jobs))
    with library(out) as preload:
        paths = os.pathsep.join(map(str, (small.ROOT, small.ROOT / "kernels", HELPERS, small.ROOT / "tools")))
        env = {**os.environ, "LD_PRELOAD": str(preload), "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
        env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), str(world), str(out), str(seconds)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def main(world: str, out: str, seconds: str) -> None:
    """Work on the jobs in `out` and write their results."""
    folder = Path(out)
    with (folder / "results.jsonl").open("w") as file:
        for result in results(
            small.SmallWorld(Path(world)), folder / "cases", json.loads((folder / "jobs.json").read_text()), float(seconds)
        ):
            file.write(json.dumps(result) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
