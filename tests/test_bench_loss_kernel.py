"""bench/loss_kernel.py: every arm computes the loss, the result has the promised form, and memory is measured right."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import loss_bench
import pytest
import torch
from bench_modules import BENCH
from loss_bench import COARSE, problem, run
from torch._inductor import config as inductor

FIELDS = {"arm", "form", "in_place", "dtype", "tokens", "vocab", "hidden", "top_k", "rounds", "note"}
FIELDS |= {"median_ms", "min_ms", "peak_extra_bytes", "percent_of_bound", "gradient_error", "skipped", "failed"}
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
        "compile/top_k",
        "topk",
    ),
    *("trl", "liger", "liger/fused_linear", "verl", "linear_cross_entropy", "cce", "quack", "matmul"),
}
OTHERS = ("trl", "liger_kernel", "verl", "cut_cross_entropy", "quack")
PLAIN = ("srpo/reference", "srpo/cpu", "eager")
# Largest relative error of a gradient. A log-probability of -12 in fp32, and with it a ratio, is off by at most 2^-19; rounding
# the exact gradient to bf16 changes each entry by at most 2^-8.
EXACT = {"fp32": 2**-19, "bf16": 2**-8}


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    return loss_bench.modules()


@pytest.fixture
def without_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the other packages, as if they were not installed."""
    for name in OTHERS:
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)


def arms(bench: SimpleNamespace, *names: str) -> list[Any]:
    return [arm for arm in bench.arms.ARMS if arm.name in names]


def test_every_promised_arm_is_there_and_ours_also_in_place(bench: SimpleNamespace) -> None:
    assert {arm.name for arm in bench.arms.ARMS} == NAMES
    lines = [(arm.name, arm.form, arm.in_place) for arm in bench.arms.ARMS]
    assert len(set(lines)) == len(lines)
    for impl in ("cpu", "triton", "cuda"):
        for form in ("logits", "top_k"):
            assert {(f"srpo/{impl}", form, True), (f"srpo/{impl}", form, False)} <= set(lines)


@pytest.mark.usefixtures("without_others")
@pytest.mark.parametrize(("hidden", "top_k"), [(0, 0), (32, 5)])
def test_the_result_has_the_promised_form(
    bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], hidden: int, top_k: int
) -> None:
    names = sorted(name for name in NAMES if not name.startswith("compile/"))  # those take a compiler's time: a test of their own
    result = run(bench, tmp_path, "--hidden", str(hidden), "--top-k", str(top_k), "--arms", *names)
    assert {"machine", "versions", "results", "rounds", "seconds", "commit", "command", "loss"} <= set(result)
    assert (result["complete"], result["doing"]) == (True, None)
    assert {"device", "cpu", "threads", "copy_bytes_per_s"} <= set(result["machine"])
    assert {"python", "torch"} <= set(result["versions"])
    assert {row["form"] for row in result["results"]} == ({"logits", "top_k", "hidden"} if hidden else {"logits"})
    shown = capsys.readouterr().out
    for row in result["results"]:
        assert set(row) >= FIELDS
        assert row["arm"] in shown
        assert (row["dtype"], row["tokens"], row["vocab"]) == ("fp32", 16, 50)
        assert row["hidden"] == (hidden if row["form"] == "hidden" else 0)
        assert row["top_k"] == (top_k if row["form"] == "top_k" else 0)
        assert row["failed"] is None
        if row["skipped"]:
            assert row["skipped"] in shown
            assert row["median_ms"] is row["min_ms"] is row["peak_extra_bytes"] is row["percent_of_bound"] is None
            assert row["rounds"] == 0
        else:
            assert 0 < row["min_ms"] <= row["median_ms"]
            assert row["percent_of_bound"] > 0
            assert row["rounds"] == 3
    ran = {row["arm"] for row in result["results"] if not row["skipped"]}
    assert {"copy", "eager", "srpo/reference"} <= ran
    skipped = {row["arm"]: row["skipped"] for row in result["results"] if row["skipped"]}
    assert skipped["trl"] == "needs trl, which is not installed"
    assert skipped["verl"] and skipped["liger"] and skipped["quack"]
    assert not ran & {"trl", "liger", "verl", "quack", "cce", "liger/fused_linear"}


