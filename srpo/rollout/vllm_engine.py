"""The `vllm` engine: vLLM in a process of its own, that samples from the trainer's weights without a copy on disk.

On a CPU the weights travel through shared memory (`weight_sync`), on a GPU as CUDA IPC handles (`cuda_ipc`). A process that dies
or hangs is started again, given the weights it had, and asked for what is still missing.
"""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from srpo.config import VllmConfig
from srpo.policy.checkpoint_names import iter_checkpoint_params
from srpo.rollout.cuda_ipc import CudaSender
from srpo.rollout.engine import Sample, SamplingParams, check_prompts
from srpo.rollout.engine_process import EngineError, EngineFailure, EngineProcess
from srpo.rollout.vllm_settings import check_vllm_settings, derive_seed, worker_environment
from srpo.rollout.weight_sync import Bucket, WeightStore
from srpo.rollout.weights import differing_groups

MAX_ATTEMPTS = 3  # at one `generate` or `sync_weights`, before a failing engine ends the run
WORKER = ("-m", "srpo.rollout.vllm_worker")
STATS = (
    "num_tokens",
    "generate_s",
    "tokens_per_s",
    "sync_s",
    "sync_write_s",
    "sync_load_s",
    "sync_finish_s",
    "sync_bytes",
    "num_restarts",
)
_CPU_KV_CACHE_MIB = 1024
_CPU_BUCKET_MIB, _GPU_BUCKET_MIB = 16, 512
_MIB = 1 << 20


