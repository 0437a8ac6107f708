"""An engine's process without vLLM, run as `python fake_engine.py TRICKS SOCKET SOCKET`. It holds tensors by name and reports
their sum as log-probabilities, so that a test sees which weights were used. TRICKS is JSON that says where it fails. A failure
happens once: it is recorded in a file, so that the next process does not fail there."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from srpo.rollout.engine import SamplingParams
from srpo.rollout.vllm.server import Group, serve
from srpo.rollout.weights.buckets import add_sums, bit_sum


class FakeBackend:
    """Its tricks: `stale`, parameters that a sync does not change; `die`, `hang`, `raise`, the place (or PLACE:NUMBER) where it
    fails, once or `always`; `marker`, the file that records a failure; `lose`, number of samples missing from each group;
    `pause_s`, seconds before each group; `diary`, a file that gets `g` for each group begun and `a` for each abort; `journal`, a
    file that gets a line for each place passed; `facts`, more of what a start returns; `settings`, a file that gets a line with
    the settings of each start."""

    def __init__(self, tricks: dict[str, Any]) -> None:
        self.tricks = tricks
        self.weights: dict[str, torch.Tensor] = {}
        self.arrived: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def here(self, place: str) -> None:
        count = self.counts[place] = self.counts.get(place, 0) + 1
        if "journal" in self.tricks:
            with Path(self.tricks["journal"]).open("a", encoding="utf-8") as journal:
                journal.write(place + "\n")
        for failure in ("die", "hang", "raise"):
            if self.tricks.get(failure) in (place, f"{place}:{count}"):
                marker = Path(self.tricks["marker"])
                if marker.exists() and not self.tricks.get("always"):
                    return
                marker.touch()
                if failure == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif failure == "hang":
                    time.sleep(3600)
                raise RuntimeError(f"no luck in {place}")

    def start(self, settings: dict[str, Any]) -> dict[str, Any]:
        self.here("start")
        if "settings" in self.tricks:
            with Path(self.tricks["settings"]).open("a", encoding="utf-8") as file:
                file.write(json.dumps(settings) + "\n")
        return {"max_context": settings["max_context"] or 64} | self.tricks.get("facts", {})

    def begin_weights(self) -> None:
        self.here("begin")
        self.arrived = {}

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self.here("load")
        self.arrived |= dict(named)

    def load_handles(self, update: dict[str, Any]) -> None:
        raise AssertionError("no GPU here")

    def finish_weights(self) -> dict[str, int]:
        self.here("finish")
        stale = self.tricks.get("stale", [])
        self.weights |= {k: v.clone() for k, v in self.arrived.items() if k not in stale or k not in self.weights}
        self.arrived = {}
        sums: dict[str, int] = {}
        add_sums(sums, [(name, bit_sum(tensor)) for name, tensor in self.weights.items()])
        return sums

    def generate(
        self, prompts: Sequence[tuple[int, list[int]]], params: SamplingParams, seeds: Sequence[int]
    ) -> Generator[Group | None, None, None]:
        """Responses [prompt index, seed mod 1000]; every log-probability is minus the sum of all weights. Last prompts first."""
        total = sum(float(tensor.double().sum()) for tensor in self.weights.values())
        for (index, _), seed in reversed(list(zip(prompts, seeds, strict=True))):
            self.here("generate")
            self.note("g")
            time.sleep(self.tricks.get("pause_s", 0.0))
            repeats = params.group_size - int(self.tricks.get("lose", 0))
            support = base64.b64encode(b"".join(k.to_bytes(4, "little") for k in (index, 7, 8, 9))).decode()
            routed = 1, 2, base64.b64encode(b"".join(k.to_bytes(2, "little") for k in (index, 3, 4, 5))).decode()
            tables = (support if params.support else None, routed if params.routing else None)
            try:
                yield None
                response = ([index, seed % 1000], [-total, -total], "stop")
                yield index, [(*response, *tables) if params.support or params.routing else response] * repeats
            except GeneratorExit:
                self.note("a")
                raise

    def note(self, letter: str) -> None:
        if "diary" in self.tricks:
            with Path(self.tricks["diary"]).open("a") as diary:
                diary.write(letter)

    def sleep(self) -> None:
        self.here("sleep")
        self.weights = {}

    def wake(self, tags: list[str] | None) -> None:
        self.here(f"wake {tags}")


def main(argv: Sequence[str]) -> None:
    serve(FakeBackend(json.loads(argv[1])), argv)


if __name__ == "__main__":
    main(sys.argv)
