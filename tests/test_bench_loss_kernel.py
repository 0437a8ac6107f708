"""bench/loss_kernel.py: every arm computes the loss, the result has the promised form, and memory is measured right."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIELDS = {"arm", "form", "in_place", "dtype", "tokens", "vocab", "hidden", "median_ms", "min_ms", "peak_extra_bytes", "skipped"}
NAMES = {
    *(
        "srpo/reference",
        "srpo/cpu",
        "srpo/triton",
        "srpo/triton-v2",
        "srpo/cuda",
        "copy",
        "eager",
        "compile/log_softmax",
        "compile/logsumexp",
    ),
    *("trl", "liger", "liger/fused_linear", "verl", "linear_cross_entropy", "cce", "quack", "matmul"),
}
OTHERS = ("trl", "liger_kernel", "verl", "cut_cross_entropy", "quack")
PLAIN = ("srpo/reference", "srpo/cpu", "eager")
# Largest relative error of a gradient. Rounding the exact gradient to bf16 changes each entry by at most 2^-8.
EXACT = {"fp32": 1e-6, "bf16": 2**-8}
# The bound for arms that round logits, log-probabilities or losses to bf16: one of a sequence's few tokens may then fall on the
# other side of a clip edge. The test in fp32 shows that such an arm is called correctly.
COARSE = {"fp32": 2e-6, "bf16": 0.5}


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    """The modules of the benchmark."""
    path = list(sys.path)
    sys.path.insert(0, str(BENCH))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in ("loss_kernel", "arms", "problem")})
    finally:
        sys.path[:] = path


@pytest.fixture
def without_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the other packages, as if they were not installed."""
    for name in OTHERS:
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)


