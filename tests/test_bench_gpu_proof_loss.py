"""bench/gpu_proof: the stages of the loss, with programs in the place of bench/loss_kernel.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_modules import BENCH, proof_fixture

proof = proof_fixture("loss", "parts", "stages", "summary")


@pytest.fixture
def stand_in(proof: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """stand_in(body) puts a program in the place of loss_kernel.py; `write(result)` there writes its file. Returns the state
    folder, where the flags of each call are a line of `calls`."""
    monkeypatch.setattr(proof.loss, "ROOT", tmp_path)
    monkeypatch.setenv(proof.parts.STATE, str(tmp_path))
    monkeypatch.setenv(proof.parts.SMALL, "1")
    (tmp_path / "bench").mkdir()

    def put(body: str) -> Path:
        begin = [
            "import json, sys, time",
            "from pathlib import Path",
            f"with open({str(tmp_path / 'calls')!r}, 'a') as calls: print(*sys.argv[1:-2], file=calls)",
            "def write(result): Path(sys.argv[-1]).write_text(json.dumps(result))",
        ]
        (tmp_path / "bench" / "loss_kernel.py").write_text("\n".join([*begin, body, ""]), encoding="utf-8")
        return tmp_path

    return put


ROW = {
    "form": "logits",
    "arm": "srpo/cuda",
    "in_place": True,
    "median_ms": 1.3,
    "min_ms": 1.2,
    "peak_extra_bytes": 10,
    "failed": None,
}
ROW |= {"gradient_error": 0.001, "skipped": None}


def test_arms_stand_beside_their_bound(proof: SimpleNamespace) -> None:
    rows = [ROW, ROW | {"arm": "copy", "median_ms": 1.2, "gradient_error": None}, ROW | {"form": "top_k", "arm": "copy"}]
    rows += [ROW | {"arm": "verl", "median_ms": None, "skipped": "not installed"}]
    rows += [ROW | {"arm": "srpo/triton", "median_ms": None, "failed": "RuntimeError: boom"}]
    found = proof.loss.figures(rows)
    ours = next(figure for figure in found if figure["name"] == "srpo/cuda, logits, in place")
    assert (ours["value"], ours["floor"], ours["floor_of"], ours["peak_extra_bytes"]) == (1.3, 1.2, "copy", 10)
    assert len(found) == 3
    assert proof.loss.not_run(rows) == [
        "verl, logits, in place: not installed",
        "srpo/triton, logits, in place: failed, RuntimeError: boom",
    ]


@pytest.mark.parametrize("own_limit", [False, True])
def test_a_benchmark_that_is_cut_leaves_its_figures(
    proof: SimpleNamespace, stand_in: Any, monkeypatch: pytest.MonkeyPatch, own_limit: bool
) -> None:
    """At its own limit something hangs; at the stage's end nothing is wrong."""
    result = {"results": [ROW, ROW | {"arm": "copy", "median_ms": 1.2}], "doing": "round 2 of 7"}
    stand_in(f"write({result!r})\ntime.sleep(600)")
    limit = 3.0
    if not own_limit:
        monkeypatch.setenv(proof.parts.END, str(time.monotonic() + limit + proof.parts.READING_S))
    with pytest.raises(proof.parts.Wrong, match="at round 2 of 7") as wrong:
        proof.loss.bench("name", "--tokens 8 --vocab 8", limit if own_limit else 500, "logits")
    assert isinstance(wrong.value, proof.parts.Cut) == (not own_limit)
    assert len(wrong.value.details["figures"]) == 2


def test_the_loss_needs_memory_for_its_inputs(proof: SimpleNamespace) -> None:
    flags = ["--dtype", "bf16", "--tokens", "100", "--vocab", "1000", "--hidden", "64"]
    assert proof.loss.least_memory(flags) == 100 * 1000 * 6 + 8 * 1000 * 64


LOST_IN_VERL = "the device was lost in logits: verl, round 2: CUDA error: an illegal memory access"
BROKEN = {"results": [
    ROW | {"arm": "copy", "median_ms": 0.7, "rounds": 1, "failed": LOST_IN_VERL},
    ROW | {"median_ms": 0.9, "rounds": 1, "failed": LOST_IN_VERL},
    ROW | {"arm": "verl", "median_ms": None, "failed": "AcceleratorError: an illegal memory access"},
    ROW | {"arm": "liger", "median_ms": None, "skipped": "not installed"},
    ROW | {"arm": "eager", "median_ms": None, "failed": LOST_IN_VERL},
    ROW | {"arm": "verl", "form": "top_k", "median_ms": None, "failed": LOST_IN_VERL},
]}  # fmt: skip