def test_percentages_are_of_the_bound(bench: SimpleNamespace, tmp_path: Path) -> None:
    size = ("--hidden", "32", "--top-k", "7", "--tokens", "256", "--vocab", "1000")
    result = run(bench, tmp_path, "--arms", "eager", *size, "--dtype", "bf16")
    rows = {(row["arm"], row["form"]): row for row in result["results"]}
    bounds = {"logits": "copy", "top_k": "copy", "hidden": "matmul"}
    assert set(rows) == {*((bound, form) for form, bound in bounds.items()), *(("eager", form) for form in bounds)}
    for form, bound in bounds.items():
        share = 100 * rows[bound, form]["median_ms"] / rows["eager", form]["median_ms"]
        assert rows["eager", form]["percent_of_bound"] == pytest.approx(share)
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
        bound = EXACT if arm.name in PLAIN and arm.form != "hidden" else COARSE
        assert error <= bound[dtype], (arm.name, arm.form, arm.in_place, error)
        checked.add((arm.name, arm.form))
    plain = {("srpo/reference", "logits"), ("eager", "logits"), ("eager", "hidden")}
    assert checked >= plain | {("srpo/reference", "top_k"), ("srpo/cpu", "top_k"), ("eager", "top_k")}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["logits", "top_k", "hidden"])
def test_compiled_gradients_agree_with_the_exact_one(bench: SimpleNamespace, form: str) -> None:
    for arm in arms(bench, "compile/log_softmax", "compile/logsumexp", "compile/top_k"):
        if arm.form == form:
            data = problem(bench, form, "fp32")
            with inductor.patch(compile_threads=1):  # more would leave a pool of threads behind
                assert bench.arms.gradient_error(arm, arm.make(data), data) <= COARSE["fp32"], arm.name


@pytest.mark.gpu
def test_gradients_agree_on_a_gpu(bench: SimpleNamespace) -> None:
    """With two whole sequences and a size that all kernels take; missing packages are skipped. The bound is loose, for other
    packages filter gradients and round losses to bf16: the test checks that an arm is called correctly."""
    checked = set()
    for arm in bench.arms.ARMS:
        if arm.advantages != "none":
            top_k = 20 if arm.form == "top_k" else 0
            data = bench.problem.Problem(arm.form, 512, 4096, 256, torch.bfloat16, torch.device("cuda"), top_k=top_k)
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

    bench.measuring.elapsed_ms(ruin, data)
    bench.measuring.elapsed_ms(ruin, data)
    assert all(torch.equal(logits, old) for logits in seen)
    data.refill(1)
    assert not torch.equal(data.logits, old)
    clipped = (
        (torch.log_softmax(data.pristine / 0.99, 1).gather(1, data.labels[:, None])[:, 0] - data.old_logprobs).abs() > 0.18
    ).sum()
    assert clipped < len(data.labels) / 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_implementation_has_the_same_support(bench: SimpleNamespace, dtype: str) -> None:
    """Without care, bf16 logits tie at the last place of most supports."""
    data = problem(bench, "top_k", dtype)
    logits = data.pristine
    last = logits.topk(data.top_k, 1).values[:, -1:]
    assert ((logits >= last).sum(1) == data.top_k).all()
    assert data.top_k < 1003 and (logits.flip(1).topk(data.top_k, 1).values[:, -1:] == last).all()


def test_most_labels_are_sampled_from_the_support_and_every_20th_ratio_is_clipped(bench: SimpleNamespace) -> None:
    data = bench.problem.Problem("top_k", 4096, 300, 0, torch.bfloat16, torch.device("cpu"), length=256, top_k=10)
    data.refill(int(torch.randint(2**31, ())))
    inside = (data.pristine.topk(10, 1).indices == data.labels[:, None]).any(1)
    assert 0.92 < inside.float().mean() < 0.98
    kept = torch.full_like(data.pristine, -torch.inf, dtype=torch.float64)
    kept.scatter_(1, data.pristine.topk(10, 1).indices, data.pristine.double().topk(10, 1).values)
    kept.scatter_(1, data.labels[:, None], data.pristine.double().gather(1, data.labels[:, None]))
    logprobs = torch.log_softmax(kept / bench.problem.TEMPERATURE, 1).gather(1, data.labels[:, None])[:, 0]
    gap = logprobs - data.old_logprobs
    assert gap.std() == pytest.approx(0.1, rel=0.1)
    up, down = (gap > torch.tensor(1.2).log()).float().mean(), (gap < torch.tensor(0.8).log()).float().mean()
    assert 0.02 < up + down < 0.08


