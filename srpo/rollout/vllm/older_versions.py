"""Help that older versions of vLLM need, each with the version from which on it can go. Runs in vLLM's processes."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

_IPC_ENGINE = "vllm.distributed.weight_transfer.ipc_engine"


def import_ipc_engine() -> None:
    """Import vLLM's weight transfer by CUDA IPC, also if it imports ray and ray is not installed. Until vLLM 0.32.

    vLLM 0.26 does, for a way of sending that srpo does not use, and does not require ray. An empty module takes ray's place
    during this import alone: elsewhere vLLM asks whether ray is there.
    """
    try:
        import_module(_IPC_ENGINE)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        sys.modules["ray"] = ModuleType("ray")
        try:
            import_module(_IPC_ENGINE)
        finally:
            del sys.modules["ray"]