@pytest.mark.parametrize("code", [0, 1])
def test_arms_that_a_broken_device_did_not_reach_are_run_once_more(proof: SimpleNamespace, stand_in: Any, code: int) -> None:
    """Without the arm that broke it. All figures come from the second run; nothing of ours failed, unless it says so."""
    second = {"results": [ROW | {"arm": "copy", "median_ms": 1.2}, ROW, ROW | {"arm": "eager", "median_ms": 3.0}]}
    folder = stand_in(
        f"write({second!r} if 'logits' in sys.argv else {BROKEN!r})\nsys.exit({code} if 'logits' in sys.argv else 1)"
    )
    flags = "--tokens 8 --vocab 8 --arms verl srpo --rounds 2"
    if code:
        with pytest.raises(proof.parts.Wrong, match="exit code 1") as wrong:
            proof.loss.bench("name", flags, 60, "logits")
        found = wrong.value.details
    else:
        found = proof.loss.bench("name", flags, 60, "logits")
    calls = (folder / "calls").read_text().splitlines()
    assert calls == [flags, "--tokens 8 --vocab 8 --rounds 2 --arms copy srpo/cuda eager --forms logits"]
    values = {figure["name"]: figure["value"] for figure in found["figures"]}
    assert values == {"copy, logits": 1.2, "srpo/cuda, logits, in place": 1.3, "eager, logits, in place": 3.0}
    assert {figure["floor"] for figure in found["figures"]} == {1.2}
    assert [text.split(": ")[0] for text in found["arms_not_run"]] == [
        "verl, logits, in place",
        "liger, logits, in place",
        "verl, top_k, in place",
    ]


def test_the_second_run_needs_time_and_may_fail(proof: SimpleNamespace, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of the first one stay."""
    folder = stand_in(f"if '--forms' not in sys.argv: write({BROKEN!r})\nsys.exit(1)")
    with pytest.raises(proof.parts.Wrong, match="of ours") as wrong:
        proof.loss.bench("name", "--tokens 8 --vocab 8", 60, "logits")
    assert len((folder / "calls").read_text().splitlines()) == 2
    assert {figure["value"] for figure in wrong.value.details["figures"]} == {0.7, 0.9}
    monkeypatch.setenv(proof.parts.END, str(time.monotonic() + proof.loss.LEAST_S + proof.parts.READING_S - 1))
    with pytest.raises(proof.parts.Wrong):
        proof.loss.bench("name", "--tokens 8 --vocab 8", 60, "logits")
    assert len((folder / "calls").read_text().splitlines()) == 3


def test_an_arm_of_ours_that_breaks_the_device_fails_the_part(proof: SimpleNamespace, stand_in: Any) -> None:
    """Although nothing is wrong with the arms of the second run."""
    lost = "the device was lost in logits: srpo/cuda: CUDA error: an illegal memory access"
    rows = [ROW | {"median_ms": None, "failed": lost}, ROW | {"arm": "eager", "median_ms": None, "failed": lost}]
    second = {"results": [ROW | {"arm": "copy", "median_ms": 1.2}, ROW | {"arm": "eager"}]}
    again = "again = '--forms' in sys.argv"
    stand_in(f"{again}\nwrite({second!r} if again else { {'results': rows}!r})\nsys.exit(0 if again else 1)")
    with pytest.raises(proof.parts.Wrong, match=r"failed of ours: .*srpo/cuda.*the device was lost") as wrong:
        proof.loss.bench("name", "--tokens 8 --vocab 8", 60, "logits")
    assert [figure["name"] for figure in wrong.value.details["figures"]] == ["eager, logits, in place"]


def test_a_benchmark_without_a_kernel_of_ours_is_no_proof(proof: SimpleNamespace, stand_in: Any) -> None:
    """It measured the bound and plain torch alone; the figures stay."""
    rows = [ROW | {"arm": "copy"}, ROW | {"arm": "srpo/reference"}, ROW | {"median_ms": None, "skipped": "no nvcc"}]
    stand_in(f"write({ {'results': rows}!r})")
    with pytest.raises(proof.parts.Wrong, match="no kernel of ours has a time") as wrong:
        proof.loss.bench("name", "--tokens 8 --vocab 8", 60, "logits")
    assert wrong.value.details["arms_not_run"] == ["srpo/cuda, logits, in place: no nvcc"]
    assert len(wrong.value.details["figures"]) == 2


@pytest.mark.parametrize("status", ["ok", "cut", "failed"])
def test_the_summary_shows_once_the_arms_that_did_not_run(proof: SimpleNamespace, status: str) -> None:
    text = "srpo/cuda, logits: no nvcc"
    part = {"part": "bf16", "status": status, "reason": "r", "seconds": 1.0, "arms_not_run": [text]}
    entry = {"stage": "loss_logits", "status": status, "reason": "r", "seconds": 2.0, "key": "k", "parts": [part]}
    shown = proof.summary.summary(proof.stages.STAGES, {"loss_logits": entry}, "k")
    assert shown.count(text) == 1


def test_the_words_of_a_lost_device_are_those_of_the_benchmark(proof: SimpleNamespace) -> None:
    assert f'DeviceLost(f"{proof.loss.LOST}{{what}}: ' in (BENCH / "loss_kernel.py").read_text(encoding="utf-8")
