"""Settings of vLLM's process: its environment, checks of the configuration, the seed of each prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from srpo.core.config.train import VllmConfig
from srpo.core.errors import UserError
from srpo.core.jsonl import json_file
from srpo.core.ranges import check_ranges

_CPU_BUCKET_MIB, _GPU_BUCKET_MIB = 16, 512
# Sizes in config.json that vLLM splits over devices, each evenly.
_SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size")


def derive_seed(seed: int, prompt_index: int) -> int:
    """The 62-bit seed of one prompt; vLLM adds the sample's index to it."""
    return int(np.random.SeedSequence((seed, prompt_index)).generate_state(1, np.uint64)[0] >> 2)


def bucket_bytes(config: VllmConfig, device: torch.device) -> int:
    """Size of a bucket of weights in bytes: `config.bucket_mib`, or the device's default if that is 0."""
    return (config.bucket_mib or (_GPU_BUCKET_MIB if device.type == "cuda" else _CPU_BUCKET_MIB)) << 20


def visible_device(device: torch.device) -> str:
    """The name of a GPU in CUDA_VISIBLE_DEVICES; "" for a CPU."""
    if device.type != "cuda":
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[device.index or 0] if visible else str(device.index or 0)


def worker_environment(device: torch.device, devices: Sequence[str] = ()) -> dict[str, str]:
    """Environment variables of vLLM's process; the user's values take precedence over `defaults`.

    devices: if vLLM is split over several GPUs, their names (`visible_device`) in order of rank.
    """
    required = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked worker would hold this process's sockets open
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "GLOO_SOCKET_IFNAME": "lo",  # vLLM's process group, of one process, listens on the loopback device
        "VLLM_HOST_IP": "127.0.0.1",
    }
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise all ranks of a host bind to the same cores
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    env = {k: os.environ.get(k, v) for k, v in defaults.items()}
    if device.type == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices or [visible_device(device)])
    return env | required


def check_vllm_settings(config: VllmConfig) -> None:
    """Raise UserError for a setting that is out of range."""
    check_ranges(config, prefix="rollout.vllm.")


def check_split(path: str | Path, size: int) -> None:
    """Raise UserError if the model in `path` cannot be split over `size` devices.

    With fewer key-value heads than devices vLLM would replicate heads, and bit sums could not verify their weights.
    """
    config = json_file(Path(path) / "config.json", "the file of the checkpoint")
    for key in _SPLIT:
        if config.get(key) and config[key] % size:
            raise UserError(
                f"rollout.vllm.tensor_parallel_size is {size}, and {key} of the model in {str(path)!r} is {config[key]}: set "
                f"rollout.vllm.tensor_parallel_size to a divisor of {config[key]}"
            )


def check_dtypes(others: Sequence[str], dtype: str) -> None:
    """Raise UserError if vLLM keeps the weights `others` in another format than its own, `dtype`: bit sums could not verify
    them."""
    if others:
        raise UserError(
            f"vLLM keeps {len(others)} weights of this model, first {others[0]}, in another format than policy.dtype {dtype}, in "
            "which weights are sent and verified: set rollout.engine to 'local', or policy.dtype to 'float32'"
        )
