"""The stages, in order of value: the first ones need least and tell most."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One process. `cap_s` is the longest that it may take.

    after: stages of the other lane that it waits for, and that run first if they have not passed. products: names of what it
    leaves in the state folder for other stages.
    """

    name: str
    lane: str  # "cpu" work (unpacking, compiling) runs beside the "gpu" lane
    expected_s: int
    cap_s: int
    proves: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    products: tuple[str, ...] = ()


def _enter(module: str, *arguments: str, packages: str = "") -> tuple[str, ...]:
    """The command that runs a module of this package as a stage, if the card and the packages are there."""
    return (sys.executable, "-u", "-m", "gpu_proof.enter", module, packages, *arguments)


MODEL = "torch,transformers,tokenizers"
VLLM = f"{MODEL},vllm"
RUN = f"{MODEL},tyro,pyarrow,rich,httpx2"
BINARIES = ("rows_check", "rows_check_watchdog")
READY, CHECKER = ("unpack", "libraries"), ("checker",)
STAGES = (
    Stage("env", "gpu", 4, 30, "what the machine is", _enter("environment")),
    Stage("unpack", "cpu", 8, 60, "packages carried along", _enter("unpack"), (), ("site",)),
    Stage("checker", "cpu", 8, 90, "the torch-free kernel check compiles", _enter("checker"), (), BINARIES),
    Stage("libraries", "cpu", 20, 120, "the kernel libraries compile", _enter("libraries")),
    Stage("rows", "gpu", 40, 110, "the CUDA kernels are right, without torch", _enter("rows"), CHECKER),
    Stage("ceilings", "gpu", 20, 60, "what this card can do", _enter("ceilings", packages="torch"), ("unpack",)),
    Stage("loss_logits", "gpu", 50, 115, "the loss from logits, and rivals", _enter("loss", "logits", packages="torch"), READY),
    Stage("model_ops", "gpu", 30, 100, "attention, experts, registered ops", _enter("model_ops", packages=MODEL), READY),
    Stage("sampling", "gpu", 75, 135, "engines sample from the trainer's weights", _enter("sampling", packages=MODEL), READY),
    Stage("loss_hidden", "gpu", 35, 75, "the loss from hidden states", _enter("loss", "hidden", packages="torch"), READY),
    Stage("train_step", "gpu", 40, 90, "one update in bf16 under FSDP2", _enter("train_step", packages=MODEL), READY),
    Stage("demo", "gpu", 60, 120, "the demo's task is learned", _enter("demo_task", packages=RUN), READY),
    Stage("pytest", "gpu", 100, 150, "the tests that need a GPU", _enter("gpu_tests", packages="torch,pytest"), READY),
    Stage("memcheck", "gpu", 25, 60, "no access out of bounds", _enter("sanitizer", "memcheck"), CHECKER),
    Stage("synccheck", "gpu", 20, 45, "no misused barrier", _enter("sanitizer", "synccheck"), CHECKER),
    Stage("racecheck", "gpu", 30, 60, "races, some falsely reported", _enter("sanitizer", "racecheck"), CHECKER),
    Stage("ncu", "gpu", 15, 40, "bytes moved, occupancy, stalls", _enter("counters"), CHECKER),
    Stage("sampling_graphs", "gpu", 90, 135, "vLLM with CUDA graphs", _enter("sampling", "graphs", packages=VLLM), READY),
    Stage("sampling_v2", "gpu", 60, 135, "vLLM's Model Runner V2", _enter("sampling", "v2", packages=VLLM), READY),
    Stage("sampling_v1", "gpu", 60, 135, "vLLM's first model runner", _enter("sampling", "v1", packages=VLLM), READY),
)
