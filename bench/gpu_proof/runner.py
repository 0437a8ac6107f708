"""Runs the stages in two lanes, each stage as a process with a limit, and keeps every result at once.

Results and the ends of logs lie in the state folder, which outlives a call, and in OUT: `results.jsonl` (one line per stage),
`logs.txt`. A later call brings the earlier lines along and does first what has not passed yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_proof import parts
from gpu_proof.card import query_card
from gpu_proof.parts import ROOT
from gpu_proof.processes import Ended, ends, run_capped
from gpu_proof.stages import Stage
from gpu_proof.unpack import archives

Entry = dict[str, Any]
END_S = 8.0  # seconds before the deadline that are left for the report
LEAST_S = 5.0  # a stage is not started with less time
DRY_RUN_FACTOR = 3  # no card waits for a dry run, and its machine may be busy: its stages get so much more time
ENTRY = {"stage", "status", "reason", "seconds", "key", "time"}
_TAIL = 3000  # characters of a failed stage's log in its result


class Runner:
    """The stages of one call. `say(entry)` is called with each result, `warn(text)` with what could not be written."""

    def __init__(
        self,
        stages: Sequence[Stage],
        out: Path,
        state: Path,
        *,
        dry_run: bool,
        say: Callable[[Entry], None],
        warn: Callable[[str], None] = print,
    ) -> None:
        """Raises OSError if one of the folders cannot be written."""
        self.stages, self.out, self.state, self.dry_run, self.say, self.warn = stages, out, state, dry_run, say, warn
        for folder in (out, state / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        with (state / "results.jsonl").open("a", encoding="utf-8"):  # fails now, not after the first stage
            pass
        self.key = key_of(dry_run)
        self.entries = _read_entries(state / "results.jsonl")
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._unwritten: set[Path] = set()  # folders of which `warn` has been told
        lines = [json.dumps(entry) + "\n" for entry in self.entries.values()]
        (out / "results.jsonl").write_text("".join(lines), encoding="utf-8")
        self._write_logs()

    def run(self, deadline_s: float, *, only: Collection[str] = (), again: Collection[str] = ()) -> None:
        """Run what has not passed, and `again`, until the deadline: seconds from now. only: no others than these and what they
        wait for."""
        deadline = time.monotonic() + deadline_s - END_S
        chosen = [stage for stage in self.stages if not only or stage.name in only]
        passed = {stage.name for stage in self.stages if self._has_passed(stage) and stage.name not in again}
        fresh = {name for name in passed if self.entries[name]["key"] == self.key}
        waiting = {stage.name for stage in chosen if stage.name not in passed}
        first = waiting | ({name for stage in chosen if stage.name in waiting for name in stage.after} - fresh)
        last = {stage.name for stage in chosen if stage.name in passed - fresh}  # passed with other sources: once more
        last |= {name for stage in chosen if stage.name in last for name in stage.after} - fresh - first
        queue = [stage for names in (first, last - first) for stage in self.stages if stage.name in names]
        ended = {stage.name: threading.Event() for stage in queue}
        lanes = [
            threading.Thread(target=self._lane, args=([s for s in queue if s.lane == lane], lane, ended, deadline))
            for lane in ("cpu", "gpu")
        ]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()

    def _has_passed(self, stage: Stage) -> bool:
        """Whether an earlier call proved the stage, and what it left for others is still there."""
        passed = self.entries.get(stage.name, {}).get("status") == "ok"
        return passed and all((self.state / name).exists() for name in stage.products)

    def stop(self) -> None:
        """End the running stages; `run` then returns."""
        self._stop.set()

    def _lane(self, stages: Sequence[Stage], lane: str, ended: dict[str, threading.Event], deadline: float) -> None:
        cores = lane_cores(lane, sorted(os.sched_getaffinity(0)))
        for stage in stages:
            for name in stage.after:
                while name in ended and not ended[name].wait(0.1) and time.monotonic() < deadline and not self._stop.is_set():
                    pass
            try:
                self._one(stage, deadline, cores)
            except OSError as error:  # the state folder is full or gone: the next stage may find room
                words = f"not run, its files cannot be written: {error}"
                self._record({"stage": stage.name, "status": "failed", "reason": words, "seconds": 0.0, "parts": []})
            finally:
                ended[stage.name].set()

    def _one(self, stage: Stage, deadline: float, cores: set[int]) -> None:
        """Run a stage and record its result."""
        left = deadline - time.monotonic()
        if left < LEAST_S or self._stop.is_set():
            self._record({"stage": stage.name, "status": "cut", "reason": "not started: no time was left", "seconds": 0.0})
            return
        result, log = self.state / f"{stage.name}.parts.jsonl", self.state / f"{stage.name}.log"
        result.unlink(missing_ok=True)
        cap_s = stage.cap_s * (DRY_RUN_FACTOR if self.dry_run else 1)
        cap = min(cap_s, left)
        end = run_capped(
            stage.command,
            cap,
            log,
            env=self.environment(result, time.monotonic() + cap),
            folder=ROOT,
            cores=cores,
            stop=self._stop,
        )
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        words = f"killed ({end.killed})" if end.killed else f"exit code {end.code}"
        title = f"##### {stage.name}: {words}, {end.seconds:.1f} s"
        with self._told(self.state):
            (self.state / "logs" / f"{stage.name}.txt").write_text(f"{title}\n{ends(text)}\n", encoding="utf-8")
        entry = {"stage": stage.name, **judge(end, read_parts(result), shortened=cap < cap_s)}
        entry |= {"seconds": round(end.seconds, 1), "code": end.code}
        if entry["status"] in ("failed", "cut"):
            entry["tail"] = text[-_TAIL:]
        self._record(entry)

    def environment(self, result: Path, end: float) -> dict[str, str]:
        """Environment of a stage that ends by then: the checkout and the unpacked packages can be imported, no downloads."""
        paths = [ROOT, ROOT / "kernels", ROOT / "tests" / "helpers", ROOT / "bench", self.state / "site"]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        env |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {parts.RESULT: str(result), parts.STATE: str(self.state), parts.END: str(end)}
        return env | ({parts.SMALL: "1", "CUDA_VISIBLE_DEVICES": ""} if self.dry_run else {})

    def _record(self, entry: Entry) -> None:
        """Keep a result: in the state folder and in OUT, on disk. A stage that was cut keeps an earlier result that passed.

        A folder that cannot be written costs no result of the other one.
        """
        entry |= {"key": self.key, "time": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())}
        with self._lock:
            if entry["status"] == "cut" and self.entries.get(entry["stage"], {}).get("status") == "ok":
                return
            self.entries[entry["stage"]] = entry
            for folder in (self.state, self.out):
                with self._told(folder):
                    _append(folder / "results.jsonl", entry)
            with self._told(self.out):
                self._write_logs()
            self.say(entry)

    @contextmanager
    def _told(self, folder: Path) -> Iterator[None]:
        """Go on after an OSError of a folder; `warn` is told once for each."""
        try:
            yield
        except OSError as error:
            if folder not in self._unwritten:
                self._unwritten.add(folder)
                self.warn(f"{folder} cannot be written: {error}")

    def _write_logs(self) -> None:
        names = [stage.name for stage in self.stages]
        paths = [path for name in names if (path := self.state / "logs" / f"{name}.txt").is_file()]
        text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
        (self.out / "logs.txt").write_text(text, encoding="utf-8")


def _append(path: Path, entry: Entry) -> None:
    """Add a line to a file, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def judge(end: Ended, lines: list[dict[str, Any]], *, shortened: bool) -> Entry:
    """Status and parts of a stage that has ended. shortened: the deadline left it less time than its own limit.

    ok: all parts are right, or were skipped while others ran. skipped: nothing could run. cut: the deadline came first.
    """
    skips = [line["skip"] for line in lines if "skip" in line]
    found = [line for line in lines if "part" in line]
    wrong = [line for line in found if line["status"] == "failed"]
    entry: Entry = {"parts": found}
    if wrong:
        return entry | {"status": "failed", "reason": f"{len(wrong)} of {len(found)} parts: {wrong[0]['reason']}"}
    by_deadline = shortened or end.killed == "stopped"  # else the stage took longer than its own limit
    if cut := [line for line in found if line["status"] == "cut"]:
        return entry | {"status": "cut" if by_deadline else "failed", "reason": f"{cut[0]['part']}: {cut[0]['reason']}"}
    if end.killed and by_deadline:
        return entry | {"status": "cut", "reason": f"the deadline came after {len(found)} parts"}
    if end.killed:
        return entry | {"status": "failed", "reason": f"still running at its limit, {len(found)} parts done: see its stacks"}
    if end.code:
        return entry | {"status": "failed", "reason": f"exit code {end.code} after {len(found)} parts"}
    if skips:
        return entry | {"status": "skipped", "reason": skips[0]}
    if not found:
        return entry | {"status": "failed", "reason": "it ended without a result"}
    if all(line["status"] == "skipped" for line in found):
        return entry | {"status": "skipped", "reason": found[0]["reason"]}
    return entry | {"status": "ok", "reason": ""}


def read_parts(path: Path) -> list[dict[str, Any]]:
    """The lines of a stage; a line that a kill has cut short is left out, and what is no object."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def _read_entries(path: Path) -> dict[str, Entry]:
    """The last result of each stage; lines that lack something are left out."""
    return {entry["stage"]: entry for entry in read_parts(path) if entry.keys() >= ENTRY}


def lane_cores(lane: str, cores: Sequence[int]) -> set[int]:
    """The cores of a lane: half of the machine's each, or all if there are fewer than four."""
    half = len(cores) // 2
    return set(cores) if len(cores) < 4 else set(cores[:half] if lane == "gpu" else cores[half:])


def key_of(dry_run: bool) -> str:
    """Digest of what a result depends on: the sources, the Python, the card, the packages that were carried along."""
    wheels = os.environ.get("GPU_PROOF_WHEELS")
    carried = [(path.name, path.stat().st_size) for path in archives(Path(wheels))] if wheels else []
    digest = hashlib.sha256(repr((dry_run, sys.executable, query_card("name"), carried)).encode())
    for folder in ("csrc", "kernels", "srpo", "bench", "tests"):
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".h", ".cuh", ".cu", ".cpp")):
            digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]
