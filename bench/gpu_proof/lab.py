"""Shared by the stages that need torch: the device, timing, comparison, a tiny model, a batch."""

from __future__ import annotations

import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from gpu_proof.parts import Parts, Skip, Wrong, run_parts, small, state

SCRATCH_BYTES = 2 << 30  # memory that a part may need beside what it asks for


def device() -> torch.device:
    return torch.device("cpu" if small() else "cuda")


def implementations() -> tuple[str, ...]:
    """The kernels to prove. A backend that cannot run on the card says so itself."""
    return ("cpu",) if small() else ("cuda", "triton")


def run(parts: Parts) -> None:
    """Run the parts on the GPU, or small on a CPU, with fresh random data; SRPO_TEST_SEED=N draws the same again.

    Raises Skip if torch does not reach the GPU.
    """
    if not small() and (reason := why_no_device()):
        raise Skip(reason)
    seed = int(os.environ.get("SRPO_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"SRPO_TEST_SEED={seed}", flush=True)
    random.seed(seed)
    torch.manual_seed(seed)
    run_parts(parts, usable)


def why_no_device() -> str | None:
    """Why torch reaches no GPU although the driver lists one, with what torch itself says of it; None if it reaches one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    said = [" ".join(str(each.message).split()) for each in caught]
    about = f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no CUDA device, although the driver lists one"
    return ": ".join([about, *said])


def usable() -> bool:
    """Whether the device still answers: some errors stay until the process ends."""
    if small():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the device does not answer: {error}", flush=True)
        return False
    torch.cuda.empty_cache()
    return True


def needs_memory(num_bytes: int) -> None:
    """Raise Skip if the GPU has less free memory."""
    if not small():
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < num_bytes + SCRATCH_BYTES:
            raise Skip(f"needs {(num_bytes + SCRATCH_BYTES) / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")


def needs_backend(impl: str, logits: torch.Tensor) -> None:
    """Raise Skip, with the backend's reason, if it cannot run on such logits; "auto" and "reference" always can."""
    from srpo_kernels import operators

    if impl in operators.BACKENDS and (reason := operators.BACKENDS[impl].why_not(logits)):
        raise Skip(reason)


def elapsed_ms(call: Callable[[], object]) -> float:
    """Milliseconds of one call, on a GPU between two events."""
    if small():
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of each call. The calls take turns, so that a change of clocks affects all; two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            spent = elapsed_ms(call)
            if turn >= 2:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error in the L2 norm."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


def hold(errors: Mapping[str, float], bar: float, got: Sequence[torch.Tensor] = (), wanted: Sequence[torch.Tensor] = ()) -> None:
    """Raise Wrong if an error is above the bar, with the first entries of the tensors that differ by more than the bar."""
    if all(error <= bar for error in errors.values()):  # false for NaN
        return
    first = {name: differing(g, w, bar) for name, g, w in zip(errors, got, wanted, strict=False)}
    raise Wrong(f"relative errors { ({k: float(f'{v:.3g}') for k, v in errors.items()}) }, bar {bar}", first_wrong=first)


def differing(got: torch.Tensor, wanted: torch.Tensor, bar: float, most: int = 4) -> list[list[float]]:
    """The first wrong entries: [row, column, got, wanted], the tensor seen as a matrix of its last dimension."""
    a, b = (x.detach().double().cpu().reshape(-1, x.shape[-1] if x.dim() else 1) for x in (got, wanted))
    far = ~((a - b).abs() <= bar * b.abs().max())
    return [[row, column, float(a[row, column]), float(b[row, column])] for row, column in far.nonzero()[:most].tolist()]


@cache
def tiny_model(vocab: int, seed: int = 0) -> Path:
    """Folder of a small Qwen3-MoE in fp32, of a fresh initialization that samples neither uniformly nor greedily."""
    from policy_lab import tokenizer

    from srpo.core.config.demo import TinyConfig
    from srpo.policy.model import make_tiny

    sizes = {"hidden_size": 64, "num_layers": 2, "expert_size": 64} if small() else {"hidden_size": 256, "head_dim": 64}
    words = tokenizer(vocab)
    folder = state() / f"model_{vocab}_{seed}{'_small' if small() else ''}"
    make_tiny(words, TinyConfig(**sizes, initializer_range=0.1), seed).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
