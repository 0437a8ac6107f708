"""Stage sampling: an engine starts, samples from the trainer's weights and follows them through syncs; vLLM also sleeps, dies and
comes back. The trainer computes the log-probability of each sampled token by itself; the mean difference to the engine's is the
gap. The local engine is asked the same. A dry run is in fp32, with vLLM's CPU build if it is installed.

Stages sampling_graphs, sampling_v1 and sampling_v2: a start and one sync of vLLM as training starts it by default, compiled and
with CUDA graphs; and with either of its model runners, whichever it would choose.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch

from gpu_proof import lab
from gpu_proof.parts import Found, Parts, Skip, Wrong, figure, small

DTYPE = torch.float32 if small() else torch.bfloat16  # vLLM's CPU build loads no experts in bf16 again
GAP_BAR = 0.12  # nats, mean over tokens, bf16: a bar, not a measurement
LEFT_OUT = 0.05  # share of tokens of which the trainer may say that top-k does not keep them
FORGET = 3  # before a sync the gap must be larger than after it by this factor
FLAT_BYTES = 64 << 20  # by how much free memory may fall over the steps
SYNCS, STEPS = (2, 2) if small() else (4, 10)
VOCAB = 500 if small() else 4096
KV_CACHE_MIB = 64 if small() else 2048
V2 = "VLLM_USE_V2_MODEL_RUNNER"
PROMPTS = [tuple(range(5, 25)), (7, 8, 9, 10), tuple(range(100, 160))]


class Sampling:
    """A policy and an engine that was started from the same folder."""

    def __init__(self, *, real: bool, eager: bool = True) -> None:
        """real: vLLM; else the local engine. eager: without compilation and CUDA graphs."""
        self.version, self.started, self.real, self.eager = 0, False, real, eager

    @cached_property
    def params(self) -> Any:
        from srpo.rollout.engine import SamplingParams

        return SamplingParams(max_new_tokens=12 if small() else 32, group_size=16, stop_ids=(2,), top_k=50)

    @cached_property
    def policy(self) -> Any:
        from srpo.policy.model import Policy, load_policy

        return Policy(load_policy(lab.tiny_model(VOCAB))).to(lab.device(), DTYPE)

    @cached_property
    def engine(self) -> Any:
        """Started on first use; one that has failed to start is not tried again."""
        from srpo.core.config.train import VllmConfig
        from srpo.policy.model import load_policy
        from srpo.rollout.local import LocalEngine
        from srpo.rollout.vllm.engine import VllmEngine

        if self.started:
            raise Skip("the engine did not start")
        self.started = True
        if not self.real:
            return LocalEngine(load_policy(lab.tiny_model(VOCAB)), device=lab.device(), dtype=DTYPE, max_context=256)
        config = VllmConfig(
            kv_cache_mib=KV_CACHE_MIB,
            gpu_memory_frac=0.2,
            enforce_eager=self.eager,
            max_num_seqs=64,
            bucket_mib=1,
            timeout_s=60,
            start_timeout_s=110,
        )
        return VllmEngine(lab.tiny_model(VOCAB), device=lab.device(), dtype=DTYPE, max_context=256, config=config)

    def start(self) -> Found:
        lab.needs_memory((KV_CACHE_MIB << 20) + (4 << 30))
        begin = time.perf_counter()
        engine = self.engine
        facts = {"engine": type(engine).__name__, "loads": getattr(engine, "loads", "")}
        return {**facts, "figures": [figure("start", time.perf_counter() - begin, "s")]}

    @torch.no_grad()
    def gap(self, most_left_out: float = LEFT_OUT) -> float:
        """Mean absolute difference between the trainer's and the engine's log-probabilities of sampled tokens, in nats.

        Near the edge of the top-k filter the sets may differ by a token: its difference is infinite and left out. Raises Wrong if
        more than that share is left out, or a difference is NaN.
        """
        gaps = []
        for sample in self.engine.generate(PROMPTS, self.params, seed=self.version):
            prompt = PROMPTS[sample.prompt_index]
            own = self.logprobs((*prompt, *sample.response_ids), len(prompt))
            gaps.append((own - torch.tensor(sample.sampling_logprobs, device=own.device)).abs())
        every = torch.cat(gaps)
        finite = every[every.isfinite()]
        nans, left_out = int(every.isnan().sum()), 1 - len(finite) / max(len(every), 1)
        if nans or not len(finite) or left_out > most_left_out:
            raise Wrong(f"of {len(every)} differences {nans} are NaN and {len(every) - len(finite) - nans} infinite")
        return float(finite.mean())

    def logprobs(self, ids: tuple[int, ...], first: int) -> torch.Tensor:
        """The policy's log-probabilities of the tokens from `first` on, after temperature and top-k."""
        from srpo.core.batch import IGNORE, Batch

        tokens = torch.tensor(ids)
        labels, rows = tokens[1:].clone(), len(ids) - 1
        labels[: first - 1] = IGNORE
        zeros, one = torch.zeros(rows), torch.ones(1, 1)
        batch = Batch(
            input_ids=tokens[:-1],
            labels=labels,
            position_ids=torch.arange(rows),
            cu_seqlens=torch.tensor([0, rows], dtype=torch.int32),
            step_ends=one.int(),
            step_advantages=one,
            weights=zeros,
            sampling_logprobs=zeros,
        ).to(lab.device())
        logits = self.policy(batch).float() / self.params.temperature
        values, kept = logits.topk(self.params.top_k)
        filtered = torch.full_like(logits, -torch.inf).scatter(1, kept, values).log_softmax(-1)
        return filtered.gather(1, tokens[first:, None].to(lab.device()))[:, 0]

    def agrees(self, name: str, **limit: float) -> Found:
        """Hold the gap to its bar."""
        gap = self.gap()
        if not gap < GAP_BAR:
            raise Wrong(f"the mean gap is {gap:.4f} nats, bar {GAP_BAR}", **limit)
        return {"figures": [figure(name, gap, "nats", bar=GAP_BAR)]}

    @torch.no_grad()
    def change(self) -> None:
        """An update large enough to be seen."""
        for parameter in self.policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
        self.version += 1

    def syncs(self, count: int = SYNCS) -> Found:
        """After each sync the engine agrees with the trainer, before it it does not. No sync is faster than a copy of the weights
        on the device."""
        rounds, seconds = [], []
        for _ in range(count):
            self.change()
            before = self.gap(most_left_out=1.0)  # the engine is a step behind: its tokens may be others
            self.engine.sync_weights(self.policy, self.version)
            rounds.append((before, self.gap()))
            seconds.append(self.engine.stats()["sync_s"])
            if not (rounds[-1][1] < GAP_BAR and before > FORGET * rounds[-1][1]):
                raise Wrong(f"gaps before and after each sync: {rounds}; bar {GAP_BAR}, before {FORGET} times larger")
        floor = {"floor": self.copy_s(), "floor_of": "copy of the weights"}
        found = [figure("gap before a sync", min(x for x, _ in rounds), "nats")]
        found.append(figure("sync", sorted(seconds)[count // 2], "s", **floor))
        found.append(figure("gap after it", max(y for _, y in rounds), "nats", bar=GAP_BAR))
        stats = {name: value for name, value in self.engine.stats().items() if name.startswith("sync_")}
        return {"figures": found, "rounds": rounds, "stats": stats}

    def copy_s(self) -> float:
        """Seconds of a copy of as many bytes as the policy has, on the device."""
        source = torch.ones(sum(x.nbytes for x in self.policy.parameters()), dtype=torch.uint8, device=lab.device())
        target = torch.empty_like(source)
        return lab.interleaved({"copy": lambda: target.copy_(source)})["copy"] / 1e3

    def sleep_and_wake(self) -> Found:
        """As a run does it: sleep, an update with memory of its own, a sync, sampling. Free memory stays the same."""
        free, freed, gaps = [], [], []
        for _ in range(STEPS):
            awake = free_bytes()
            self.engine.sleep()
            freed.append(free_bytes() - awake)
            activations = torch.ones(1 << 20 if small() else 1 << 28, device=lab.device())  # 1 GiB on a GPU
            self.change()
            del activations
            self.engine.sync_weights(self.policy, self.version)
            gaps.append(self.gap())
            free.append(free_bytes())
        facts = {"free_mb_after_each": [round(x / 1e6) for x in free], "freed_mb_by_sleep": [round(x / 1e6) for x in freed]}
        if not all(gap < GAP_BAR for gap in gaps):  # NaN, too
            raise Wrong(f"the mean gaps after waking are {gaps}, bar {GAP_BAR}", **facts)
        if not small():
            if min(freed) < KV_CACHE_MIB << 19:
                raise Wrong("sleep does not give the key-value cache's memory back", **facts)
            if free[1] - free[-1] > FLAT_BYTES:
                raise Wrong("free memory falls from step to step", **facts)
        return {**facts, "figures": [figure("gap after waking, largest", max(gaps), "nats", bar=GAP_BAR)]}

    def killed(self) -> Found:
        """The process dies; the next call starts another one, which gets the weights of the last sync."""
        with suppress(ProcessLookupError):
            os.kill(self.engine.process.pid, signal.SIGKILL)
        time.sleep(0.5)
        begin = time.perf_counter()
        found = self.agrees("gap after a restart")
        seconds = time.perf_counter() - begin
        if self.engine.stats()["num_restarts"] < 1:
            raise Wrong("the process was killed, and no other one was started")
        return {"figures": [*(found or {})["figures"], figure("restart and first samples", seconds, "s")]}

    def speed(self) -> Found:
        """Tokens per second of the last samples: a tiny model on a card that waits for the host, no measure of vLLM."""
        self.gap()
        return {"figures": [figure("sampling, tiny model", self.engine.stats()["tokens_per_s"], "tokens/s")]}

    def close(self) -> Found:
        self.engine.close()
        return None


def free_bytes() -> int:
    """Free memory of the GPU without what torch only caches; 0 in a dry run."""
    if small():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def without_vllm() -> Found:
    raise Skip("vllm is not installed")


def main(kind: str = "all") -> None:
    """kind: all, or what vLLM starts with: graphs, v1 or v2."""
    if kind == "all":
        lab.run(all_parts())
        return
    if small():
        raise Skip("a dry run starts vLLM in the stage sampling alone")
    if kind in ("v1", "v2"):
        os.environ[V2] = "1" if kind == "v2" else "0"  # the engine's process inherits it
    it = Sampling(real=True, eager=kind != "graphs")
    loaded, sync = partial(it.agrees, "gap as loaded"), partial(it.syncs, 1)
    lab.run({"start": it.start, "as loaded": loaded, "sync": sync, "close": it.close})


def all_parts() -> Parts:
    """vLLM, if it is installed, then the local engine."""
    parts: dict[str, Callable[[], Found]] = {"vllm": without_vllm}
    if importlib.util.find_spec("vllm") is not None:
        it = Sampling(real=True)
        parts = {"start": it.start, "as loaded": partial(it.agrees, "gap as loaded"), "syncs": it.syncs}
        parts |= {"sleep and wake": it.sleep_and_wake, "killed": it.killed, "speed": it.speed, "close": it.close}
        parts = {f"vllm: {name}": part for name, part in parts.items()}
    own = Sampling(real=False)
    others = {"start": own.start, "as loaded": partial(own.agrees, "gap as loaded"), "syncs": own.syncs, "speed": own.speed}
    return parts | {f"local: {name}": part for name, part in others.items()}