def run(bench: SimpleNamespace, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """The program's JSON output for a tiny problem on the CPU."""
    path = tmp_path / "result.json"
    small = ("--device", "cpu", "--tokens", "16", "--vocab", "50", "--rounds", "3", "--warmup", "1", "--json", str(path))
    assert bench.loss_kernel.main([*small, *flags]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def problem(bench: SimpleNamespace, form: str, dtype: str) -> Any:
    """Four sequences of eight tokens."""
    data = bench.problem.Problem(form, 32, 1003, 64, DTYPES[dtype], torch.device("cpu"), length=8)
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    data.refill(seed)
    return data


def arms(bench: SimpleNamespace, *names: str) -> list[Any]:
    return [arm for arm in bench.arms.ARMS if arm.name in names]


def test_every_promised_arm_is_there_and_ours_also_in_place(bench: SimpleNamespace) -> None:
    assert {arm.name for arm in bench.arms.ARMS} == NAMES
    lines = [(arm.name, arm.form, arm.in_place) for arm in bench.arms.ARMS]
    assert len(set(lines)) == len(lines)
    for impl in ("cpu", "triton", "cuda"):
        assert {(f"srpo/{impl}", "logits", True), (f"srpo/{impl}", "logits", False)} <= set(lines)


@pytest.mark.usefixtures("without_others")
@pytest.mark.parametrize("hidden", [0, 32])
def test_the_result_has_the_promised_form(
    bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], hidden: int
) -> None:
    names = sorted(NAMES - {"compile/log_softmax", "compile/logsumexp"})  # these take a compiler's time: a test of their own
    result = run(bench, tmp_path, "--hidden", str(hidden), "--arms", *names)
    assert {"machine", "versions", "results", "rounds", "seconds", "commit"} <= set(result)
    assert {"device", "cpu", "threads", "copy_bytes_per_s"} <= set(result["machine"])
    assert {"python", "torch"} <= set(result["versions"])
    assert {row["form"] for row in result["results"]} == ({"logits", "hidden"} if hidden else {"logits"})
    shown = capsys.readouterr().out
    for row in result["results"]:
        assert set(row) >= FIELDS
        assert row["arm"] in shown
        assert (row["dtype"], row["tokens"], row["vocab"]) == ("fp32", 16, 50)
        assert row["hidden"] == (hidden if row["form"] == "hidden" else 0)
        if row["skipped"]:
            assert row["skipped"] in shown
            assert row["median_ms"] is row["min_ms"] is row["peak_extra_bytes"] is row["percent_of_bound"] is None
        else:
            assert 0 < row["min_ms"] <= row["median_ms"]
    ran = {row["arm"] for row in result["results"] if not row["skipped"]}
    assert {"copy", "eager", "srpo/reference"} <= ran
    skipped = {row["arm"]: row["skipped"] for row in result["results"] if row["skipped"]}
    assert skipped["trl"] == "needs trl, which is not installed"
    assert skipped["verl"] and skipped["liger"] and skipped["quack"]
    assert not ran & {"trl", "liger", "verl", "quack", "cce", "liger/fused_linear"}


def test_percentages_are_of_the_bound(bench: SimpleNamespace, tmp_path: Path) -> None:
    result = run(bench, tmp_path, "--arms", "eager", "--hidden", "32", "--tokens", "256", "--vocab", "1000", "--dtype", "bf16")
    rows = {(row["arm"], row["form"]): row for row in result["results"]}
    assert set(rows) == {("copy", "logits"), ("matmul", "hidden"), ("eager", "logits"), ("eager", "hidden")}
    for form, bound, counted, rate in (
        ("logits", "copy", 2 * 256 * 1000 * 2, "copy_bytes_per_s"),
        ("hidden", "matmul", 6 * 256 * 1000 * 32, "matmul_flops_per_s"),
    ):
        achieved = counted / (rows["eager", form]["median_ms"] / 1e3)
        assert result["machine"][rate] == pytest.approx(counted / (rows[bound, form]["median_ms"] / 1e3))
        assert rows["eager", form]["percent_of_bound"] == pytest.approx(100 * achieved / result["machine"][rate])
        assert rows[bound, form]["gradient_error"] is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_agree_with_the_exact_one(bench: SimpleNamespace, dtype: str) -> None:
    """Every arm that can run on this machine, except those that compile."""
    checked = set()
    for arm in bench.arms.ARMS:
        if arm.name.startswith("compile/") or arm.advantages == "none":
            continue
        data = problem(bench, arm.form, dtype)
        try:
            prepared = arm.make(data)
        except bench.arms.Absent as error:
            assert str(error)
            continue
        error = bench.arms.gradient_error(arm, prepared, data)
        bound = EXACT if arm.name in PLAIN and arm.form == "logits" else COARSE
        assert error <= bound[dtype], (arm.name, arm.form, arm.in_place, error)
        checked.add((arm.name, arm.form))
    assert checked >= {("srpo/reference", "logits"), ("eager", "logits"), ("eager", "hidden")}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_compiled_gradients_agree_with_the_exact_one(bench: SimpleNamespace, form: str) -> None:
    for arm in arms(bench, "compile/log_softmax", "compile/logsumexp"):
        if arm.form == form:
            data = problem(bench, form, "fp32")
            assert bench.arms.gradient_error(arm, arm.make(data), data) <= COARSE["fp32"], arm.name


@pytest.mark.gpu
def test_gradients_agree_on_a_gpu(bench: SimpleNamespace) -> None:
    """With two whole sequences and a size that all kernels take; missing packages are skipped. The bound is loose, for other
    packages filter gradients and round losses to bf16: the test checks that an arm is called correctly."""
    checked = set()
    for arm in bench.arms.ARMS:
        if arm.advantages != "none":
            data = bench.problem.Problem(arm.form, 512, 4096, 256, torch.bfloat16, torch.device("cuda"))
            data.refill(0)
            try:
                prepared = arm.make(data)
            except bench.arms.Absent:
                continue
            error = bench.arms.gradient_error(arm, prepared, data)
            assert error <= COARSE["bf16"], (arm.name, arm.form, arm.in_place, error)
            checked.add(arm.name)
    assert {"eager", "srpo/reference"} <= checked


def test_a_wrong_gradient_is_seen(bench: SimpleNamespace) -> None:
    (arm,) = [arm for arm in arms(bench, "eager") if arm.form == "logits"]
    data = problem(bench, "logits", "fp32")
    prepared = arm.make(data)
    data.token_advantages = -data.token_advantages
    assert bench.arms.gradient_error(arm, prepared, data) > 0.1


def test_logits_are_whole_again_before_each_call_and_new_in_each_round(bench: SimpleNamespace) -> None:
    data = problem(bench, "logits", "fp32")
    old = data.pristine.clone()
    seen = []

    def ruin() -> None:
        seen.append(data.logits.clone())
        data.logits.zero_()

    bench.loss_kernel.elapsed_ms(ruin, data)
    bench.loss_kernel.elapsed_ms(ruin, data)
    assert all(torch.equal(logits, old) for logits in seen)
    data.refill(1)
    assert not torch.equal(data.logits, old)
    clipped = (
        (torch.log_softmax(data.pristine / 0.99, 1).gather(1, data.labels[:, None])[:, 0] - data.old_logprobs).abs() > 0.18
    ).sum()
    assert clipped < len(data.labels) / 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_was_held_at_once(bench: SimpleNamespace) -> None:
    size, slack = 48 * 2**20, 4 * 2**20  # a heap of huge pages holds up to one more at either end

    def held(num_bytes: int, num_tensors: int = 1) -> int:
        def call() -> None:
            _ = [torch.ones(num_bytes, dtype=torch.uint8) for _ in range(num_tensors)]

        return bench.loss_kernel.peak_extra_bytes(call, torch.device("cpu"))

    if held(0) is None:
        pytest.skip("this kernel does not reset the high-water mark")
    held(3 * size)  # what was held before, and is gone, must not count
    assert held(0) <= slack
    for _ in range(2):  # nor may memory that the first call has freed hide the second's
        assert held(size) == pytest.approx(size, abs=slack)
    for _ in range(2):
        assert held(2**16, 1024) == pytest.approx(2**16 * 1024, abs=slack)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_in_place_needs_no_memory_and_eager_does(bench: SimpleNamespace) -> None:
    data = bench.problem.Problem("logits", 256, 16384, 0, torch.float32, torch.device("cpu"))
    data.refill(0)
    peaks = {}
    for arm in arms(bench, "srpo/cpu", "eager"):
        if arm.form == "logits":
            try:
                prepared = arm.make(data)
            except bench.arms.Absent as error:
                pytest.skip(str(error))
            for _ in range(2):
                data.restore()
                peaks[arm.name, arm.in_place] = bench.loss_kernel.peak_extra_bytes(
                    lambda prepared=prepared: bench.arms.finish(prepared), data.device
                )
    if None in peaks.values():
        pytest.skip("this kernel does not reset the high-water mark")
    size = data.logits.nbytes
    assert peaks["srpo/cpu", True] < 0.1 * size
    assert 0.9 * size < peaks["srpo/cpu", False] < 1.4 * size  # a huge page more at either end
    assert peaks["eager", False] > 1.9 * size


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--arms", "eagre"], "no arm is called eagre"),
        (["--tokens", "300"], "multiple of 256"),
        (["--rounds", "0"], "must be positive"),
        pytest.param(
            ["--device", "cuda"], "--device cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_flags_that_make_no_sense(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.loss_kernel.main(flags)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_an_error_of_others_skips_their_arm_and_one_of_ours_stops(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(problem: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    copy_arms = [arm for arm in bench.arms.ARMS if arm.name == "copy"]
    for name in ("trl", "srpo/reference"):
        monkeypatch.setattr(bench.loss_kernel, "ARMS", [*copy_arms, bench.arms.Arm(name, "logits", broken)])
        if name == "trl":
            rows = run(bench, tmp_path, "--arms", name)["results"]
            assert [row["skipped"] for row in rows] == [None, "failed: RuntimeError: no such kernel"]
        else:
            with pytest.raises(RuntimeError, match="no such kernel"):
                run(bench, tmp_path, "--arms", name)


def test_the_chart_is_a_picture(bench: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "charts" / "loss.png"
    run(bench, tmp_path, "--arms", "eager", "srpo/reference", "--hidden", "16", "--chart", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_modules_of_the_benchmark_hide_nobody_elses(bench: SimpleNamespace) -> None:
    for name, module in vars(bench).items():
        assert isinstance(module, ModuleType)
        assert Path(str(module.__file__)) == BENCH / f"{name}.py"
