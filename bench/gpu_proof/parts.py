"""A stage from inside: a process that appends one JSON line per part to a file as soon as the part has ended.

What a stage found before it was killed is therefore in the file. Needs no other package, so that the torch-free stages run on any
machine. The runner sets the environment variables named here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from failures import failures

ROOT = Path(__file__).resolve().parents[2]
RESULT, STATE, SMALL = "GPU_PROOF_RESULT", "GPU_PROOF_STATE", "GPU_PROOF_SMALL"
END = "GPU_PROOF_END"  # when the stage will be killed, on the clock of time.monotonic()
READING_S = 4.0  # of the time until then, for reading what a program of the stage has left

OUT_OF_MEMORY = "needs more GPU memory than is free"

Found = dict[str, Any] | None  # "figures": a list of `figure`; other keys are details
Parts = Mapping[str, Callable[[], Found]]


class Skip(Exception):
    """A part or a stage cannot run on this machine; the message is the reason, in one line."""


class Wrong(AssertionError):
    """A result that is not right. `details` hold what shows where."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


class Cut(Wrong):
    """The deadline ended a part. `details` hold what it had found."""


def small() -> bool:
    """Whether this is a dry run: everything small, on a CPU."""
    return os.environ.get(SMALL) == "1"


def state() -> Path:
    """Folder that stays between two calls of the program: built files, the demo's run."""
    return Path(os.environ[STATE])


def time_for(limit_s: float) -> tuple[float, bool]:
    """(seconds that a program of this stage may take, whether the stage's end leaves it less than its own limit)."""
    left = float(os.environ.get(END, "inf")) - time.monotonic() - READING_S
    return (limit_s, False) if left >= limit_s else (max(left, 0.0), True)


def figure(name: str, value: float, unit: str, **limit: Any) -> dict[str, Any]:
    """A measured value. `limit` says what bounds it: `floor` and `floor_of`, the bound in the same unit and its name; or `bytes`
    or `flops`, the least work, from which the report computes the bound at the rate measured by the stage "ceilings"."""
    return {"name": name, "value": value, "unit": unit, **limit}


def needs(*packages: str) -> None:
    """Raise Skip if a package is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} is not installed")


def write(line: dict[str, Any]) -> None:
    """Append a line to the result of the stage, on disk when this returns."""
    with Path(os.environ[RESULT]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def done() -> set[str]:
    """Names of the parts that have a line."""
    path = Path(os.environ[RESULT])
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {json.loads(line).get("part", "") for line in lines}


def out_of_memory(error: Exception) -> bool:
    """Whether the GPU had too little free memory."""
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    return (kind is not None and isinstance(error, kind)) or "CUDA error: out of memory" in str(error)


def run_parts(parts: Parts, usable: Callable[[], bool] = lambda: True) -> None:
    """Run each part, whatever the others do, and write its line: status ok, failed, skipped or cut, seconds, figures, details.

    An error of the device may stay in the process and fail all later parts: if `usable()` is false after a failed part, the
    process is replaced by a new one, which goes on with the next part.
    """
    earlier = done()
    for name, part in parts.items():
        if name in earlier:
            continue
        print(f"== {name}", flush=True)
        line: dict[str, Any] = {"part": name, "status": "ok"}
        begin = time.perf_counter()
        try:
            line |= part() or {}
        except Skip as reason:
            line |= {"status": "skipped", "reason": str(reason)}
        except failures() as error:
            traceback.print_exc()
            if out_of_memory(error):
                line |= {"status": "skipped", "reason": OUT_OF_MEMORY, "output": f"\n{error}"[:1500]}
            else:
                line |= {"status": "cut" if isinstance(error, Cut) else "failed", **_words(error)}
                line |= getattr(error, "details", {})
        line["seconds"] = round(time.perf_counter() - begin, 3)
        write(line)
        print(json.dumps(line, default=str), flush=True)
        if line["status"] == "failed" and not usable():
            print("the device is unusable in this process: the next part runs in a new one", flush=True)
            os.execv(sys.executable, sys.orig_argv)


def _words(error: Exception) -> dict[str, str]:
    """Type and first line of an error as the reason; the end of its other lines as output."""
    first, *others = [line for line in str(error).splitlines() if line.strip()] or [""]
    found = {"reason": f"{type(error).__name__}: {first}"[:500]}
    return found | ({"output": "\n" + "\n".join(others)[-1500:]} if others else {})
