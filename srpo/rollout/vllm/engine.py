"""The `vllm` engine: vLLM in a child process, which samples from the trainer's weights without a copy on disk.

Weights travel through shared memory on a CPU and as CUDA IPC handles on a GPU (`srpo/rollout/weights/`). A process that dies or
hangs is replaced; the new one gets the weights of the last sync and samples the groups that are still missing.
"""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

from srpo.core.config.train import VllmConfig
from srpo.core.errors import MissingPackage, UserError
from srpo.policy.checkpoint_names import Layouts, iter_checkpoint_blocks
from srpo.rollout.engine import Groups, Sample, SamplingParams, check_prompts, in_order
from srpo.rollout.vllm.client import Replies, request_samples, samples_of
from srpo.rollout.vllm.process import EngineError, EngineFailure, EngineProcess
from srpo.rollout.vllm.settings import (
    bucket_bytes,
    check_dtypes,
    check_split,
    check_vllm_settings,
    derive_seed,
    worker_environment,
)
from srpo.rollout.vllm.trainer_memory import give_back_cache
from srpo.rollout.weights.buckets import Bucket, differing_groups
from srpo.rollout.weights.cuda_ipc import CudaSender, Exchange
from srpo.rollout.weights.shared_memory import WeightStore, half_the_threads

MAX_ATTEMPTS = 3  # processes that may fail in one `stream` or `generate` before the error ends the run
WORKER = ("-m", "srpo.rollout.vllm.worker")
SHARDS_WORKER = ("-m", "srpo.rollout.vllm.shards")  # if vLLM is split over several devices
STATS = (
    "num_tokens",
    "generate_s",
    "tokens_per_s",
    "sync_s",
    "sync_write_s",
    "sync_load_s",
    "sync_finish_s",
    "sync_bytes",
    "trainer_reserved_bytes",
    "num_restarts",
)
_CPU_KV_CACHE_MIB = 1024
_MIB = 1 << 20
_RESTART_FRAC = 0.01  # gpu_memory_frac of a restart, whose key-value cache has a size in bytes