@pytest.mark.parametrize(("form", "top_k"), [("logits", 5), ("hidden", 5), ("top_k", 0), ("top_k", 51)])
def test_a_support_that_does_not_fit_the_form(bench: SimpleNamespace, form: str, top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}"):
        bench.problem.Problem(form, 16, 50, 8, torch.float32, torch.device("cpu"), length=8, top_k=top_k)


def test_the_exact_gradient_belongs_to_the_present_data(bench: SimpleNamespace) -> None:
    data = problem(bench, "logits", "fp32")
    first = bench.problem.exact_gradient(data, "step").clone()
    assert torch.equal(bench.problem.exact_gradient(data, "step"), first)
    assert not torch.equal(bench.problem.exact_gradient(data, "sequence"), first)
    data.refill(1)
    assert not torch.allclose(bench.problem.exact_gradient(data, "step"), first)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_was_held_at_once(bench: SimpleNamespace) -> None:
    size, slack = 48 * 2**20, 4 * 2**20  # a heap of huge pages holds up to one more at either end

    def held(num_bytes: int, num_tensors: int = 1) -> int:
        def call() -> None:
            _ = [torch.ones(num_bytes, dtype=torch.uint8) for _ in range(num_tensors)]

        return bench.measuring.peak_extra_bytes(call, torch.device("cpu"))

    if held(0) is None:
        pytest.skip("this kernel does not reset the high-water mark")
    held(3 * size)  # what was held before, and is gone, must not count
    assert held(0) <= slack
    for _ in range(2):  # nor may memory that the first call has freed hide the second's
        assert held(size) == pytest.approx(size, abs=slack)
    for _ in range(2):
        assert held(2**16, 1024) == pytest.approx(2**16 * 1024, abs=slack)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["logits", "top_k"])
def test_in_place_needs_no_memory_and_eager_does(bench: SimpleNamespace, form: str) -> None:
    top_k = 20 if form == "top_k" else 0
    data = bench.problem.Problem(form, 256, 16384, 0, torch.float32, torch.device("cpu"), top_k=top_k)
    data.refill(0)
    peaks = {}
    for arm in arms(bench, "srpo/cpu", "eager"):
        if arm.form == form:
            try:
                prepared = arm.make(data)
            except bench.arms.Absent as error:
                pytest.skip(str(error))
            for _ in range(2):
                data.restore()
                peaks[arm.name, arm.in_place] = bench.measuring.peak_extra_bytes(
                    lambda prepared=prepared: bench.arms.finish(prepared), data.device
                )
    if None in peaks.values():
        pytest.skip("this kernel does not reset the high-water mark")
    size = data.logits.nbytes
    pages = 0 if form == "logits" else 4 * 2**20  # huge pages in which torch.topk sorts a row
    assert peaks["srpo/cpu", True] < 0.1 * size + pages
    assert 0.9 * size < peaks["srpo/cpu", False] < 1.4 * size  # a huge page more at either end
    assert peaks["eager", False] > (1.9 if form == "logits" else 0.9) * size


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--arms", "eagre"], "no arm is called eagre"),
        (["--tokens", "300"], "multiple of 256"),
        (["--rounds", "0"], "must be positive"),
        (["--device", "cpu", "--vocab", "50", "--top-k", "51"], "give at most 50"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--threads", "0"], "--threads is 0"),
        (["--json", "/dev/null/x/y.json"], "/dev/null/x"),
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


def test_the_chart_is_a_picture(bench: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "charts" / "loss.png"
    run(bench, tmp_path, "--arms", "eager", "srpo/reference", "--hidden", "16", "--top-k", "3", "--chart", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_modules_of_the_benchmark_hide_nobody_elses(bench: SimpleNamespace) -> None:
    for name, module in vars(bench).items():
        assert isinstance(module, ModuleType)
        assert Path(str(module.__file__)) == BENCH / f"{name}.py"
