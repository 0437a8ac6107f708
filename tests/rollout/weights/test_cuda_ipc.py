"""Buckets for CUDA IPC handles, on the CPU: contents of the staging buffer, its exports, and reads from the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from srpo.rollout.weights import cuda_ipc
from srpo.rollout.weights.buckets import bit_sum, bit_sums, group_of
from srpo.rollout.weights.cuda_ipc import CudaSender, describe, iter_buckets

CPU = torch.device("cpu")


@pytest.fixture
def params() -> list[tuple[str, torch.Tensor]]:
    """Tensors of many sizes; one is larger than the tests' buckets, one is empty, one is not contiguous, one holds integers."""
    sizes = [(3,), (7, 5), (64, 33), (1,), (), (0, 4), (16,), (5000,), (2, 3, 4), (9,)]
    named = [(f"model.layers.{i % 3}.w{i}", torch.randn(size)) for i, size in enumerate(sizes)]
    return [*named, ("model.odd.t", torch.randn(8, 6).t()), ("model.odd.n", torch.randint(-9, 9, (5,)))]


def book_sum(tensor: torch.Tensor) -> int:
    """The bit sum by its definition."""
    patterns = tensor.contiguous().flatten().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    return sum(patterns.tolist()) % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bucket_lies_in_one_buffer_as_vllm_takes_it_apart(params: list[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    names, buffers = [], set()
    for bucket, staging in iter_buckets(iter(params), dtype, 3000, CPU):
        words = describe(bucket)
        assert sum(words["tensor_sizes"]) <= 3000 or len(bucket) == 1
        parts = staging[: sum(words["tensor_sizes"])].split(words["tensor_sizes"])
        for part, name, kind, shape in zip(parts, words["names"], words["dtype_names"], words["shapes"], strict=True):
            want = dict(params)[name]
            want = want.to(dtype) if want.is_floating_point() else want
            assert torch.equal(part.view(getattr(torch, kind)).view(shape), want)
        names += words["names"]
        buffers.add((staging.data_ptr(), staging.numel()))
    assert names == [name for name, _ in params]
    sizes = sorted(size for _, size in buffers)
    assert sizes == [3000, 64 * 33 * dtype.itemsize, 5000 * dtype.itemsize]  # replaced by tensors that are larger, only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_sums_of_many_are_those_of_each_and_read_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("srpo.rollout.weights.buckets._CHUNK", 999)
    tensors = [(torch.randn(size) * 1e6).to(dtype) for size in ((3,), (70, 101), (0,), (), (2500,))]
    want, reads = [book_sum(tensor) for tensor in tensors], []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or tolist(tensor))
    for name in ("item", "__int__", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("another read"))
    assert bit_sums(tensors) == want and len(reads) == 1
    assert bit_sums([]) == [] and [bit_sum(tensor) for tensor in tensors] == want


def test_a_sync_exports_its_one_buffer_for_every_bucket_and_frees_it_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each handle is a new export: one that is opened for each bucket would be closed more often than it was made."""
    policy = nn.ModuleDict({f"layer{i}": nn.Linear(40, 30) for i in range(6)})
    log: list[Any] = []
    exported: list[torch.Tensor] = []

    def reduce_tensor(tensor: torch.Tensor) -> tuple[None, int]:
        exported.append(tensor)
        return None, len(exported)

    class Process:
        def send(self, op: str, **arguments: Any) -> None:
            log.append(op)
            if op == "handles":
                update = arguments["update"]
                (number,) = update["ipc_handles"].values()
                assert number == len(exported)
                content = exported[-1][: sum(update["tensor_sizes"])].clone()  # what the engine reads while it has the turn
                log.append(dict(zip(update["names"], content.split(update["tensor_sizes"]), strict=True)))

        def receive(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(cuda_ipc, "iter_checkpoint_params", lambda model: model.named_parameters())
    monkeypatch.setattr(cuda_ipc, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"uuid": "gpu"}))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: log.append("ipc_collect"))
    sender = CudaSender(9000, torch.bfloat16, CPU)
    sums = sender.send(Process(), policy, 3)  # pyright: ignore[reportArgumentType]
    assert [entry for entry in log if isinstance(entry, str)] == ["begin", *["handles"] * len(exported)] and len(exported) > 1
    assert len({tensor.data_ptr() for tensor in exported}) == 1 and {tensor.numel() for tensor in exported} == {9000}
    arrived = {name: part for entry in log if isinstance(entry, dict) for name, part in entry.items()}
    want: dict[str, int] = {}
    for name, parameter in policy.named_parameters():
        value = parameter.detach().bfloat16()
        assert torch.equal(arrived[name].view(torch.bfloat16).view(value.shape), value)
        want[group_of(name)] = (want.get(group_of(name), 0) + book_sum(value)) % 2**64
    assert sums == want and sender.num_bytes == 2 * sum(parameter.numel() for parameter in policy.parameters())
    sender.release()
    assert log[-1] == "ipc_collect" and log.count("ipc_collect") == 1


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_an_allocator_whose_memory_has_no_handles_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    with pytest.raises(ValueError, match=rf"{name} has expandable_segments"):
        CudaSender(1 << 20, torch.bfloat16, torch.device("cuda"))