class VllmEngine:
    """A vLLM of the checkpoint in `path`, with the policy's weights from the first `sync_weights` on.

    device, dtype: where and in what it computes. max_context: longest prompt plus response; 0: what the model was made for.
    `policy_version` is -1 until the first sync. command: what serves instead of vLLM, in tests.
    Raises ValueError for settings that cannot work, ImportError where vLLM is not installed, EngineError where it does not start.
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
    ) -> None:
        self._config = config or VllmConfig()
        self._device = device or torch.device("cpu")
        check_vllm_settings(self._config)
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"no model in {str(path)!r}: vLLM starts from a folder with config.json and safetensors files")
        if tuple(command) == WORKER and importlib.util.find_spec("vllm") is None:
            raise ImportError("rollout.engine = 'vllm' needs vLLM: pip install 'srpo[gpu]' or 'srpo[vllm]', or take 'local'")
        self._command = command
        self._settings = {
            "path": str(Path(path).resolve()),
            "dtype": str(dtype).removeprefix("torch."),
            "device": self._device.type,
            "max_context": max_context,
            "max_num_seqs": self._config.max_num_seqs,
            "kv_cache_bytes": (self._config.kv_cache_mib or (0 if self._on_gpu else _CPU_KV_CACHE_MIB)) * _MIB,
            "gpu_memory_frac": self._config.gpu_memory_frac,
            "enforce_eager": self._config.enforce_eager or not self._on_gpu,
        }
        bucket_bytes = (self._config.bucket_mib or (_GPU_BUCKET_MIB if self._on_gpu else _CPU_BUCKET_MIB)) * _MIB
        self._store = WeightStore(bucket_bytes, dtype)
        self._sender = CudaSender(bucket_bytes, dtype, self._device) if self._on_gpu else None
        self._stats: dict[str, float] = dict.fromkeys(STATS, 0.0)
        self.policy_version = -1
        self._whole = True  # False from the beginning of a sync until its proof
        self._asleep = False
        self._process: EngineProcess | None = None
        try:
            self.max_context = self._start()
        except EngineFailure as failure:
            raise EngineError(str(failure)) from failure

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    @property
    def process(self) -> EngineProcess:
        """The engine's process, which runs."""
        if self._process is None or not self._process.running:
            self._restart()
        assert self._process is not None
        return self._process

    def _start(self) -> int:
        """Start a process and return its longest context."""
        self._process = EngineProcess(self._command, timeout_s=self._config.timeout_s, env=worker_environment(self._device))
        try:
            self._process.send("start", settings=self._settings)
            return int(self._process.receive(self._config.start_timeout_s)["max_context"])
        except BaseException:
            self._process.kill()
            raise

    def _restart(self) -> None:
        """A new process with the weights of the last sync."""
        if self._process is not None:
            self._process.kill()
        self._stats["num_restarts"] += 1
        self._asleep = False
        self._start()
        if self.policy_version >= 0 and self._whole:
            self._send_again()

    def _send_again(self) -> None:
        """The last sync's weights, from where they still are, to a new process."""
        assert self._process is not None
        version = self.policy_version
        if self._sender is not None:
            self._prove(self._process, self._sender.send_again(self._process, version), version)
            return
        assert self._store.version == version
        self._process.send("begin")
        for bucket in self._store.buckets:
            self._send_bucket(self._process, bucket)
        self._finish(self._process, version)

    def generate(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int, numbers: Sequence[int] | None = None
    ) -> list[Sample]:
        """See `Engine.generate`. A process that fails is replaced, and asked only for the groups that it has not given.

        Raises EngineError when MAX_ATTEMPTS processes have failed, or after a sync that was interrupted.
        """
        check_prompts(prompts, params, self.max_context)
        if not self._whole:
            raise EngineError("the last weight sync was interrupted: sync_weights again before sampling")
        if not prompts:
            return []
        start = time.perf_counter()
        seeds = [derive_seed(seed, number) for number in (range(len(prompts)) if numbers is None else numbers)]
        groups: dict[int, list[Sample]] = {}
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                missing = [i for i in range(len(prompts)) if i not in groups]
                for i, samples in self._stream(prompts, params, seeds, missing):
                    groups[i] = samples
                break
            except EngineFailure as failure:
                if attempt == MAX_ATTEMPTS:
                    raise
                left = len(prompts) - len(groups)
                warnings.warn(f"restarting vLLM for {left} of {len(prompts)} prompts: {failure}", RuntimeWarning, stacklevel=2)
        flat = [sample for i in range(len(prompts)) for sample in groups[i]]
        if not all(math.isfinite(x) for sample in flat for x in sample.sampling_logprobs):
            raise ValueError(
                "the policy computes logits that are not finite: check the checkpoint in policy.path, or resume from an earlier "
                "one with a lower optimizer.lr"
            )
        num_tokens, seconds = sum(len(s.response_ids) for s in flat), time.perf_counter() - start
        self._stats |= {"num_tokens": float(num_tokens), "generate_s": seconds, "tokens_per_s": num_tokens / seconds}
        return flat

    def _stream(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seeds: Sequence[int], missing: Sequence[int]
    ) -> Iterator[tuple[int, list[Sample]]]:
        """(prompt index, its samples) as they finish."""
        process = self.process
        asked = [(i, list(prompts[i])) for i in missing]
        waiting = set(missing)
        try:
            process.send("generate", prompts=asked, params=params, seeds=[seeds[i] for i in missing], version=self.policy_version)
            while "done" not in (reply := process.receive()):
                i, rows = reply["prompt"], reply["samples"]
                if i not in waiting or len(rows) != params.group_size:
                    raise EngineError(f"vLLM gave {len(rows)} samples for prompt {i}, which was not asked for, or not so often")
                waiting.remove(i)
                yield i, [Sample(i, tuple(ids), tuple(lps), finish, self.policy_version) for ids, lps, finish in rows]
            if waiting:
                raise EngineError(f"vLLM gave nothing for {len(waiting)} prompts")
        except EngineFailure:
            raise
        except BaseException:  # what it is still doing is nobody's business: its replies would be taken for the next request's
            process.kill()
            raise

    def sync_weights(self, policy: nn.Module, version: int) -> None:
        """See `Engine.sync_weights`. The process counts the weights that its kernels use and has to arrive at the trainer's sums.

        Raises EngineError where it does not; nothing is sampled then before another sync has succeeded.
        """
        start = time.perf_counter()
        self._whole = False
        if self._sender is not None:
            self._sync_gpu(self._sender, policy, version)
        else:
            self._sync_cpu(policy, version)
        self.policy_version, self._whole = version, True
        self._stats["sync_s"] = time.perf_counter() - start

    def _sync_cpu(self, policy: nn.Module, version: int) -> None:
        """Buckets are loaded while the next ones are written. Whatever happens to the process, the store becomes whole: under
        torchrun the other ranks gather with this one."""
        process: EngineProcess | None = None
        start = time.perf_counter()
        try:
            process = self.process
            process.send("begin")
        except EngineFailure as failure:
            _warn_of(failure)
            process = None
        try:
            for bucket in self._store.write(iter_checkpoint_params(policy), version):
                if process is not None:
                    try:
                        self._send_bucket(process, bucket)
                    except EngineFailure as failure:
                        _warn_of(failure)
                        process = None
            self._stats |= {"sync_bytes": float(self._store.num_bytes), "sync_write_s": time.perf_counter() - start}
            if process is not None:
                try:
                    self._finish(process, version)
                    return
                except EngineFailure as failure:
                    _warn_of(failure)
        except BaseException:
            if process is not None:
                process.kill()  # it has a mixture
            raise
        self.policy_version, self._whole = version, True
        self._restart()

    def _sync_gpu(self, sender: CudaSender, policy: nn.Module, version: int) -> None:
        process = self.process
        try:
            if self._asleep:
                self._wake(["weights"])
            start = time.perf_counter()
            sums = sender.send(process, policy, version)
            self._stats |= {"sync_bytes": float(sender.num_bytes), "sync_write_s": time.perf_counter() - start}
            self._prove(process, sums, version)
            if self._asleep:
                self._wake(["kv_cache"])
                self._asleep = False
        except BaseException:
            process.kill()
            raise

    def _send_bucket(self, process: EngineProcess, bucket: Bucket) -> None:
        process.send_descriptor(bucket.segment, self._store.descriptor(bucket))
        process.send("bucket", bucket=bucket)

    def _finish(self, process: EngineProcess, version: int) -> None:
        process.send("finish", version=version, keep=[segment.key for segment in self._store.segments])
        self._prove(process, self._store.sums, version)

    def _prove(self, process: EngineProcess, expected: dict[str, int], version: int) -> None:
        """Read the answer to a sync. Raises EngineError where the engine's weights are not the trainer's."""
        reply = process.receive()
        self._stats |= {"sync_load_s": reply["load_s"], "sync_finish_s": reply["finish_s"]}
        wrong = differing_groups(expected, reply["sums"])
        if reply["version"] != version or wrong:
            process.kill()
            raise EngineError(
                f"after the sync of version {version} vLLM (which answers {reply['version']}) holds other weights than the "
                f"trainer in {len(wrong)} of {len(expected)} groups, first {wrong[:1]}: rollout.engine 'local' takes any model"
            )

    def sleep(self) -> None:
        """Give weights and key-value cache back; the next sync brings them again. vLLM's CPU backend cannot: nothing happens."""
        if self._sender is not None and not self._asleep:
            self.process.send("sleep")
            self.process.receive()
            self._asleep, self._whole = True, False

    def wake(self) -> None:
        """Nothing: the next `sync_weights` wakes the weights first and the key-value cache after the sync, when there is room."""

    def _wake(self, tags: list[str]) -> None:
        self.process.send("wake", tags=tags)
        self.process.receive()

    def stats(self) -> dict[str, float]:
        """Also, of the last sync, sync_bytes, seconds that the trainer took to gather and write (sync_write_s) and the engine to
        load (sync_load_s, beside it on a CPU) and to repack and count (sync_finish_s); and num_restarts so far."""
        return dict(self._stats)

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
        self._store.close()


def _warn_of(failure: EngineFailure) -> None:
    warnings.warn(f"vLLM failed during a weight sync and will be started again: {failure}", RuntimeWarning, stacklevel=3)
