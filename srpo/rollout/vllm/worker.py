"""vLLM in a process of its own: `python -m srpo.rollout.vllm.worker SOCKET SOCKET`, started by `srpo.rollout.vllm.engine`.

vLLM's engine core and its worker both run in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0): only one process has to be watched
and killed, and weight syncs can reach the model.
"""

from __future__ import annotations

from srpo.rollout.vllm.orphan import end_with_trainer

if __name__ == "__main__":
    end_with_trainer()  # before the imports, which take seconds

import base64
import dataclasses
import math
import sys
from collections.abc import Collection, Generator, Sequence
from typing import Any

import numpy as np
import torch

from srpo.core.errors import UserError
from srpo.rollout.engine import SamplingParams
from srpo.rollout.vllm.older_versions import import_ipc_engine
from srpo.rollout.vllm.reload import KernelWatch, Reloader
from srpo.rollout.vllm.server import Group, Response, Routed, serve


class VllmBackend:
    """See `srpo.rollout.vllm.server.Backend`."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._reloader: Any = None
        self._vocab_size = 0
        self._reports_experts = False
        self._native = False  # whether weights come through vLLM's own transfer engine, by CUDA IPC
        self._packed_in_update = False  # whether that engine takes the flag `packed` with each update, not at initialization

    def start(self, settings: dict[str, Any]) -> dict[str, Any]:
        """settings: path, dtype, device, max_context, max_num_seqs, kv_cache_bytes, gpu_memory_frac, enforce_eager, routing."""
        from vllm.model_executor.model_loader import get_model_loader

        watch = KernelWatch()
        config = self._open(settings)
        worker = self._llm.llm_engine.model_executor.driver_worker.worker
        self._reloader = Reloader(worker, watch)
        loader: Any = get_model_loader(config.load_config)  # the loaders that read checkpoints have get_all_weights
        loads = self._reloader.prove(
            lambda: loader.get_all_weights(config.model_config, self._reloader.model), direct=not self._native
        )
        if self._native:
            transfer = worker.weight_transfer_engine
            self._open_transfer(_fields(transfer.init_info_cls), _fields(transfer.update_info_cls))
        self._llm.reset_prefix_cache()
        return {
            "max_context": config.model_config.max_model_len,
            "loads": loads,
            "kv_cache_bytes": kv_cache_bytes(worker),
            "other_dtypes": self._reloader.of_other_dtype(config.model_config.dtype),
        }

    def _open(self, settings: dict[str, Any], **extra: Any) -> Any:
        """Load the model, with `extra` as further options of vLLM, and return vLLM's configuration."""
        from vllm import LLM

        on_cpu = settings["device"] == "cpu"
        self._native = not on_cpu
        options: dict[str, Any] = {}
        if settings["max_context"]:
            options["max_model_len"] = settings["max_context"]
        if settings["kv_cache_bytes"]:
            options["kv_cache_memory_bytes"] = settings["kv_cache_bytes"]
        if on_cpu:
            # With chunked prefill vLLM discards a sampled token and rewinds the generator; CPU generators cannot rewind.
            options["enable_chunked_prefill"] = False
        else:
            from vllm.config import WeightTransferConfig

            import_ipc_engine()
            options["gpu_memory_utilization"] = settings["gpu_memory_frac"]
            options["weight_transfer_config"] = WeightTransferConfig(backend="ipc")
            options["enable_sleep_mode"] = True
        self._reports_experts = bool(settings.get("routing"))
        if self._reports_experts:
            options["enable_return_routed_experts"] = True
        try:
            self._llm = LLM(
                settings["path"],
                dtype=settings["dtype"],
                enforce_eager=settings["enforce_eager"],
                max_num_seqs=settings["max_num_seqs"],
                skip_tokenizer_init=True,
                generation_config="vllm",  # ignore the checkpoint's sampling defaults
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled, not of the raw logits
                max_logprobs=-1,
                seed=0,
                **(options | extra),
            )
        except (TypeError, ValueError) as error:  # an option is unknown, or unavailable for this device or model
            if not self._reports_experts:
                raise
            raise UserError(
                "rollout.routing is 'replay', and vLLM cannot report the experts of each token here (that needs CUDA): "
                f"set rollout.routing to 'recompute', or rollout.engine to 'local'. vLLM's error: {error}"
            ) from error
        config = self._llm.llm_engine.vllm_config
        self._vocab_size = config.model_config.get_vocab_size()
        if on_cpu:
            _check_head_size(config.model_config.get_head_size())
        return config

    def _open_transfer(self, at_init: Collection[str], at_update: Collection[str]) -> None:
        """Initialize vLLM's weight transfer. It takes the flag `packed` here; until vLLM 0.32 it came with each update: the
        fields of both tell which."""
        self._packed_in_update = "packed" in at_update
        self._llm.init_weight_transfer_engine({"init_info": {"packed": True} if "packed" in at_init else {}})

    def begin_weights(self) -> None:
        if self._native:
            self._llm.start_weight_update()
        self._reloader.begin(native=self._native)

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self._reloader.load(named)

    def load_handles(self, update: dict[str, Any]) -> None:
        if self._packed_in_update:
            update = {**update, "packed": True}
        self._llm.update_weights({"update_info": update})

    def finish_weights(self) -> dict[str, int]:
        if self._native:
            self._llm.finish_weight_update()
        self._reloader.finish(native=self._native)
        self._llm.reset_prefix_cache()  # it holds keys and values of the old weights
        return self._reloader.sums()

    def generate(
        self, prompts: Sequence[tuple[int, list[int]]], params: SamplingParams, seeds: Sequence[int]
    ) -> Generator[Group | None, None, None]:
        engine = self._llm.llm_engine
        if params.routing and not self._reports_experts:
            raise UserError("vLLM was started with rollout.routing 'recompute': it cannot report the experts of each token")
        running: set[str] = set()
        try:
            for (index, prompt), seed in zip(prompts, seeds, strict=True):
                running.add(str(index))
                engine.add_request(str(index), {"prompt_token_ids": prompt}, self._sampling(params, seed))
            while engine.has_unfinished_requests():
                finished = [output for output in engine.step() if output.finished]
                running -= {output.request_id for output in finished}
                for output in finished:
                    outputs = sorted(output.outputs, key=lambda completion: completion.index)
                    samples = [_sample(completion, params, len(output.prompt_token_ids)) for completion in outputs]
                    yield int(output.request_id), samples * params.group_size if params.greedy else samples
                if not finished:
                    yield None
        except GeneratorExit:  # drop the rest; cached keys and values of its prompts stay valid, because the weights are the same
            engine.abort_request(sorted(running))
            raise

    def _sampling(self, params: SamplingParams, seed: int) -> Any:
        """vLLM's sampling parameters. For a greedy token vLLM reports the log-probability before temperature and top-k;
        `_filtered` applies both, and needs the log-probabilities of all tokens that the filter keeps."""
        from vllm import SamplingParams as VllmSamplingParams
        from vllm.sampling_params import RequestOutputKind

        top_k = params.top_k if params.top_k < self._vocab_size else 0
        num_logprobs = 0
        if params.greedy and (top_k or params.temperature != 1.0):
            num_logprobs = top_k or -1
        if params.support:
            if not top_k:
                raise UserError(
                    f"rollout.support is 'replay' and rollout.top_k {params.top_k} keeps the whole vocabulary of "
                    f"{self._vocab_size}: lower rollout.top_k, or set rollout.support to 'recompute'"
                )
            num_logprobs = top_k  # log-probabilities of the filtered distribution: finite ones mark its support
        return VllmSamplingParams(
            n=1 if params.greedy else params.group_size,
            temperature=0.0 if params.greedy else params.temperature,
            top_k=0 if params.greedy else top_k,
            seed=None if params.greedy else seed,
            max_tokens=params.max_new_tokens,
            stop_token_ids=[] if params.ignore_eos else list(params.stop_ids),
            ignore_eos=True,  # stop_token_ids alone ends a response
            logprobs=num_logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def sleep(self) -> None:
        """Release weights and key-value cache. vLLM's CPU backend cannot sleep and keeps both."""
        if self._native:
            self._llm.sleep(level=2)

    def wake(self, tags: list[str] | None) -> None:
        if self._native:
            self._llm.wake_up(tags)


def _sample(completion: Any, params: SamplingParams, prompt_length: int) -> Response:
    """One response. Raises RuntimeError for a finish reason other than stop or length: vLLM aborted the response."""
    ids = [int(token) for token in completion.token_ids]
    logprobs = []
    for token, reported in zip(ids, completion.logprobs, strict=True):
        value = reported[token].logprob
        if params.greedy and (params.top_k or params.temperature != 1.0):
            value = _filtered(value, [entry.logprob for entry in reported.values()], params.temperature)
        logprobs.append(float(value))
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with finish reason {completion.finish_reason!r}: expected 'stop' or 'length'")
    if not (params.support or params.routing):
        return ids, logprobs, completion.finish_reason
    support = _support(completion.logprobs, params.top_k) if params.support else None
    routed = _routed(completion.routed_experts, prompt_length + len(ids) - 1) if params.routing else None
    return ids, logprobs, completion.finish_reason, support, routed


def _support(reported: Sequence[dict[int, Any]], top_k: int) -> str:
    """[L, K] int32 in base64, padded with -1: the ids with a probability above 0. Ties at the last place may keep more than top_k
    ids; vLLM then reports top_k of them, plus the drawn id if it is not among those."""
    kept = [[token for token, entry in position.items() if math.isfinite(entry.logprob)] for position in reported]
    width = max(top_k, max(map(len, kept), default=0))
    table = np.array([row + [-1] * (width - len(row)) for row in kept], dtype="<i4").reshape(len(kept), width)
    return base64.b64encode(table.tobytes()).decode()


def _routed(reported: np.ndarray | None, num_tokens: int) -> Routed:
    """The experts of the first `num_tokens` tokens, which are all except the response's last. reported: [tokens, layers, K] of
    prompt and response, over all layers, with zeros in layers without experts."""
    if reported is None or reported.ndim != 3 or len(reported) < num_tokens:
        shape = None if reported is None else reported.shape
        raise RuntimeError(f"vLLM reported experts of shape {shape} for {num_tokens} tokens")
    table = np.ascontiguousarray(reported[:num_tokens], dtype="<i2")
    return table.shape[1], table.shape[2], base64.b64encode(table.tobytes()).decode()


def _filtered(logprob: float, kept: Sequence[float], temperature: float) -> float:
    """The log-probability after temperature and a filter that keeps the tokens with log-probabilities `kept`."""
    scaled = [value / temperature for value in kept]
    top = max(scaled)
    return logprob / temperature - top - math.log(sum(math.exp(value - top) for value in scaled))


def _check_head_size(head_size: int) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_size not in sizes:
        raise UserError(
            f"the model's head_dim is {head_size}, and vLLM's CPU backend supports only {sizes}: set rollout.engine to 'local'"
        )


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def kv_cache_bytes(worker: Any) -> int:
    """Bytes of a vLLM worker's key-value cache: as they were set, else as it measured them at its start; 0 if it has neither."""
    return int(worker.cache_config.kv_cache_memory_bytes or getattr(worker, "available_kv_cache_memory_bytes", 0))


if __name__ == "__main__":
    serve(VllmBackend(), sys.argv)
