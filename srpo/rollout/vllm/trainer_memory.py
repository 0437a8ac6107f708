"""The memory of this process on the GPU that it shares with vLLM's processes."""

from __future__ import annotations

import torch


def give_back_cache(device: torch.device) -> float:
    """Give the memory that torch's allocator has cached back to the device, and return the bytes that it keeps; 0 on a CPU.

    Torch keeps freed memory for itself, and vLLM's processes would find the peak of the last update still taken.
    """
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return float(torch.cuda.memory_reserved(device))
