"""The Triton kernels compile for every architecture, and the machine code is as intended. Needs no GPU.

16 warps leave 128 registers to a thread, the budget of kernels with streamed tiles; the compiler uses what it is allowed. No
registers may be spilled, and logits must be moved 16 bytes at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import machine_code
import pytest
from machine_code import TARGETS, amd_use, disassemble
from srpo_kernels import triton_rows

V = 151936
# Arguments that are constant while a model trains, and that a kernel may be compiled for. It is compiled for no others.
LAYOUT = {"logits", "ref_logits", "dlogits", "logits_stride", "ref_stride", "dlogits_stride", "vocab"}
TABLES = {"kept_ids": "*i64", "labels": "*i64", "step_ends": "*i32", "cu_seqlens": "*i32"}
COUNTS = ("num_rows", "vocab", "num_sequences", "num_steps", "num_kept", "first_row")
POLICY = ("step_advantages", "step_ends", "cu_seqlens", "weights", "old_logprobs", "ref_logprobs", "ref_logits")


@dataclass(frozen=True)
class Variant:
    """Constants of a compiled kernel, and the largest number of registers per thread on NVIDIA and on AMD."""

    registers: int
    amd_registers: int
    dtype: str = "bf16"
    gradient: str | None = None  # its dtype, that of the logits
    mode: str = "policy_loss"
    kl_estimator: str | None = "k3"
    clip_form: str = "ppo"
    num_kept: int = 0


VARIANTS = {
    "bf16": Variant(128, 96),
    "fp32": Variant(128, 96, dtype="fp32"),
    "fp32_to_bf16": Variant(128, 96, dtype="fp32", gradient="bf16"),
    "cispo": Variant(128, 96, clip_form="cispo"),
    "exact_kl": Variant(128, 112, kl_estimator="full"),
    "exact_kl_fp32": Variant(128, 112, dtype="fp32", kl_estimator="full"),
    "filtered": Variant(64, 64, num_kept=100),
    "logprobs": Variant(80, 64, mode="logprobs", kl_estimator=None),
    "logprobs_backward": Variant(128, 96, mode="logprobs_backward", kl_estimator=None),
}


def absent(variant: Variant) -> set[str]:
    """Arguments that are None."""
    names = set() if variant.num_kept else {"kept_ids"}
    if variant.mode != "logprobs_backward":
        names |= {"grad_logprobs", "grad_lse"}
    if variant.mode != "policy_loss":
        names |= set(POLICY)
    if variant.mode == "logprobs":
        names.add("dlogits")
    if variant.kl_estimator != "full":
        names.add("ref_logits")
    if variant.kl_estimator in (None, "full"):
        names.add("ref_logprobs")
    return names | ({"old_logprobs"} if variant.kl_estimator is None else set())


def compiled(kernels: ModuleType, variant: Variant, arch: str) -> Any:
    """The kernel as it is launched for rows of V logits that start at multiples of 16 bytes."""
    element_bytes = 4 if variant.dtype == "fp32" else 2
    num_columns = variant.num_kept + 1 if variant.num_kept else V
    tiles = triton_rows.tiling(num_columns, element_bytes, gathered=bool(variant.num_kept), aligned=bool(LAYOUT))
    fixed = {"MODE": variant.mode, "CLIP_FORM": variant.clip_form, "KL_ESTIMATOR": variant.kl_estimator}
    fixed |= {"BLOCK": tiles.block, "NUM_HELD": tiles.num_held, "FOLD": tiles.fold, **dict.fromkeys(absent(variant))}
    types = {"logits": f"*{variant.dtype}", "ref_logits": f"*{variant.dtype}", "dlogits": f"*{variant.gradient or variant.dtype}"}
    types |= TABLES | dict.fromkeys((*COUNTS, "logits_stride", "ref_stride", "dlogits_stride"), "i32") | {"c": "fp32"}
    types |= dict.fromkeys(("c_error", "inverse_temperature", "clip_low", "clip_high", "dual_clip", "kl_coef"), "fp64")
    return machine_code.compiled(kernels.rows_kernel, arch, types, fixed, LAYOUT, num_warps=tiles.num_warps)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


# On architectures other than sm90: one variant of each way through the kernel, and the one with the most registers.
ELSEWHERE = ("bf16", "exact_kl_fp32", "filtered", "logprobs")
ON_NVIDIA = [
    pytest.param(name, arch, marks=() if arch == "sm90" or name in ELSEWHERE else pytest.mark.slow)
    for arch in TARGETS
    if arch.startswith("sm")
    for name in VARIANTS
]


@pytest.mark.parametrize(("name", "arch"), ON_NVIDIA)
def test_nvidia(kernels: ModuleType, name: str, arch: str, tmp_path: Path) -> None:
    """A combination is marked slow if fast ones cover it: the variant on sm90, and similar variants on the architecture."""
    variant = VARIANTS[name]
    use, sass = disassemble(compiled(kernels, variant, arch).asm["cubin"], tmp_path)
    print(use)
    assert use["STACK"] == use["LOCAL"] == 0 and not re.search(r"\b(LDL|STL)\b", sass), "spilled registers"
    assert use["REG"] <= variant.registers
    loads = re.findall(r"\bLDG\.E([.\w]*)", sass)
    if variant.num_kept:
        return  # single elements are gathered
    wide = sum(".128" in load for load in loads)
    assert wide >= 8, "logits are loaded 16 bytes at a time"
    narrow_16 = sum(".U16" in load or ".S16" in load for load in loads)
    assert narrow_16 <= (0 if variant.dtype == "fp32" else 2), "but for the label's"
    assert len(loads) - wide <= 20, "and the tables"
    stores = re.findall(r"\bSTG\.E([.\w]*)", sass)
    assert variant.mode == "logprobs" or sum(".128" in store for store in stores) >= 4, "the gradient is written so, too"
    if variant.mode != "logprobs":
        assert sum(".EF" in store for store in stores) >= 4, "and past the caches"


@pytest.mark.parametrize("name", VARIANTS)
def test_amd(kernels: ModuleType, name: str) -> None:
    variant = VARIANTS[name]
    code = compiled(kernels, variant, "gfx942").asm["amdgcn"]
    use = amd_use(code)
    print(use)
    assert use["vgpr_spill_count"] == use["sgpr_spill_count"] == 0 and use["vgpr_count"] <= variant.amd_registers
    if not variant.num_kept:
        assert len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)) >= 3
        assert variant.mode == "logprobs" or re.search(r"\b(?:global|buffer)_store_dwordx[24]\b", code)


@pytest.mark.parametrize("arch", TARGETS)
def test_rows_that_are_not_aligned_compile(kernels: ModuleType, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "LAYOUT", set())
    assert compiled(kernels, VARIANTS["bf16"], arch).asm


@pytest.mark.parametrize("arch", TARGETS)
def test_scaling_compiles(kernels: ModuleType, arch: str) -> None:
    types = {"values": "*bf16", "factor": "*fp32", "stride": "i32", "size": "i32"}
    assert machine_code.compiled(kernels.scale_kernel, arch, types, {"BLOCK": 4096}, set(), num_warps=8).asm


def test_nothing_but_the_layout_of_a_row_is_compiled_for(kernels: ModuleType) -> None:
    """Neither a number of rows, sequences or steps, nor where a slice of a table starts, nor any scalar makes a new kernel."""
    numbers = {"c", "c_error", "inverse_temperature", "clip_low", "clip_high", "dual_clip", "kl_coef"}
    specialized = set()
    for param in kernels.rows_kernel.params:
        if param.name in numbers:
            assert param.annotation_type in ("fp32", "fp64")
        elif not param.is_constexpr and not param.do_not_specialize:
            specialized.add(param.name)
    assert specialized == LAYOUT
    assert {param.name for param in kernels.rows_kernel.params if param.is_constexpr} == {
        *("MODE", "CLIP_FORM", "KL_ESTIMATOR", "BLOCK", "NUM_HELD", "FOLD")
    }
