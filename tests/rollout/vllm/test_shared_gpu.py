"""Ranks that share an engine on several GPUs, with CUDA faked: handles of weights, and memory that each rank gives back."""

from __future__ import annotations

import threading
from contextlib import closing
from functools import partial
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import policy_lab as lab
import pytest
import torch
from threads_meet import Meeting, both
from torch import nn

from srpo.rollout.vllm.process import EngineError
from srpo.rollout.vllm.shared_engine import SharedEngine
from srpo.rollout.weights import cuda_ipc
from srpo.rollout.weights.cuda_ipc import CudaSender


@pytest.fixture(scope="module")
def policy() -> nn.Module:
    return lab.tiny()


@pytest.mark.parametrize("fails", [False, True])
def test_each_gpu_s_worker_gets_the_handle_of_its_own_rank(policy, monkeypatch, fails):
    """CUDA is faked here. A process that fails at a bucket ends the sync on both ranks."""
    updates: list[dict[str, Any]] = []

    class Process:
        def send(self, op: str, **arguments: Any) -> None:
            updates.extend([arguments["update"]] if op == "handles" else [])

        def receive(self) -> None:
            if fails and len(updates) == 2:
                raise EngineError("out of luck")

    monkeypatch.setattr(cuda_ipc, "reduce_tensor", lambda _: (None, threading.current_thread().name))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=threading.current_thread().name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    meeting = Meeting(2)

    def send(rank: int) -> tuple[dict[str, int], None] | EngineError:
        threading.current_thread().name = f"gpu {rank}"
        sender = CudaSender(20_000, torch.float32, torch.device("cpu"), meeting.of(rank))
        try:
            return sender.send(Process() if rank == 0 else None, policy, 1), sender.release()  # pyright: ignore[reportArgumentType]
        except EngineError as error:
            return error

    first, second = both(partial(send, 0), partial(send, 1))
    for update in updates:
        assert update["ipc_handles"] == {f"gpu {rank}": f"gpu {rank}" for rank in (0, 1)}
    if fails:
        assert str(first) == str(second) == "out of luck" and len(updates) == 2
    else:
        assert isinstance(first, tuple) and first == second and first[0] and len(updates) > 2


def test_a_rank_beside_the_engine_gives_its_memory_back_before_either_part_wakes(policy, monkeypatch):
    """The rank that owns the engine wakes the weights after the first meeting, and the cache after that of `release`."""
    done: list[str] = []

    class Sender:
        device = torch.device("cuda")

        def send(self, process: None, policy: nn.Module, version: int) -> None:
            done.append("send")

        def release(self) -> None:
            done.append("release")

    def exchange(x: Any) -> list[Any]:
        done.append("meet")
        return [x, x]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    with closing(Pipe()[0]) as channel:
        engine = SharedEngine(channel, 48, exchange, sender=Sender())  # pyright: ignore[reportArgumentType]
        engine.sync_weights(policy, 3)
    assert done == ["empty_cache", "meet", "send", "release", "meet"] and engine.policy_version == 3


def test_an_engine_that_fails_before_it_takes_weights_is_an_error_on_every_rank(policy, monkeypatch):
    """The owner meets the others with its problem where they expect the handle of its memory."""

    class Engine:
        def sync_weights(self, policy: nn.Module, version: int) -> None:
            raise EngineError("did not wake")

    server = SimpleNamespace(busy=threading.Lock(), engine=Engine())
    monkeypatch.setattr(cuda_ipc, "reduce_tensor", lambda _: (None, "handle"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="gpu 1"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    meeting = Meeting(2)

    def sync(rank: int) -> str:
        sender = CudaSender(20_000, torch.float32, torch.device("cpu"), meeting.of(rank))
        role: dict[str, Any] = {"server": server} if rank == 0 else {"sender": sender}
        with closing(Pipe()[0]) as channel, pytest.raises(EngineError) as failure:
            SharedEngine(channel, 48, meeting.of(rank), **role).sync_weights(policy, 1)
        return str(failure.value)

    assert both(partial(sync, 0), partial(sync, 1)) == ["did not wake", "did not wake"]