class VllmEngine:
    """vLLM started from the checkpoint in `path`; it has the policy's weights from the first `sync_weights` on.

    device, dtype: where vLLM computes, and in which precision. max_context: longest prompt plus response in tokens; 0: the
    model's own limit. `policy_version` is -1 until the first sync. command: the program that tests start in place of vLLM.
    devices, exchange: GPUs (`visible_device`) and collective (`CudaSender`) of the ranks that share the engine, if it is split
    over their GPUs (`shared_engine`). routing: whether vLLM reports the experts of each token.
    Raises UserError for settings that cannot work, MissingPackage if vLLM is not installed, EngineError if it does not start.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        max_context: int = 0,
        config: VllmConfig | None = None,
        command: Sequence[str] = WORKER,
        devices: Sequence[str] = (),
        exchange: Exchange | None = None,
        routing: bool = False,
    ) -> None:
        self._config = config or VllmConfig()
        self._device = device or torch.device("cpu")
        self._devices = devices
        check_vllm_settings(self._config)
        size = self._config.tensor_parallel_size
        if self._on_gpu and len(set(devices)) != size > 1:
            raise UserError(
                f"rollout.vllm.tensor_parallel_size is {size} and the ranks of this engine have {len(set(devices))} GPUs: start "
                f"{size} ranks on one host with a GPU each, or lower it"
            )
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"no model in {str(path)!r}: vLLM starts from a folder with config.json and safetensors files")
        if tuple(command) == WORKER and importlib.util.find_spec("vllm") is None:
            raise MissingPackage("rollout.engine is 'vllm', and vLLM is not installed: run 'make vllm', or set it to 'local'")
        if size > 1:
            check_split(path, size)
        self._command = SHARDS_WORKER if size > 1 and tuple(command) == WORKER else command
        self._settings = {
            "path": str(Path(path).resolve()),
            "dtype": str(dtype).removeprefix("torch."),
            "device": self._device.type,
            "tensor_parallel_size": size,
            "max_context": max_context,
            "max_num_seqs": self._config.max_num_seqs,
            "kv_cache_bytes": (self._config.kv_cache_mib or (0 if self._on_gpu else _CPU_KV_CACHE_MIB)) * _MIB,
            "gpu_memory_frac": self._config.gpu_memory_frac,
            "enforce_eager": self._config.enforce_eager or not self._on_gpu,
            "routing": routing,  # whether vLLM reports the experts of each token
        }
        self._store = WeightStore(num_bytes := bucket_bytes(self._config, self._device), dtype)
        self._layouts: Layouts = {}
        self._sender = CudaSender(num_bytes, dtype, self._device, exchange) if self._on_gpu else None
        self._stats: dict[str, float] = dict.fromkeys(STATS, 0.0)
        self.policy_version = -1
        self._weights_valid = True  # False while asleep, and from the start of a sync until its proof
        self._asleep = False
        self._other_dtypes: list[str] = []  # parameters that vLLM keeps in another dtype than its own
        self._process: EngineProcess | None = None
        self._former: list[EngineProcess] = []  # that have failed; `close` removes their logs
        self.loads = ""  # how weights get into vLLM's kernels: "direct", or the reason for vLLM's own reload
        try:
            self.max_context = self._start()
        except EngineFailure as failure:
            raise EngineError(str(failure)) from failure
        if self.loads not in ("", "direct") and size == 1 and not self._on_gpu:
            warnings.warn(f"weight syncs use vLLM's own, slower reload: {self.loads}", RuntimeWarning, stacklevel=2)

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    @property
    def process(self) -> EngineProcess:
        """The engine's process; replaced first if it has ended."""
        if self._process is None or not self._process.running:
            self._restart()
        assert self._process is not None
        return self._process

    @property
    def _environment(self) -> dict[str, str]:
        return worker_environment(self._device, self._devices)

    def _start(self) -> int:
        """Start a process and return its longest context in tokens.

        By the time of a restart the trainer's state lies on the GPU. So a restart takes the bytes of key-value cache that the
        first process had, and next to no gpu_memory_frac: vLLM does not start unless that whole share is free.
        """
        give_back_cache(self._device)
        self._process = EngineProcess(self._command, timeout_s=self._config.timeout_s, env=self._environment)
        with self._process.killed_unless_done():
            self._process.send("start", settings=self._settings)
            facts = self._process.receive(self._config.start_timeout_s)
            self.loads, self._other_dtypes = facts.get("loads", ""), facts.get("other_dtypes", [])
            if num_bytes := facts.get("kv_cache_bytes", 0):
                self._settings |= {"kv_cache_bytes": num_bytes, "gpu_memory_frac": _RESTART_FRAC}
            return int(facts["max_context"])

    def _restart(self) -> None:
        """Replace the process and give the new one the weights of the last sync."""
        if self._process is not None:
            self._process.kill()
            self._former.append(self._process)
        self._stats["num_restarts"] += 1
        self._asleep = False
        self._start()
        if self.policy_version >= 0 and self._weights_valid:
            self._send_again()

    def _send_again(self) -> None:
        """Send a new process the weights of the last sync: from the store (CPU), or from the unchanged policy (GPU)."""
        assert self._process is not None
        version = self.policy_version
        if self._sender is not None:
            again = partial(self._sender.send_again, self._process, version)
            self._send_and_prove(self._sender, self._process, again, version)
            return
        assert self._store.version == version
        self._process.send("begin")
        for bucket in self._store.buckets:
            self._send_bucket(self._process, bucket)
        self._finish(self._process, version)

    def generate(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int] | None = None
    ) -> list[Sample]:
        """See `Engine.generate`."""
        return in_order(self.stream(prompts, params, seed, numbers))

    def stream(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int] | None = None
    ) -> Groups:
        """See `Engine.stream`. A process that fails is replaced; the new one samples only the missing groups.

        Raises EngineError if MAX_ATTEMPTS processes have failed, or if the last sync was interrupted.
        """
        return samples_of(self.replies(prompts, params, seed, numbers), self.policy_version, self._stats)

    def replies(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int] | None = None
    ) -> Replies:
        """Like `stream`, with responses as the process sends them and None as a heartbeat."""
        check_prompts(prompts, params, self.max_context)
        if not self._weights_valid:
            raise EngineError("the last weight sync was interrupted: call sync_weights again before sampling")
        seeds = [derive_seed(seed, number) for number in (range(len(prompts)) if numbers is None else numbers)]
        return self._replies(prompts, params, seeds)

    def _replies(self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seeds: Sequence[int]) -> Replies:
        missing = list(range(len(prompts)))
        attempt = 0
        while missing:
            attempt += 1
            try:
                with closing(request_samples(self.process, prompts, params, seeds, missing, self.policy_version)) as replies:
                    for group in replies:
                        if group is not None and not all(math.isfinite(x) for row in group[1] for x in row[1]):
                            raise UserError(
                                "the policy computes logits that are not finite: check the checkpoint in policy.path, or start "
                                "the same run with a lower optimizer.lr (it goes on from an earlier checkpoint if you remove the "
                                "newest, if it has any)"
                            )
                        if group is not None:
                            missing.remove(group[0])
                        yield group
            except EngineFailure as failure:
                if attempt == MAX_ATTEMPTS:
                    raise
                left = len(missing)
                warnings.warn(f"restarting vLLM for {left} of {len(prompts)} prompts: {failure}", RuntimeWarning, stacklevel=2)

    def sync_weights(self, policy: nn.Module, version: int) -> None:
        """See `Engine.sync_weights`. The bit sums of the weights that vLLM's kernels use must equal the trainer's.

        Raises EngineError if they differ; sampling then raises until another sync has succeeded. UserError: `check_formats`.
        """
        self.check_formats()
        start = time.perf_counter()
        self._weights_valid = False
        if self._sender is not None:
            self._sync_gpu(self._sender, policy, version)
        else:
            self._sync_cpu(policy, version)
        self.policy_version, self._weights_valid = version, True
        self._stats["sync_s"] = time.perf_counter() - start

    def check_formats(self) -> None:
        """Raise UserError if vLLM keeps some weights of this model in another format than the one that weights travel in."""
        check_dtypes(self._other_dtypes, self._settings["dtype"])

    def _sync_cpu(self, policy: nn.Module, version: int) -> None:
        """The process loads each bucket while the next one is written. If the process fails, the store is still written to its
        end, because under torchrun the other ranks gather parameters with this one; a new process then loads the store."""
        start = time.perf_counter()
        process = _survivor(self._begin)
        with process.killed_unless_done() if process is not None else nullcontext():
            with half_the_threads():
                for bucket in self._store.write(iter_checkpoint_blocks(policy, self._layouts), version):
                    if process is not None:
                        process = _survivor(partial(self._send_bucket, process, bucket))
            self._stats |= {"sync_bytes": float(self._store.num_bytes), "sync_write_s": time.perf_counter() - start}
            if process is not None:
                process = _survivor(partial(self._finish, process, version))
        if process is None:
            self.policy_version, self._weights_valid = version, True
            self._restart()

    def _sync_gpu(self, sender: CudaSender, policy: nn.Module, version: int) -> None:
        """Wakes the weights before the transfer and the key-value cache after it: the cache and the buckets in transit never
        occupy memory at the same time."""
        process = self.process
        with process.killed_unless_done():
            if self._asleep:
                self._wake(["weights"])
            self._send_and_prove(sender, process, partial(sender.send, process, policy, version), version)
            if self._asleep:
                self._wake(["kv_cache"])
                self._asleep = False

    def _send_and_prove(
        self, sender: CudaSender, process: EngineProcess, send: Callable[[], dict[str, int]], version: int
    ) -> None:
        """Send the weights, end the engine's update and prove it; then the staging buffer is free."""
        start = time.perf_counter()
        sums = send()
        self._stats |= {"sync_bytes": float(sender.num_bytes), "sync_write_s": time.perf_counter() - start}
        try:
            process.send("finish", version=version, keep=[])
            self._prove(process, sums, version)
        finally:  # the other ranks of the engine wait here
            sender.release()

    def _begin(self) -> EngineProcess:
        process = self.process
        process.send("begin")
        return process

    def _send_bucket(self, process: EngineProcess, bucket: Bucket) -> EngineProcess:
        process.send_descriptor(bucket.segment, self._store.descriptor(bucket))
        process.send("bucket", bucket=bucket)
        return process

    def _finish(self, process: EngineProcess, version: int) -> EngineProcess:
        process.send("finish", version=version, keep=[segment.key for segment in self._store.segments])
        self._prove(process, self._store.sums, version)
        return process

    def _prove(self, process: EngineProcess, expected: dict[str, int], version: int) -> None:
        """Read the reply to `finish`. Raises EngineError if the engine's bit sums differ from the trainer's."""
        reply = process.receive()
        self._stats |= {"sync_load_s": reply["load_s"], "sync_finish_s": reply["finish_s"]}
        differing = differing_groups(expected, reply["sums"])
        if reply["version"] != version or differing:
            process.kill()
            raise EngineError(
                f"after the weight sync of version {version} vLLM (at version {reply['version']}) holds other weights than the "
                f"trainer in {len(differing)} of {len(expected)} groups, first {differing[:1]}: set rollout.engine to 'local'"
            )

    def sleep(self) -> None:
        """Release weights and key-value cache; the next sync restores both, and sampling raises before it. Does nothing on a CPU,
        where vLLM cannot sleep."""
        if self._sender is None or self._asleep:
            return
        process = self.process
        try:
            with process.killed_unless_done():
                process.send("sleep")
                process.receive()
        except EngineFailure as failure:  # a dead process holds no memory; the next sync starts a new one
            warnings.warn(f"vLLM failed while falling asleep and will be started again: {failure}", RuntimeWarning, stacklevel=2)
        self._asleep, self._weights_valid = True, False

    def _wake(self, tags: list[str]) -> None:
        """Wake a part of the engine, after this process has given the memory back that it only caches."""
        self._stats["trainer_reserved_bytes"] = give_back_cache(self._device)
        self.process.send("wake", tags=tags)
        self.process.receive()

    def stats(self) -> dict[str, float]:
        """Adds, for the last sync, its bytes (sync_bytes), the trainer's seconds to gather and write (sync_write_s), and the
        engine's to load (sync_load_s, concurrent on a CPU) and to repack and sum (sync_finish_s); what the trainer held of the
        GPU when the engine last woke (trainer_reserved_bytes); and num_restarts so far."""
        return dict(self._stats)

    def close(self) -> None:
        for process in (*self._former, self._process):
            if process is not None:
                process.close()
        self._former, self._process = [], None
        self._store.close()


def _survivor(request: Callable[[], EngineProcess]) -> EngineProcess | None:
    """The process that took a request of a weight sync, or None, with a warning, if it failed."""
    try:
        return request()
    except EngineFailure as failure:
        text = f"vLLM failed during a weight sync and will be started again: {failure}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
        return None
