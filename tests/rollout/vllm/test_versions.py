"""Start of the backend and a weight sync on a GPU, with fakes of the oldest and the present vLLM (tests/helpers/gpu_vllm.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_vllm
import pytest
import torch

from srpo.rollout.vllm.older_versions import import_ipc_engine
from srpo.rollout.vllm.worker import VllmBackend
from srpo.rollout.weights.buckets import bit_sum

SETTINGS = {
    "path": "model",
    "dtype": "float32",
    "device": "cuda",
    "max_context": 0,
    "max_num_seqs": 8,
    "kv_cache_bytes": 0,
    "gpu_memory_frac": 0.3,
    "enforce_eager": False,
}
VERSIONS = ["0.26.0", "0.32.0"]


@pytest.fixture
def vllm_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """A function that puts the fake of a version in vLLM's place. ray is not installed."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "vllm"]

    def install(version: str) -> None:
        gpu_vllm.write(tmp_path, version)
        monkeypatch.syspath_prepend(str(tmp_path))

    before = {name: sys.modules.pop(name) for name in ours()}
    monkeypatch.setattr(sys, "meta_path", [_NoRay(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    yield install
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


class _NoRay:
    """Finds no ray, even if the machine has it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_starts_and_takes_weights(version: str, vllm_of: Callable[[str], None]) -> None:
    vllm_of(version)
    backend = VllmBackend()
    facts = backend.start(SETTINGS)
    assert facts["max_context"] == 77 and facts["kv_cache_bytes"] == 5_000_000 and facts["other_dtypes"] == []
    assert "ray" not in sys.modules  # other parts of vLLM ask for it, and would take an empty one for it
    llm: Any = backend._llm
    new = {name: torch.randn_like(tensor) for name, tensor in llm.stored.items()}
    assert list(new) == ["lm_head.weight", "lm_head.bias", "lm_head.scale"]  # a buffer of the checkpoint is proved, too
    llm.model.log.clear()
    backend.begin_weights()
    backend.load_handles({"names": list(new), "ipc_handles": list(new.values())})
    sums = backend.finish_weights()
    assert llm.model.log == ["start", "finish"]
    assert sums == {"lm_head": sum(map(bit_sum, new.values())) % 2**64}
    assert (llm.init, llm.packed) == (({}, True) if version == "0.26.0" else ({"packed": True}, None))


def test_a_size_of_the_cache_that_was_set_is_reported(vllm_of: Callable[[str], None]) -> None:
    vllm_of("0.32.0")
    assert VllmBackend().start(SETTINGS | {"kv_cache_bytes": 1 << 20})["kv_cache_bytes"] == 1 << 20


def test_weights_that_vllm_keeps_in_another_format_are_reported(
    vllm_of: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_of("0.32.0")
    import vllm

    whole = vllm.Model.__init__

    def mixed(model: Any) -> None:
        whole(model)
        model.lm_head.bias.data = model.lm_head.bias.data.double()

    monkeypatch.setattr(vllm.Model, "__init__", mixed)
    assert VllmBackend().start(SETTINGS)["other_dtypes"] == ["lm_head.bias (float64)"]


def test_any_other_missing_module_is_an_error(vllm_of: Callable[[str], None], tmp_path: Path) -> None:
    vllm_of("0.26.0")
    engine = tmp_path / "vllm" / "distributed" / "weight_transfer" / "ipc_engine.py"
    engine.write_text("import not_there_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        import_ipc_engine()
    engine.write_text("import ray\nimport not_there_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        import_ipc_engine()
    assert "ray" not in sys.modules
