"""Runs of every program at its smallest, with faults: a file operation that fails or kills, a damaged file.

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
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import small_world as small
from same_numbers import digests
from smallest import MODULES, RUN, make_inputs, settings_of

from srpo.core.settings import dump_toml, run_program

HELPERS = Path(__file__).resolve().parent
FAULTS = {"full": errno.ENOSPC, "io": errno.EIO, "kill": 0, "read": errno.EIO}
FOREVER = 1 << 40
TIMEOUT = 300.0


# ---- one run -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How a run ended."""

    code: int  # exit code, or minus the number of the signal
    text: str  # what it printed as errors
    count: int  # number of operations that change (read) files below the run folder; 0 if it was killed

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
        self.stopped = self.case()
        self.start(self.stopped, self.end.count * 3 // 4, 0)
        resumed = self.case(self.stopped)
        self.num_reads = self.start(resumed, reads=True).count
        assert not (differing := self.differing(resumed)), differing
        shutil.rmtree(resumed)

    def case(self, like: Path | None = None) -> Path:
        """A new folder; with `like`, a copy of another one."""
        self._number += 1
        folder = self.out / str(self._number)
        if like is None:
            folder.mkdir()
        else:
            shutil.copytree(like, folder, symlinks=True)
        return folder

    def start(self, folder: Path, first: int = FOREVER, number: int = 0, last: int = FOREVER, reads: bool = False) -> End:
        """Run the program in a fork; file operations `first` to `last` fail with errno `number` (0: the first one kills).

        The operations counted are those that change files below the run folder, or with `reads` those that read them.
        """
        (folder / "settings.toml").write_text(dump_toml(self.settings), encoding="utf-8")
        counted, errors = folder / "count", folder / "errors.txt"
        counted.unlink(missing_ok=True)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            self._child(folder, errors, counted, (first, number, last, reads))
        status = _wait(pid)
        count = int(counted.read_text()) if counted.exists() else 0
        return End(os.waitstatus_to_exitcode(status), errors.read_text(encoding="utf-8", errors="replace"), count)

    def _child(self, folder: Path, errors: Path, counted: Path, fault: tuple[int, int, int, bool]) -> None:
        first, number, last, reads = fault
        code = 1
        try:
            os.chdir(folder)
            for descriptor, path in ((1, folder / "printed.txt"), (2, errors)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            libc = ctypes.CDLL(None)
            libc.fault_arm(str(folder / RUN).encode(), ctypes.c_long(first), number, ctypes.c_long(last), int(reads))
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
        """The n-th file operation fails (io), all from the n-th on fail (full), or the process is killed there; then again.

        read: the n-th one that reads files of a run that was killed before.
        """
        reads = kind == "read"
        folder = self.case(self.stopped if reads else None)
        end = self.start(folder, n, FAULTS[kind], n if kind in ("io", "read") else FOREVER, reads)
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
        damaged = _damage(folder / RUN, name, kind, rng)
        if not damaged:
            shutil.rmtree(folder)
            return result | {"outcome": "no such damage", "problem": ""}
        end = self.start(folder)
        problem, outcome = "", "one sentence"
        if end.code and not end.clear():
            problem = f"ended with {end.code}: {end.text[-1200:]}"
        if not end.code:
            differing = self.differing(folder)
            outcome = "same bits"
            if differing and damaged.issuperset(differing):  # a finished stage's, not used now; its COMPLETE still accuses it
                outcome, differing = "not read", []
            problem = f"differs: {differing}" if differing else ""
        return self._done(folder, result, outcome, problem)


def _damage(root: Path, name: str, kind: str, rng: random.Random) -> set[str]:
    """Damage a file below `root`. Returns the names of the files that are other ones now; empty if this kind does not apply."""
    path = root / name
    data = path.read_bytes()
    if kind == "deleted":
        path.unlink()
        return {name}
    if not data:
        return set()
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
            return set()
        other = rng.choice(sorted(others))
        path.write_bytes(other.read_bytes())
        if kind == "swapped":
            other.write_bytes(data)
            return {name, other.relative_to(root).as_posix()}
    return {name}


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
    """Results of jobs {"program", "faults": number of n per kind (0: all), "damage": number per kind (0: all, -1: none)};
    optional "kinds": those of `FAULTS` that are tried."""
    rng, until = random.Random(int(os.environ.get("SRPO_TEST_SEED", "0"))), time.monotonic() + seconds
    make_inputs(world)
    operations: dict[str, int] = {}
    for job in jobs:
        if time.monotonic() > until:
            break
        lab = Lab(world, out, job["program"])
        count = operations[job["program"]] = lab.end.count
        (out.parent / "operations.json").write_text(json.dumps(operations))
        cases: list[Callable[[], dict[str, Any]]] = []
        damaged: list[Callable[[], dict[str, Any]]] = []
        for kind in job.get("kinds", FAULTS):
            moments = range(1, (lab.num_reads if kind == "read" else count) + 1)
            chosen = rng.sample(moments, min(job["faults"] or len(moments), len(moments)))
            cases += [partial(lab.fault, kind, n) for n in chosen]
        if job["damage"] >= 0:
            for folder in (lab.stopped, lab.whole):
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
