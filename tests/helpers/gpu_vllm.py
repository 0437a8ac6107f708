"""Source of a package `vllm` with the modules and names that srpo uses of vLLM on a GPU, as in version 0.26 or 0.32.

Its model is one linear layer in the memory of this process; handles of weights are the tensors themselves.
"""

from __future__ import annotations

from pathlib import Path

RELOAD = """
def initialize_layerwise_reload(model): model.log.append("initialize")
def finalize_layerwise_reload(model, config): model.log.append("finalize")
"""
CONFIG = """
from contextlib import nullcontext
from dataclasses import dataclass
def set_current_vllm_config(config): return nullcontext()
@dataclass
class WeightTransferConfig:
    backend: str
"""
PLATFORM = """
class current_platform:
    @staticmethod
    def is_cpu(): return False
    @staticmethod
    def is_zen_cpu(): return False
"""
IPC_ENGINE = """
{imports}
from dataclasses import dataclass
@dataclass
class Init:
    {at_init}
@dataclass
class Update:
    names: list
    {at_update}
"""
LLM = """
import importlib, torch
from types import SimpleNamespace as Names
__version__ = "{version}"
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log = []
        self.lm_head = torch.nn.Linear(4, 3).requires_grad_(False)
        self.lm_head.register_buffer("scale", torch.ones(1))
        self.lm_head.register_buffer("cache", torch.ones(1))  # of vLLM's own: no checkpoint has it
    def load_weights(self, named):
        for name, tensor in named:
            self.state_dict()[name].copy_(tensor)
class LLM:
    def __init__(self, path, **options):
        assert options["weight_transfer_config"].backend == "ipc" and options["enable_sleep_mode"]
        engine = importlib.import_module("vllm.distributed.weight_transfer.ipc_engine")
        model_config = Names(max_model_len=77, dtype=torch.float32, get_vocab_size=lambda: 3)
        config = Names(model_config=model_config, load_config=None)
        self.model = Model()
        self.stored = {{name: t.clone() for name, t in self.model.state_dict().items() if "cache" not in name}}
        self.worker = Names(
            model_runner=Names(get_model=lambda: self.model), vllm_config=config, model_config=model_config,
            cache_config=Names(kv_cache_memory_bytes=options.get("kv_cache_memory_bytes")), available_kv_cache_memory_bytes=5e6,
            weight_transfer_engine=Names(init_info_cls=engine.Init, update_info_cls=engine.Update),
        )
        executor = Names(driver_worker=Names(worker=self.worker))
        self.llm_engine = Names(vllm_config=config, model_executor=executor)
        LLM.last = self
    def init_weight_transfer_engine(self, request): self.init = request["init_info"]
    def start_weight_update(self): self.model.log.append("start")
    def update_weights(self, request):
        self.packed = request["update_info"].get("packed")
        self.model.load_weights(zip(request["update_info"]["names"], request["update_info"]["ipc_handles"]))
    def finish_weight_update(self): self.model.log.append("finish")
    def reset_prefix_cache(self): pass
"""
LOADER = """
import vllm
def get_model_loader(config):
    class Loader:
        def get_all_weights(self, config, model): return list(vllm.LLM.last.stored.items())
    return Loader()
"""
UTILS = "def dispatch_cpu_unquantized_gemm(layer, remove_weight): raise AssertionError('no CPU')\n"


def write(folder: Path, version: str) -> None:
    """Write the package into a folder. 0.26 imports ray in its IPC engine and has no module of CPU experts."""
    old = version.startswith("0.26")
    at_init, at_update = ("pass", "packed: bool = False") if old else ("packed: bool = False", "sizes: list | None = None")
    engine = IPC_ENGINE.format(imports="import ray" if old else "", at_init=at_init, at_update=at_update)
    modules = {
        "__init__": LLM.format(version=version),
        "config/__init__": CONFIG,
        "platforms/__init__": PLATFORM,
        "distributed/__init__": "",
        "distributed/weight_transfer/__init__": "",
        "distributed/weight_transfer/ipc_engine": engine,
        "model_executor/__init__": "",
        "model_executor/layers/__init__": "",
        "model_executor/layers/utils": UTILS,
        "model_executor/model_loader/__init__": LOADER,
        "model_executor/model_loader/reload": RELOAD,
    }
    if not old:
        moe = "model_executor/layers/fused_moe"
        modules |= {
            f"{moe}/__init__": "",
            f"{moe}/experts/__init__": "",
            f"{moe}/experts/cpu_moe": "class CPUUnquantizedExperts: ...",
        }
    for name, text in modules.items():
        path = folder / "vllm" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
